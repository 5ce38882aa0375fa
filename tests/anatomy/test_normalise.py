# SPDX-License-Identifier: Apache-2.0
"""SyN to a template recovers a known deformation, with the same bytes each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from templates import SPACE, write_template

from brainprior_bids.anatomy import normalise, rescue
from brainprior_bids.anatomy.normalise import Metric, agreement, metric, register, resample_through
from brainprior_bids.anatomy.spaces import Kind, write_itk_affine
from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305, find_template
from brainprior_bids.engine.grids import Grid

SHAPE = (26, 32, 26)
AFFINE = np.diag([7.0, 7.0, 7.0, 1.0])
AFFINE[:3, 3] = [-90, -126, -72]
GRID = Grid(SHAPE, AFFINE)
POSE = np.array([[1.03, 0.04, 0, 3], [-0.04, 1.02, 0.03, -4], [0, -0.03, 1.0, 2], [0, 0, 0, 1.0]])
"""Scanner to template, without the deformation."""


def displacement(points: np.ndarray) -> np.ndarray:
    """(3, …) displacement in mm of points of the scan, before the affine; up to 7 mm."""
    x, y, z = points / 40.0
    return np.stack([5 * np.sin(y) * np.cos(z), 5 * np.sin(z + 1) * np.cos(x), 4 * np.sin(x - y)])


def to_template(points: np.ndarray) -> np.ndarray:
    """(3, …) mm of the scan -> mm of the template: the transform to be estimated."""
    moved = points + displacement(points)
    return np.einsum("ij,j...->i...", POSE[:3, :3], moved) + POSE[:3, 3].reshape(
        3, *(1,) * (points.ndim - 1)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A template of blobs in an ellipsoid, 7 mm."""
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 1.2)
    points = GRID.points_mm()
    inside = ((points - np.array([0, -18, 10]).reshape(3, 1, 1, 1)) ** 2 / np.array(
        [65.0, 82.0, 62.0]).reshape(3, 1, 1, 1) ** 2).sum(0) < 1  # fmt: skip
    home = tmp_path_factory.mktemp("templateflow")
    write_template(home, (500 + 1500 * noise) * inside, AFFINE)
    return home


@pytest.fixture(scope="module")
def brain(home):
    """Template, and image, mask and labels of the scan: the template at ``to_template``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(home))
        template = find_template(SPACE)
    there = np.einsum(
        "ij,j...->i...", np.linalg.inv(AFFINE)[:3, :3], to_template(GRID.points_mm())
    ) + np.linalg.inv(AFFINE)[:3, 3].reshape(3, 1, 1, 1)
    image = ndimage.map_coordinates(template.brain(), there, order=1)
    mask = ndimage.map_coordinates(template.mask_array().astype(float), there, order=1) > 0.5
    labels = np.where(mask, 10 + 7 * (GRID.points_mm()[1] > -18), 0)
    return template, *(
        nib.Nifti1Image(data.astype(np.float32), AFFINE) for data in (image * mask, mask, labels)
    )


@pytest.fixture(scope="module")
def small():
    """Coarse voxels and few iterations: seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalise, "WORK_MM", 7.0)
        patch.setattr(normalise, "ITERATIONS", (20, 15))
        yield


START = np.linalg.inv(MNI152_FROM_MNI305) @ POSE
ONCE = """
import sys
from pathlib import Path
import nibabel as nib
import numpy as np
import test_normalise as t

t.normalise.WORK_MM, t.normalise.ITERATIONS = 7.0, (20, 15)
template = t.find_template(t.SPACE)
data, mask = template.brain().astype(np.float32), template.mask_array().astype(np.float32)
t.register(
    nib.Nifti1Image(np.roll(data, 1, 0), t.AFFINE), nib.Nifti1Image(np.roll(mask, 1, 0), t.AFFINE),
    template, to_mni305=t.START, contrast="T1w", folder=Path(sys.argv[1]),
)
"""
"""One registration."""


@pytest.fixture(scope="module")
def warp(brain, small, tmp_path_factory):
    template, image, mask, _ = brain
    folder = tmp_path_factory.mktemp("warp")
    return register(image, mask, template, to_mni305=START, contrast="T1w", folder=folder)


def errors_mm(warp, mask):
    """Errors of mapped points of the scan, without and with SyN."""
    inner = ndimage.binary_erosion(np.asarray(mask.dataobj) > 0, iterations=2)
    points = GRID.points_mm()[:, inner][:, ::37]
    truth = to_template(points)
    lps = np.array([[-1.0], [-1.0], [1.0]])
    back = sitk.ReadTransform(str(warp.from_template))  # maps points of the scan to the template
    result = lps * np.array([back.TransformPoint(point) for point in (lps * points).T]).T
    affine = POSE[:3, :3] @ points + POSE[:3, 3:]
    return (np.linalg.norm(guess - truth, axis=0).mean() for guess in (affine, result))


def test_a_known_deformation_is_undone(brain, warp):
    """With the affine alone, the errors equal the displacement by the deformation."""
    before, after = errors_mm(warp, brain[2])
    assert before > 4
    assert after < 0.4 * before


def test_the_two_transforms_are_inverse(warp):
    """As ITK reads them, without ANTs."""
    both = sitk.CompositeTransform(
        [sitk.ReadTransform(str(path)) for path in (warp.to_template, warp.from_template)]
    )
    for point in ((10.0, 20.0, 30.0), (-30.0, 15.0, 5.0)):
        np.testing.assert_allclose(both.TransformPoint(point), point, atol=1.0)


def test_nitransforms_reads_the_same_transform(warp):
    """At the nodes of the field; between them it interpolates by splines, and ITK linearly."""
    import nitransforms

    node = np.argwhere(ndimage.binary_erosion(np.ones(SHAPE), iterations=5))[::97]
    points = nib.affines.apply_affine(AFFINE, node)
    found = nitransforms.manip.load(warp.to_template, fmt="itk").map(points)
    ours = sitk.ReadTransform(str(warp.to_template))
    lps = np.array([-1.0, -1.0, 1.0])
    expected = [lps * ours.TransformPoint(lps * point) for point in points]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.abs(found - points).max() > 5


def test_with_one_thread_the_same_bytes_each_time(home, tmp_path):
    """In processes of their own: ITK reads the number of threads once, and other tests set it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        subprocess.run(
            [sys.executable, "-c", ONCE, str(tmp_path / folder)],
            check=True,
            env=os.environ
            | {
                "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
                "TEMPLATEFLOW_HOME": str(home),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_contrast_is_registered_by_mutual_information(brain, small, tmp_path):
    template, image, mask, _ = brain
    inside = np.asarray(mask.dataobj) > 0
    inverted = np.where(inside, 1200 - image.get_fdata(), 0).astype(np.float32)
    inverted = nib.Nifti1Image(inverted, AFFINE)
    warp = register(inverted, mask, template, to_mni305=START, contrast="T2w", folder=tmp_path)
    before, after = errors_mm(warp, mask)
    assert after < 0.6 * before
    assert (metric("T2w"), metric("T1w")) == (Metric.INFORMATION, Metric.CORRELATION)


def test_images_masks_and_labels_on_the_templates_grid(brain, warp):
    template, image, mask, labels = brain
    moved = {
        kind: resample_through(data, template, [warp.to_template], kind=kind)
        for kind, data in zip(
            (Kind.IMAGE, Kind.SPREAD, Kind.MASK, Kind.LABELS), (image, image, mask, labels),
            strict=True,
        )
    }  # fmt: skip
    for result in moved.values():
        assert result.shape == SHAPE
        np.testing.assert_allclose(result.affine, AFFINE)
        assert (int(result.header["sform_code"]), int(result.header["qform_code"])) == (4, 4)
    assert moved[Kind.MASK].get_data_dtype() == np.uint8
    assert moved[Kind.LABELS].get_data_dtype() == np.int16
    assert set(np.unique(moved[Kind.LABELS].dataobj)) == {0, 10, 17}
    there = np.asarray(moved[Kind.MASK].dataobj) > 0
    assert agreement(there, template) > 0.95
    for kind in (Kind.IMAGE, Kind.SPREAD):
        values = moved[kind].get_fdata()
        assert values.min() >= 0
        correlation = np.corrcoef(values[there], template.brain()[there])[0, 1]
        assert correlation > 0.9
    labelled = np.asarray(moved[Kind.LABELS].dataobj) > 0
    assert (labelled ^ there).sum() < 0.02 * there.sum()


def test_the_last_transform_is_next_to_the_image(brain, warp, tmp_path):
    """A contrast goes through its rigid transform to the T1w first."""
    template, image, *_ = brain
    shift = np.eye(4)
    shift[0, 3] = 7.0  # one voxel
    moved = nib.Nifti1Image(np.asarray(image.dataobj), shift @ AFFINE)
    path = write_itk_affine(tmp_path / "xfm.txt", np.linalg.inv(shift))
    direct = resample_through(image, template, [warp.to_template]).get_fdata()
    chained = resample_through(moved, template, [warp.to_template, path]).get_fdata()
    np.testing.assert_allclose(chained, direct, atol=1e-2 * direct.max())


def test_the_seed_is_set_only_meanwhile(monkeypatch):
    monkeypatch.delenv("ANTS_RANDOM_SEED", raising=False)
    with rescue.fixed_seed():
        assert os.environ["ANTS_RANDOM_SEED"] == rescue.SEED
    assert "ANTS_RANDOM_SEED" not in os.environ
    monkeypatch.setenv("ANTS_RANDOM_SEED", "7")
    with rescue.fixed_seed():
        pass
    assert os.environ["ANTS_RANDOM_SEED"] == "7"
