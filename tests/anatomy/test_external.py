# SPDX-License-Identifier: Apache-2.0
"""Masks and labels from other sources: recognised, corrected or refused; failing programs."""

import os

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy import external
from brainprior_bids.engine.errors import AnatomyError, GeometryError, InputError
from brainprior_bids.engine.grids import Grid

SHAPE = (80, 90, 80)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
GRID = Grid(SHAPE, AFFINE)


def ball(radii, at=(40, 45, 40)):
    i, j, k = np.indices(SHAPE)
    return ((i - at[0]) / radii[0]) ** 2 + ((j - at[1]) / radii[1]) ** 2 + (
        (k - at[2]) / radii[2]
    ) ** 2 < 1


IMAGE = nib.Nifti1Image(np.random.default_rng(0).random(SHAPE, np.float32), AFFINE)
BRAIN = ball((30, 36, 28))


def scan(*, stripped, background=0.0):
    rng = np.random.default_rng(0)
    data = np.where(BRAIN, 500 + 100 * rng.random(SHAPE), background)
    if not stripped:
        data[ball((37, 43, 35)) & ~BRAIN] = 300
        data += np.abs(rng.normal(0, 5, SHAPE))
    return nib.Nifti1Image(data.astype(np.float32), AFFINE)


@pytest.mark.parametrize("background", [0.0, -1000.0])
def test_a_stripped_scan_is_recognised_and_a_head_is_not(background):
    result = external.stripped_edge(scan(stripped=True, background=background), BRAIN * 1.0)
    np.testing.assert_array_equal(result, BRAIN)
    assert external.stripped_edge(scan(stripped=False), BRAIN * 1.0) is None


def test_a_head_with_an_emptied_background_is_not_a_stripped_scan():
    head = scan(stripped=False).get_fdata(dtype=np.float32)
    head[~ball((37, 43, 35))] = 0  # as after defacing
    image = nib.Nifti1Image(head, AFFINE)
    assert external.own_edge(image)[1] == 1.0
    assert external.stripped_edge(image, BRAIN * 1.0) is None


def test_a_mask_is_mended_aloud_and_doubted():
    damaged = BRAIN.copy()
    damaged[38:43, 40:46, 38:43] = False
    damaged[2:8, 2:8, 2:8] = True
    mended, warnings = external.checked_mask(damaged, GRID, source="x", network_mask=BRAIN)
    np.testing.assert_array_equal(mended, BRAIN)
    assert len(warnings) == 2
    assert "separate parts" in warnings[0]
    assert "holes" in warnings[1]
    _, doubted = external.checked_mask(
        BRAIN, GRID, source="x", network_mask=np.roll(BRAIN, 12, axis=1)
    )
    assert "disagree" in doubted[0]
    with pytest.raises(AnatomyError, match="expected 150 to"):
        external.checked_mask(ball((5, 5, 5)), GRID, source="x")


def test_a_mask_file_on_another_grid(tmp_path):
    coarse = nib.Nifti1Image(
        BRAIN.reshape(40, 2, 45, 2, 40, 2).mean((1, 3, 5)).round().astype(np.uint8),
        AFFINE @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]]),
    )
    nib.save(coarse, tmp_path / "m.nii.gz")
    result = external.mask_from_file(tmp_path / "m.nii.gz", GRID, name="sub-01")
    assert 2 * (result & BRAIN).sum() / (result.sum() + BRAIN.sum()) > 0.97
    elsewhere = Grid(SHAPE, AFFINE + np.array([[0, 0, 0, 150.0]] + [[0] * 4] * 3))
    with pytest.raises(InputError, match="in this scan's space"):
        external.mask_from_file(tmp_path / "m.nii.gz", elsewhere, name="sub-01")
    (tmp_path / "bad.nii").write_text("no image")
    with pytest.raises(InputError, match="cannot be read"):
        external.mask_from_file(tmp_path / "bad.nii", GRID, name="sub-01")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), tmp_path / "zero.nii")
    with pytest.raises(InputError, match="not empty"):
        external.mask_from_file(tmp_path / "zero.nii", GRID, name="sub-01")
    nib.save(nib.Nifti1Image(BRAIN.astype(np.uint8), None), tmp_path / "nowhere.nii")
    with pytest.raises(GeometryError, match="neither sform nor qform"):
        external.mask_from_file(tmp_path / "nowhere.nii", GRID, name="sub-01")


def labelled():
    labels = np.where(BRAIN, 2, 0)
    labels[41:][BRAIN[41:]] = 41
    labels[ball((32, 38, 30)) & ~ball((26, 32, 24)) & BRAIN] = 1012
    for value, at in ((10, (32, 45, 40)), (49, (48, 45, 40)), (12, (26, 50, 40)),
                      (51, (54, 50, 40)), (16, (40, 35, 25)), (253, (40, 45, 50))):  # fmt: skip
        labels[ball((4, 4, 4), at)] = value
    return labels.astype(np.int32)


def test_freesurfers_labels_become_ours(tmp_path):
    nib.save(nib.Nifti1Image(labelled(), AFFINE), tmp_path / "aparc.nii.gz")
    result = external.labels_from_file(tmp_path / "aparc.nii.gz", GRID, name="sub-01")
    assert set(np.unique(result)) == {0, 2, 3, 10, 12, 16, 41, 49, 51}
    assert set(np.unique(result[ball((3, 3, 3), (40, 45, 50))])) <= {2, 41}  # corpus callosum
    tissue = np.where(BRAIN, 2, 0).astype(np.int16)
    nib.save(nib.Nifti1Image(tissue, AFFINE), tmp_path / "tissue.nii.gz")
    with pytest.raises(InputError, match="inner structures"):
        external.labels_from_file(tmp_path / "tissue.nii.gz", GRID, name="sub-01")


def test_labels_and_mask_are_put_together():
    labels = np.where(labelled() == 1012, 3, labelled())
    labels[labels == 253] = 2
    result = external.assemble(
        labels, ball((32, 38, 30)), {10: 0.5}, image=IMAGE, restored_grid=GRID
    )
    shell = ball((32, 38, 30)) & ~BRAIN
    assert (result.structures[shell] == 24).all()
    assert not result.structures[~ball((32, 38, 30))].any()
    rows = {row["index"]: row for row in result.table}
    assert rows[10]["confidence"] == 0.5
    assert rows[49]["confidence"] == 1.0
    np.testing.assert_allclose(rows[10]["centroid_mm"], [64, 90, 80], atol=0.5)
    assert rows[10]["cut_share"] == 0
    np.testing.assert_allclose(result.mask_scan, result.mask, atol=1e-6)
    with pytest.raises(AnatomyError, match="belong to this scan"):
        external.assemble(
            labels, np.roll(BRAIN, 60, 0) & (labels == 0), {}, image=IMAGE, restored_grid=GRID
        )


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_other_programs_are_called_and_their_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    image, mask = tmp_path / "scan.nii", tmp_path / "mask.nii"
    with pytest.raises(InputError, match="nipreps-synthstrip"):
        external.synthstrip_command(image, mask, model=None, threads=1, cuda=False)
    program(tmp_path, "nipreps-synthstrip", "echo weights are damaged >&2; exit 3")
    command = external.synthstrip_command(image, mask, model=image, threads=2, cuda=True)
    assert command[0] == "nipreps-synthstrip"
    assert "-g" in command
    with pytest.raises(AnatomyError, match=r"ended with 3 and no output.*weights are damaged"):
        external.run_program(command, mask)
    program(tmp_path, "mri_synthseg", 'cp "$2" "$4"')
    image.write_text("labels")
    command = external.synthseg_command(image, mask, threads=1, cuda=False)
    assert command[-1] == "--cpu"
    assert external.run_program(command, mask)["program"] == str(tmp_path / "mri_synthseg")
    assert mask.read_text() == "labels"
    with pytest.raises(AnatomyError, match="cannot be run"):
        external.run_program([str(tmp_path / "nowhere")], mask)
