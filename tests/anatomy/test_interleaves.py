# SPDX-License-Identifier: Apache-2.0
"""Motion between even and odd slices is detected if it is present, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

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


def brain():
    """Blobs of 12 mm in a bright ellipsoid."""
    noise = np.random.default_rng(0).normal(size=FINE.shape).astype(np.float32)
    blobs = ndimage.gaussian_filter(noise, 12 / 2.355)
    return np.where(BRAIN, 100 + 20 * blobs / blobs.std(), 0).astype(np.float32)


def slabs(values, axis):
    split = np.moveaxis(values, axis, 0)
    split = split.reshape(-1, THICK, *split.shape[1:]).mean(1)
    return np.moveaxis(split, 0, axis)


def scanned(axis, motion):
    """Slices of 5 mm, the odd ones after a motion (reference mm -> their mm); their geometry."""
    still = brain()
    moved = resample(still, FINE, FINE, matrix=motion, order=1)
    scan, late = slabs(still, axis), slabs(moved, axis)
    np.moveaxis(scan, axis, 0)[1::2] = np.moveaxis(late, axis, 0)[1::2]
    affine = np.array(FINE.affine)
    affine[:3, 3] += affine[:3, axis] * (THICK - 1) / 2
    affine[:3, axis] *= THICK
    noise = np.random.default_rng(1).normal(0, 2, scan.shape)
    grid = Grid(scan.shape, affine)
    return np.abs(scan + noise).astype(np.float32), grid, Acquisition(axis, THICK, THICK)


def rigid(mm, degrees):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees)).as_matrix()
    matrix[:3, 3] = mm
    return matrix


def find(axis, motion, lost=()):
    scan, grid, acquisition = scanned(axis, motion)
    mask = slabs(BRAIN.astype(np.float32), axis)
    for values in (scan, mask):
        np.moveaxis(values, axis, 0)[list(lost)] = 0
    return find_interleave_motion(scan, np.zeros_like(scan), mask, grid, acquisition)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_motion_is_found_along_any_axis(axis):
    motion = rigid((2.0, -1.5, 1.5), (1.5, 2.0, -1.0))
    result = find(axis, motion)
    apart = (result.to_reference @ motion - np.eye(4))[:3]
    error = np.tensordot(apart[:, :3], POINTS[:, BRAIN], 1) + apart[:, 3:]
    rms = float(np.sqrt(np.mean(np.sum(error**2, axis=0))))
    assert result.rms_mm == pytest.approx(3.6, abs=0.6)
    assert rms < 0.8
    assert result.mismatch_ratio < 0.8
    assert result.moved
    moved = np.tensordot((np.linalg.inv(motion) - np.eye(4))[:3, :3], POINTS[:, BRAIN], 1)
    across = moved[axis] + np.linalg.inv(motion)[axis, 3]
    assert result.across_mm == pytest.approx(np.sqrt(np.mean(across**2)), abs=0.5)
    assert "moved between the interleaves" in result.warnings[0]


@pytest.mark.parametrize(("axis", "lost"), [(0, ()), (2, ()), (2, (12,)), (1, (14, 15))])
def test_a_still_scan_is_left_alone(axis, lost):
    """Also for a scan with a lost slice."""
    result = find(axis, np.eye(4), lost)
    assert result.rms_mm < 0.15 * THICK
    assert result.mismatch_ratio > 0.9
    assert not result.moved, result
    assert result.warnings == []


def test_scans_without_interleaves_are_not_judged():
    scan, grid, _ = scanned(2, np.eye(4))
    mask = slabs(BRAIN.astype(np.float32), 2)
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
    rms = float(np.hypot(in_plane, across))
    motion = InterleaveMotion(np.eye(4), rms, 0.1, 0.6, spacing, across)
    assert (motion.obstacle or "") == "" if word is None else word in motion.obstacle


def test_a_motion_that_does_not_make_the_interleaves_alike_is_not_reported():
    """Both directions agree on it, as in sagittal slices of a symmetric brain."""
    found = InterleaveMotion(rigid((4.0, 0, 0), (0, 0, 4.0)), 4.6, 0.6, 1.0, 6.0)
    assert not found.moved
    assert replace(found, mismatch_ratio=0.6).moved
