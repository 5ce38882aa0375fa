# SPDX-License-Identifier: Apache-2.0
"""Extraction of a 1 mm brain from a whole head, and from there training data."""

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy.extract import extract_brain
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.weights import load_parcellation
from brainprior_bids.evaluation.degrade import smooth_field
from brainprior_bids.evaluation.demo import _head
from brainprior_bids.training import preprocess


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A head with a bias field, stored in another orientation, at 1.5 mm; and a 5 mm scan.

    Without the neck and the air around it: half the voxels.
    """
    folder = tmp_path_factory.mktemp("heads")
    data, brain, grid = _head(np.random.default_rng(0))
    inside = np.argwhere(brain)
    start = np.maximum(inside.min(0) - 18, 0)
    stop = np.minimum(inside.max(0) + 18, brain.shape)
    box = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
    data, brain, grid = data[box], brain[box], grid.crop(tuple(start), tuple(stop))
    data = data * smooth_field(grid, np.random.default_rng(1), sd=0.15)
    shape = tuple(int(n) for n in np.round(np.array(grid.extent_mm) / 1.5))
    affine = np.array(grid.affine)
    affine[:3, :3] = np.diag([1.5, 1.5, 1.5])
    coarse = Grid(shape, affine)
    image = nib.Nifti1Image(resample(data, grid, coarse), affine)
    turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    nib.save(turned, anat / "sub-01_T1w.nii.gz")
    (folder / "sub-02").mkdir()
    thick = nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::4], affine @ np.diag([1, 1, 4, 1]))
    nib.save(thick, folder / "sub-02" / "sub-02_T1w.nii.gz")
    return folder, brain, grid


def test_heads_become_training_data(data_set, tmp_path):
    folder, truth, grid = data_set
    preprocess.build_pack(folder, None, tmp_path, validation=["01"], processes=1)
    brains = preprocess.read_pack(tmp_path)
    assert [(b.name, b.contrast, b.split) for b in brains] == [("01", "T1w", "validation")]
    brain = brains[0]
    inside = brain.data > 0
    volume = np.abs(np.linalg.det(grid.affine[:3, :3])) * truth.sum()
    assert inside.sum() == pytest.approx(volume, rel=0.05)  # 1 mm voxels, the brain alone
    assert np.percentile(brain.data[inside], 99) == pytest.approx(preprocess.UNIT, abs=1)
    centre = brain.to_mni305 @ [*np.argwhere(inside).mean(0), 1]
    assert np.linalg.norm(centre[:3] - [0, -20, 15]) < 15  # the middle of a brain in MNI305
    first = brain.to_mni305[:3, :3] @ [1, 0, 0]
    assert 0.7 < first[0] < 1.3  # RAS again, whatever the stored orientation


def test_thick_scans_are_refused(data_set, caplog):
    path = data_set[0] / "sub-02" / "sub-02_T1w.nii.gz"
    with pytest.raises(InputError, match="about 1 mm"):
        extract_brain(path, network=load_parcellation())
    assert preprocess.prepare_head("02", "T1w", "train", path) is None
    assert "sub-02_T1w.nii.gz is left out" in caplog.text
