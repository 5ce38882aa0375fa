# SPDX-License-Identifier: Apache-2.0
"""Lesion masks: found by name, checked against scan and brain, dilated in mm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy.lesion import prepare_lesion, read_lesion
from brainprior_bids.bids.given import find_given
from brainprior_bids.bids.lesions import find_lesion, find_lesions_of_runs
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.settings import Settings

GRID = Grid((40, 40, 10), np.diag([1.0, 1.0, 4.0, 1.0]))
BRAIN = (np.square(GRID.points_mm() - 20).sum(0) < 15**2).astype(np.float32)
FINE = (np.square(GRID.one_millimetre().points_mm() - 20).sum(0) < 15**2).astype(np.uint8)


def block(*slices):
    lesion = np.zeros(GRID.shape, bool)
    lesion[slices] = True
    return lesion


def prepare(lesion, **options):
    return prepare_lesion(lesion, GRID, mask_1mm=FINE, mask_scan=BRAIN, **options)


def write(path, data, affine=GRID.affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)
    return path


def test_dilation_is_in_mm_and_stays_in_the_brain():
    lesion = block(slice(20, 21), slice(20, 21), slice(5, 6))
    wide = prepare(lesion, dilate_mm=4.0).hidden
    assert wide[24, 20, 5]
    assert not wide[25, 20, 5]
    assert wide[20, 20, 6]  # one slice of 4 mm
    assert not wide[20, 20, 7]
    everywhere = prepare(lesion, dilate_mm=14.0).hidden
    assert not everywhere[BRAIN == 0].any()
    np.testing.assert_array_equal(prepare(lesion).hidden > 0, lesion)


def test_a_lesion_that_the_brain_mask_leaves_out_is_added_to_it():
    lesion = block(slice(33, 39), slice(18, 22), slice(5, 6))
    result = prepare(lesion)
    assert result.mask_scan[lesion].all()
    assert result.mask_1mm[36, 20, 21]
    assert not result.measured[lesion].any()
    assert any("is inside the brain mask" in text for text in result.warnings)
    assert result.facts["volume_ml"] == pytest.approx(lesion.sum() * 4 / 1000)


def test_little_left_is_said_and_nothing_left_is_refused():
    assert prepare(block(slice(18, 22), slice(18, 22), slice(5, 6))).warnings == []
    (warning,) = prepare((BRAIN > 0) & block(slice(0, 20))).warnings
    assert "few measurements are left" in warning
    with pytest.raises(InputError, match="covers the whole brain"):
        prepare(BRAIN > 0)
    with pytest.raises(InputError, match="does not touch the brain"):
        prepare(block(slice(0, 2), slice(0, 2), slice(0, 1)))


def test_masks_on_another_grid_empty_or_broken_are_named(tmp_path):
    good = block(slice(18, 22), slice(18, 22), slice(5, 6))
    flipped = nib.Nifti1Image(good.astype(np.uint8), GRID.affine).as_reoriented(
        np.array([[1, -1], [0, 1], [2, 1]])
    )
    nib.save(flipped, tmp_path / "flipped.nii.gz")
    np.testing.assert_array_equal(read_lesion(tmp_path / "flipped.nii.gz", GRID), good)
    with pytest.raises(GeometryError, match="not on the scan's grid"):
        read_lesion(write(tmp_path / "small.nii.gz", good[:-1]), GRID)
    moved = GRID.affine.copy()
    moved[0, 3] += 0.5
    with pytest.raises(GeometryError, match=r"0\.5 mm apart"):
        read_lesion(write(tmp_path / "moved.nii.gz", good, moved), GRID)
    with pytest.raises(InputError, match="empty"):
        read_lesion(write(tmp_path / "empty.nii.gz", 0 * good), GRID)
    with pytest.raises(InputError, match="NaN"):
        read_lesion(write(tmp_path / "nan.nii.gz", np.where(good, np.nan, 0)), GRID)
    (tmp_path / "broken.nii.gz").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        read_lesion(tmp_path / "broken.nii.gz", GRID)


def scan(tmp_path, relative):
    path = PurePosixPath(relative)
    return Scan(tmp_path / "raw" / path, path, BIDSName.parse(path))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_masks_are_found_by_their_names(tmp_path):
    raw, other = tmp_path / "raw", tmp_path / "masks"
    settings = Settings(raw, tmp_path / "o", tmp_path / "w", derivatives={"masks": str(other)})
    t1w = scan(tmp_path, "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz")
    t2w = scan(tmp_path, "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz")
    touch(raw / "sub-01/ses-b/anat/sub-01_ses-b_label-lesion_roi.nii.gz")
    with pytest.raises(InputError, match="is of another session"):
        find_lesion(t1w, settings)
    roi = touch(raw / "sub-01/ses-a/anat/sub-01_ses-a_label-lesion_roi.nii.gz")
    touch(raw / "sub-01/ses-a/anat/sub-01_ses-a_run-2_label-lesion_roi.nii.gz")
    assert find_lesion(t1w, settings) == roi
    with pytest.raises(InputError, match="space-T2w"):  # drawn on the T1w
        find_lesion(t2w, settings)
    mask = touch(other / "sub-01/ses-a/anat/sub-01_ses-a_run-1_label-lesion_mask.nii.gz")
    assert find_lesion(t1w, settings) == mask
    on_t2w = touch(other / "sub-01/ses-a/anat/sub-01_ses-a_space-T2w_label-lesion_mask.nii")
    assert find_lesion(t2w, settings) == on_t2w
    touch(other / "sub-01/ses-a/anat/sub-01_ses-a_label-lesion_desc-2_mask.nii.gz")
    with pytest.raises(InputError, match="2 lesion masks match it"):
        find_lesion(t1w, settings)
    named = Settings(
        raw, tmp_path / "o", tmp_path / "w",
        lesion_mask="sub-{subject}/ses-{session}/anat/*_run-2_label-*_roi.nii.gz",
    )  # fmt: skip
    assert find_lesion(t1w, named).name == "sub-01_ses-a_run-2_label-lesion_roi.nii.gz"
    for number in range(2000):  # all of a disk, for example
        touch(tmp_path / f"many/{number:05d}.nii")
    with pytest.raises(InputError, match="2000 lesion masks match it") as caught:
        find_lesion(t1w, replace(named, lesion_mask=str(tmp_path / "many" / "*")))
    assert "00009.nii and 1990 more); one is needed." in str(caught.value)


def image(path, spacing_mm=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.diag([spacing_mm] * 3 + [1])), path)
    return path


def test_fused_runs_have_the_masks_that_are_theirs(tmp_path):
    """By name; a mask without run- belongs to the runs that have its grid."""
    raw = tmp_path / "raw"
    settings = Settings(raw, tmp_path / "o", tmp_path / "w", task="restore+inpaint", fuse="runs")
    runs = [scan(tmp_path, f"sub-01/anat/sub-01_run-{k}_T1w.nii.gz") for k in (1, 2, 3)]
    for run, spacing_mm in zip(runs, (1.0, 2.0, 1.0), strict=True):
        image(run.path, spacing_mm)
    with pytest.raises(InputError, match="None of the runs that are fused has one"):
        find_lesions_of_runs(runs, settings)
    second = image(raw / "sub-01/anat/sub-01_run-2_label-lesion_roi.nii.gz", 2.0)
    assert find_lesions_of_runs(runs, settings) == [None, second, None]
    given = find_given(replace(runs[0], runs=tuple(runs)), settings)
    assert [set(files) for files in given] == [set(), {"lesion"}, set()]
    with pytest.raises(InputError, match="run-1_T1w: it is the reference of the fused runs"):
        find_given(replace(runs[0], runs=tuple(runs)), replace(settings, task="inpaint"))
    second.unlink()
    shared = image(raw / "sub-01/anat/sub-01_label-lesion_roi.nii.gz")
    assert find_lesions_of_runs(runs, settings) == [shared, None, shared]
    image(shared, 3.0)  # on no run's grid: the step that reads it reports this for the first run
    assert find_lesions_of_runs(runs, settings) == [shared, None, None]


def test_another_tools_image_is_that_of_the_reference(tmp_path):
    raw, tool = tmp_path / "raw", tmp_path / "tool"
    settings = Settings(
        raw, tmp_path / "o", tmp_path / "w", task="restore+refine", fuse="runs", trust="0.1",
        derivatives={"tool": str(tool)},
    )  # fmt: skip
    runs = [scan(tmp_path, f"sub-01/anat/sub-01_run-{k}_T1w.nii.gz") for k in (1, 2)]
    touch(tool / "sub-01/anat/sub-01_run-2_desc-x_T1w.nii.gz")
    fused = replace(runs[0], runs=tuple(runs))
    with pytest.raises(InputError, match="no image to refine"):
        find_given(fused, settings)
    own = touch(tool / "sub-01/anat/sub-01_run-1_desc-x_T1w.nii.gz")
    assert [list(files) for files in find_given(fused, settings)] == [["refined"], []]
    assert find_given(fused, settings)[0]["refined"].path == own
