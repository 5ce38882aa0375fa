# SPDX-License-Identifier: Apache-2.0
"""Motion between the interleaves of a scan is found if it is present, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.interleave_fit import rms
from brainprior_bids.anatomy.interleaves import InterleaveMotion, find_interleave_motion
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid

FINE = Grid(
    (150, 170, 140), np.array([[1, 0, 0, -75], [0, 1, 0, -85], [0, 0, 1, -70], [0, 0, 0, 1.0]])
)
THICK = 5
POINTS = FINE.points_mm()
BRAIN = (POINTS[0] / 62) ** 2 + (POINTS[1] / 72) ** 2 + (POINTS[2] / 58) ** 2 < 1


TWO = np.stack([np.eye(4)] * 2)


def brain():
    """Two tissues with sharp borders, in folds of 30 and 12 mm, in an ellipsoid that fades. (The
    registration needs edges: with smooth blobs, three interleaves were off by 4 mm.)
    """
    noise = np.random.default_rng(0).normal(size=(2, *FINE.shape)).astype(np.float32)
    wide, narrow = (
        ndimage.gaussian_filter(one, mm / 2.355) for one, mm in zip(noise, (30, 12), strict=True)
    )
    folds = np.sign(wide / wide.std() + 0.5 * narrow / narrow.std())
    radius = np.sqrt((POINTS[0] / 66) ** 2 + (POINTS[1] / 76) ** 2 + (POINTS[2] / 62) ** 2)
    return ((100 + 40 * folds) * np.clip(5 * (1 - radius), 0, 1)).astype(np.float32)


def slabs(values, axis, thick):
    split = np.moveaxis(values, axis, 0)
    split = split[: len(split) // thick * thick]
    split = split.reshape(-1, thick, *split.shape[1:]).mean(1)
    return np.moveaxis(split, 0, axis)


def scanned(axis, *motions, thick=THICK):
    """Thick slices, each further interleave after a motion (reference mm -> its mm), and their
    geometry.
    """
    still, count = brain(), 1 + len(motions)
    scan = slabs(still, axis, thick)
    for p, motion in enumerate(motions, 1):
        late = slabs(resample(still, FINE, FINE, matrix=motion, order=1), axis, thick)
        np.moveaxis(scan, axis, 0)[p::count] = np.moveaxis(late, axis, 0)[p::count]
    affine = np.array(FINE.affine)
    affine[:3, 3] += affine[:3, axis] * (thick - 1) / 2
    affine[:3, axis] *= thick
    noise = np.random.default_rng(1).normal(0, 2, scan.shape)
    grid = Grid(scan.shape, affine)
    return np.abs(scan + noise).astype(np.float32), grid, Acquisition(axis, thick, thick)


def rigid(mm, degrees):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees)).as_matrix()
    matrix[:3, 3] = mm
    return matrix


def find(axis, *motions, lost=(), thick=THICK, stated=None):
    scan, grid, acquisition = scanned(axis, *motions, thick=thick)
    mask = slabs(BRAIN.astype(np.float32), axis, thick)
    for values in (scan, mask):
        np.moveaxis(values, axis, 0)[list(lost)] = 0
    acquisition = replace(acquisition, interleaves=stated)
    return find_interleave_motion(scan, np.zeros_like(scan), mask, grid, acquisition)


def distance(a, b):
    return rms(a, b, POINTS[:, BRAIN])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_motion_is_found_along_any_axis(axis):
    motion = rigid((2.0, -1.5, 1.5), (1.5, 2.0, -1.0))
    result = find(axis, motion)
    assert len(result.to_reference) == 2
    assert result.rms_mm == pytest.approx(3.6, abs=0.6)
    assert distance(result.to_reference[1], np.linalg.inv(motion)) < 0.8
    assert result.mismatch_ratio < 0.8
    assert result.moved
    moved = np.tensordot((np.linalg.inv(motion) - np.eye(4))[:3, :3], POINTS[:, BRAIN], 1)
    across = moved[axis] + np.linalg.inv(motion)[axis, 3]
    assert result.across_mm == pytest.approx(np.sqrt(np.mean(across**2)), abs=0.5)
    assert "2 packages of slices (every second slice)" in result.warnings[0]


SECOND, THIRD = rigid((2.0, -1.5, 1.5), (1.5, 2.0, -1.0)), rigid((-1.0, 2.0, 0.5), (-1.5, 0, 2))
FOURTH = rigid((1.0, 1.5, -1.0), (0, -2.0, -1.5))


@pytest.mark.parametrize(
    ("motions", "within_mm"), [((SECOND, THIRD), 0.6), ((SECOND, THIRD, FOURTH), 0.8)]
)
def test_the_number_of_interleaves_and_their_motions_are_found(motions, within_mm):
    result = find(2, *motions, thick=4)
    assert len(result.to_reference) == 1 + len(motions)
    np.testing.assert_array_equal(result.to_reference[0], np.eye(4))
    for found, motion in zip(result.to_reference[1:], motions, strict=True):
        assert distance(found, np.linalg.inv(motion)) < within_mm
    assert result.moved
    assert result.error_mm < within_mm


def test_the_number_of_interleaves_that_is_stated_is_used():
    """Two packages that did not move are as good as one: four explain what two do."""
    assert len(find(2, SECOND, thick=4).to_reference) == 2
    four = find(2, SECOND, thick=4, stated=4).to_reference
    assert len(four) == 4
    assert distance(four[1], four[3]) < 0.8
    assert find(2, SECOND, thick=4, stated=1) is None


def test_one_displaced_package_of_three_is_found():
    result = find(2, np.eye(4), THIRD, thick=4)
    still, displaced = result.to_reference[1:]
    assert distance(still, np.eye(4)) < 0.6
    assert distance(displaced, np.linalg.inv(THIRD)) < 0.6
    assert result.moved


@pytest.mark.parametrize(("axis", "lost"), [(0, ()), (2, ()), (2, (12,)), (1, (14, 15))])
def test_a_still_scan_is_left_alone(axis, lost):
    """Also for a scan with a lost slice."""
    result = find(axis, lost=lost)
    assert result.rms_mm < 0.15 * THICK
    assert result.mismatch_ratio > 0.97
    assert not result.moved, result
    assert result.warnings == []


def test_scans_without_interleaves_are_not_judged():
    scan, grid, _ = scanned(2)
    mask = slabs(BRAIN.astype(np.float32), 2, THICK)
    few = mask.copy()
    few[:, :, 9:] = 0
    acquisition = Acquisition(2, THICK, THICK)
    assert find_interleave_motion(scan, 0 * scan, few, grid, acquisition) is None
    fine = Grid(scan.shape, np.diag([5.0, 5.0, 5.0, 1.0]))  # a 3-D scan
    assert find_interleave_motion(scan, 0 * scan, mask, fine, acquisition) is None


@pytest.mark.parametrize(
    ("spacing", "in_plane", "across", "word"),
    [
        (4.0, 2.0, 1.5, None),
        (5.3, 1.4, 1.2, None),  # small, but mostly in the plane
        (4.0, 1.4, 2.2, None),  # a third of the spacing in the plane
        (4.0, 1.2, 2.2, "mostly across the slices"),
        (6.7, 2.5, 1.0, "5.5 mm apart"),
    ],
)
def test_only_a_motion_in_the_plane_is_corrected(spacing, in_plane, across, word):
    size = float(np.hypot(in_plane, across))
    motion = InterleaveMotion(TWO, size, 0.1, 0.6, spacing, across)
    assert (motion.obstacle or "") == "" if word is None else word in motion.obstacle


@pytest.mark.parametrize(
    ("count", "spacing", "corrected"),
    [(3, 5.3, True), (4, 4.0, True), (4, 5.3, False), (5, 2.7, False)],
)
def test_more_interleaves_are_corrected_where_the_gain_was_shown(count, spacing, corrected):
    motions = np.stack([np.eye(4)] * count)
    motion = InterleaveMotion(motions, 3.0, 0.1, 0.6, spacing, 1.0)
    assert (motion.obstacle is None) is corrected
    assert corrected or "four of 1 to 4.2 mm" in motion.obstacle


def test_a_motion_that_does_not_make_the_interleaves_alike_is_not_reported():
    """Both directions agree on it, as in sagittal slices of a symmetric brain."""
    found = InterleaveMotion(TWO, 4.6, 0.6, 1.0, 6.0)
    assert not found.moved
    assert replace(found, mismatch_ratio=0.6).moved
