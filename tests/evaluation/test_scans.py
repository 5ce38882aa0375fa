# SPDX-License-Identifier: Apache-2.0
"""Whole-scan evaluation: its data set, its calls of the command, and its use of the results.

The command itself is replaced by one that writes the truth, so that a perfect restoration must
be rated perfect, on the right voxels, and a failing one must be reported.
"""

from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainprior_bids.bids.names import BIDSName, output_names
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation import picture
from brainprior_bids.evaluation.metrics import matching_field
from brainprior_bids.evaluation.scans import Volume, read_output, run_command


def a_brain(shape, spacing, *, rough=2.5, size=1.0):
    """A folded, smooth-walled ellipsoid of two tissues; 0 outside; (data, inside)."""
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*mm, indexing="ij")
    radius = np.sqrt((x / 46) ** 2 + (y / 55) ** 2 + (z / 42) ** 2) / size
    folded = radius + 0.1 * np.sin(x / 4) * np.sin(y / 5) * np.sin(z / 4)
    tissue = np.where(folded < 0.75, 200.0, 120.0)
    smooth = ndimage.gaussian_filter(tissue, [rough / s for s in spacing])
    inside = radius < 1
    return np.where(inside, smooth, 0).astype(np.float32), inside


def answer(truth, inside, *, noise=0.0):
    """A command that writes ``truth`` (a Volume) as the restored image of sub-01."""

    def command(bids_dir, output_dir, options):
        scans = sorted(bids_dir.glob("sub-*/anat/*.nii.gz"))
        assert len(scans) == 1
        name = scans[0].name.removesuffix(".nii.gz")
        anat = output_dir / name.partition("_")[0] / "anat"
        anat.mkdir(parents=True)
        rng = np.random.default_rng(0)
        data = truth.data + noise * rng.normal(size=truth.data.shape) * inside
        affine = np.array(truth.grid.affine)
        files = output_names(BIDSName.parse(scans[0].name), n_samples=4)
        for role, values in (("restored", 3 * data), ("uncertainty", 0.1 * data)):
            nib.save(nib.Nifti1Image(values.astype(np.float32), affine), anat / files[role])
        command.asked.append((output_dir.name, list(options)))

    command.asked = []
    return command


def test_a_smooth_factor_is_taken_away_and_nothing_else():
    data, inside = a_brain((50, 60, 40), (2.0, 2.0, 2.5))
    i, j, k = (np.linspace(-1, 1, n) for n in data.shape)
    factor = 1.5 + 0.3 * i[:, None, None] - 0.2 * j[:, None] ** 2 + 0.1 * k * i[:, None, None]
    field = matching_field(data, data * factor.astype(np.float32), inside)
    np.testing.assert_allclose(field[inside], factor[inside], rtol=1e-4)
    assert (field[~inside] == 1).all()


def test_a_failing_command_is_reported_with_its_last_words(tmp_path):
    with pytest.raises(BrainpriorError, match=r"exited with status 2(.|\n)*nowhere"):
        run_command(tmp_path / "nowhere", tmp_path / "out", [])


def test_names_of_the_outputs(tmp_path):
    grid = Grid((4, 5, 6), np.diag((1.0, 2.0, 3.0, 1.0)))
    anat = tmp_path / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for i, file in enumerate(
        (
            "sub-01_desc-restored_T2w.nii.gz",
            "sub-01_space-T2w_desc-brain_mask.nii.gz",
            "sub-01_desc-brain_mask.nii.gz",
            "sub-01_mod-T1w_desc-restored_uncertainty.nii.gz",
        )
    ):
        values = np.full(grid.shape, i, np.float32)
        nib.save(nib.Nifti1Image(values, np.array(grid.affine)), anat / file)
    assert read_output(tmp_path, "sub-01_T2w").data.max() == 0
    assert read_output(tmp_path, "sub-01_T2w", role="mask").data.max() == 1
    assert read_output(tmp_path, "sub-01_T1w", role="mask").data.max() == 2
    assert read_output(tmp_path, "sub-01_T1w", role="uncertainty").data.max() == 3
    assert read_output(tmp_path, "sub-01_T2w").grid == grid


def test_the_picture_of_a_known_answer(tmp_path, monkeypatch, capsys):
    data, inside = a_brain((52, 62, 48), (1.0, 1.0, 1.0), size=0.54)
    grid = Grid(data.shape, np.eye(4))
    brain = tmp_path / "brain.nii.gz"
    nib.save(nib.Nifti1Image(data, np.array(grid.affine)), brain)
    command = answer(Volume(data, grid), inside)
    monkeypatch.setattr(picture, "run_command", command)
    out = tmp_path / "docs" / "before_after.png"
    work = tmp_path / "work"
    arguments = [str(brain), str(out), "--caption", "nobody", "--work", str(work), "--nprocs", "1"]
    assert picture.main(arguments) == 0
    assert all(options[3:5] == ["--nprocs", "1"] for _, options in command.asked)
    thick = nib.load(work / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    assert thick.shape == (72, 82, 14)
    printed = capsys.readouterr().out
    assert [line.split("\t")[0] for line in printed.splitlines()] == [
        "cubic",
        "mean of samples",
        "single sample",
    ]
    parts = [line.replace("\t", " ").split() for line in printed.splitlines()]
    cubic, restored = (float(line[line.index("psnr_db") + 1]) for line in parts[:2])
    assert restored > cubic + 3
    drawn = matplotlib.image.imread(out)
    assert drawn.shape[1] == pytest.approx(5 * 2.2 * 90, abs=2)
    assert Path(out).stat().st_size < 400_000


def test_the_picture_wants_one_millimetre_voxels(tmp_path, capsys):
    data, _ = a_brain((40, 50, 40), (2.5, 2.5, 2.5))
    nib.save(nib.Nifti1Image(data, np.diag((2.5, 2.5, 2.5, 1))), tmp_path / "brain.nii")
    rest = [str(tmp_path / "o.png"), "--caption", "nobody"]
    assert picture.main([str(tmp_path / "brain.nii"), *rest]) == 2
    assert "expected voxels of 1 mm" in capsys.readouterr().err
    assert picture.main([str(tmp_path / "none.nii"), *rest]) == 1
