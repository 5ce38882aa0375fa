# SPDX-License-Identifier: Apache-2.0
"""Grids, acquisitions, and the box that is computed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.box import brain_box
from brainprior_bids.engine.errors import GeometryError
from brainprior_bids.engine.grids import MNI305, Grid

spacing = st.floats(0.3, 9.0)
size = st.integers(1, 60)


def oblique(spacings, flips, shift):
    """An affine with a rotation, voxel sizes, flipped axes and an origin."""
    angle = 0.4
    c, s = math.cos(angle), math.sin(angle)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(spacings) * np.array(flips)
    affine[:3, 3] = shift
    return affine


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(size, size, size),
    spacings=st.tuples(spacing, spacing, spacing),
    flips=st.tuples(*(st.sampled_from([1, -1]) for _ in range(3))),
    shift=st.tuples(*(st.floats(-100, 100) for _ in range(3))),
)
def test_the_1_mm_grid_has_the_edges_of_the_scan(shape, spacings, flips, shift):
    grid = Grid(shape, oblique(spacings, flips, shift))
    np.testing.assert_allclose(grid.spacing_mm, spacings, rtol=1e-9)
    fine = grid.one_millimetre()
    np.testing.assert_allclose(fine.extent_mm, grid.extent_mm, rtol=1e-9)
    for edge, fine_edge in (
        (np.full(3, -0.5), np.full(3, -0.5)),
        (np.array(grid.shape) - 0.5, np.array(fine.shape) - 0.5),
    ):
        here = grid.affine @ np.append(edge, 1)
        there = fine.affine @ np.append(fine_edge, 1)
        np.testing.assert_allclose(here, there, atol=1e-6)
    assert all(n == max(1, round(e)) for n, e in zip(fine.shape, grid.extent_mm, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    spacings=st.tuples(spacing, spacing, spacing),
    voxel=st.tuples(*(st.floats(-50, 50) for _ in range(3))),
)
def test_voxel_to_mm_and_back(spacings, voxel):
    grid = Grid((3, 4, 5), oblique(spacings, (1, -1, 1), (3, 4, 5)))
    mm = grid.affine @ np.append(voxel, 1)
    np.testing.assert_allclose((np.linalg.inv(grid.affine) @ mm)[:3], voxel, atol=1e-8)


def test_points_and_crop():
    grid = Grid((5, 6, 7), oblique((1, 2, 3), (1, 1, -1), (10, -20, 30)))
    to = oblique((1.1, 0.9, 1), (1, 1, 1), (1, 2, 3))
    points = grid.points_mm(to)
    assert points.shape == (3, 5, 6, 7)
    expected = to @ grid.affine @ np.array([2, 3, 4, 1])
    np.testing.assert_allclose(points[:, 2, 3, 4], expected[:3], rtol=1e-5)
    part = grid.crop((1, 2, 3), (4, 6, 7))
    assert part.shape == (3, 4, 4)
    np.testing.assert_allclose(part.points_mm(), grid.points_mm()[:, 1:4, 2:6, 3:7], atol=1e-4)
    assert grid != part
    assert grid == Grid(grid.shape, grid.affine + 1e-9)
    np.testing.assert_allclose(MNI305.affine @ [0, 0, 0, 1], [-90, -126, -72, 1])


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 1), (2, -1, 2)])
def test_a_grid_needs_three_positive_sizes(shape):
    with pytest.raises(GeometryError, match="three positive integers"):
        Grid(shape, np.eye(4))


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_a_grid_needs_a_sound_affine(affine):
    with pytest.raises(GeometryError, match="affine"):
        Grid((1, 1, 1), affine)


def test_acquisition_goes_through_a_mapping():
    acquisition = Acquisition(2, 4.0, 5.5, "boxcar")
    assert acquisition.gap_mm == pytest.approx(1.5)
    assert Acquisition.from_dict({**acquisition.to_dict(), "other": 1}) == acquisition


def test_a_measured_profile_stands_in_for_a_named_one():
    """A trapezoid written out: the same weights, through JSON as well."""
    named = Acquisition(2, 4.0, 5.0)
    pairs = [[-3.2, 0.0], [-0.8, 7.0], [0.8, 7.0], [3.2, 0.0]]
    measured = Acquisition(2, 4.0, 5.0, pairs)
    again = Acquisition.from_dict(json.loads(json.dumps(measured.to_dict())))
    assert again == measured
    at = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(again.cumulative()(at), named.cumulative()(at))
    wider = Acquisition(2, 4.4, 5.0).cumulative()(at)
    for acquisition in (named, measured):
        torch.testing.assert_close(acquisition.cumulative(1.1)(at), wider)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((3, 1.0, 1.0), "slice_axis"),
        ((0, 0.0, 1.0), "thickness_mm"),
        ((0, 1.0, -2.0), "spacing_mm"),
        ((0, float("nan"), 1.0), "thickness_mm"),
        ((0, 1.0, 1.0, "triangle"), "profile must be one of"),
        ((0, 1.0, 1.0, (1.0, 2.0)), "pairs of"),
        ((0, 1.0, 1.0, ((0.0, 1.0), (0.0, 1.0))), "distances must rise"),
    ],
)
def test_acquisition_refuses_nonsense(values, text):
    with pytest.raises(GeometryError, match=text):
        Acquisition(*values)


@settings(max_examples=150, deadline=None)
@given(
    n=st.tuples(*(st.integers(20, 90) for _ in range(3))),
    data=st.tuples(*(st.integers(8, 90) for _ in range(3))),
    axis=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 1000),
)
def test_the_box_covers_the_brain_and_stays_commensurate(n, data, axis, seed):
    data = tuple(min(m, k) for m, k in zip(data, n, strict=True))
    rng = np.random.default_rng(seed)
    mask = np.zeros(n, bool)
    corner = [int(rng.integers(0, k - 4)) for k in n]
    mask[corner[0] : corner[0] + 4, corner[1] : corner[1] + 3, corner[2] : corner[2] + 2] = True
    box = brain_box(mask, data, axis, margin=5, multiple=16)
    assert mask[box.image_slices].sum() == mask.sum()
    for a in range(3):
        assert 0 <= box.start[a] < box.stop[a] <= n[a]
        assert 0 <= box.data_start[a] < box.data_stop[a] <= data[a] or a == axis
        inside = np.flatnonzero(mask.any(tuple(b for b in range(3) if b != a)))
        assert box.start[a] <= max(inside[0] - 5, 0)
        assert box.stop[a] >= min(inside[-1] + 6, n[a])
        if a == axis:  # the slices whose centre lies in the box, and no other
            centres = (np.arange(data[a]) + 0.5) * n[a] / data[a]
            kept = (centres >= box.start[a]) & (centres < box.stop[a])
            assert list(np.flatnonzero(kept)) == list(range(box.data_start[a], box.data_stop[a]))
        else:  # both grids have an edge where the box begins and ends
            assert box.start[a] * data[a] == box.data_start[a] * n[a]
            assert box.stop[a] * data[a] == box.data_stop[a] * n[a]


def test_the_box_is_a_fraction_of_a_real_field_of_view():
    """1.33 mm over 256 mm: steps of 4 image voxels, 3 data voxels."""
    mask = np.zeros((160, 256, 256), bool)
    mask[20:150, 60:210, 70:190] = True
    box = brain_box(mask, (160, 192, 192), 0)
    assert box.shape == (160, 176, 144)
    assert box.data_shape == (160, 132, 108)
