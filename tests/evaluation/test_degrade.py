# SPDX-License-Identifier: Apache-2.0
"""Degradations: their effects, measured on the output."""

import numpy as np
import pytest

from brainprior_bids.engine.errors import GeometryError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import (
    PROFILES,
    Recipe,
    add_noise,
    averaging_weights,
    coarse_in_plane,
    degrade,
    smooth_field,
    thick_slices,
)

OBLIQUE = np.array(
    [[0.98, -0.17, 0.05, -30], [0.17, 0.98, 0.02, 12], [-0.05, -0.01, 1.0, 7], [0, 0, 0, 1]]
)


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_profiles_have_unit_width_at_half_maximum(profile):
    u = np.linspace(-2.5, 2.5, 5001)
    response = PROFILES[profile](u)
    assert response[2500] == pytest.approx(1)
    np.testing.assert_allclose(response, response[::-1], atol=1e-9)
    width = (response >= 0.5).sum() * (u[1] - u[0])
    assert width == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_weights_average_around_the_slice_centre(profile):
    weights = averaging_weights(60, 1.0, 5.0, 4.0, profile)
    assert weights.shape == (12, 60)
    np.testing.assert_allclose(weights.sum(1), 1)
    centres = weights @ (np.arange(60) + 0.5)
    np.testing.assert_allclose(centres[3:-3], (np.arange(12) + 0.5)[3:-3] * 5, atol=1e-9)


def test_a_boxcar_of_five_is_the_mean_of_five():
    data = np.random.default_rng(0).normal(size=(6, 25, 7)).astype(np.float32)
    grid = Grid(data.shape, OBLIQUE)
    thick, thick_grid = thick_slices(
        data, grid, axis=1, spacing_mm=5 * grid.spacing_mm[1], profile="boxcar"
    )
    np.testing.assert_allclose(thick, data.reshape(6, 5, 5, 7).mean(2), atol=1e-6)
    # voxel 2 along the axis is the middle of the first slice
    np.testing.assert_allclose(thick_grid.affine @ [0, 0, 0, 1], grid.affine @ [0, 2, 0, 1])
    np.testing.assert_allclose(thick_grid.affine @ [1, 1, 1, 1], grid.affine @ [1, 7, 1, 1])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_stays_at_its_place_in_mm(axis):
    grid = Grid((40, 40, 40), OBLIQUE)
    direction = np.array((0.3, -0.5, 0.8))
    ramp = np.tensordot(direction, grid.points_mm(), 1).astype(np.float32)
    thick, thick_grid = thick_slices(ramp, grid, axis=axis, spacing_mm=5.0, thickness_mm=4.0)
    thick, thick_grid = coarse_in_plane(thick, thick_grid, axis=axis, spacing_mm=1.6)
    expected = np.tensordot(direction, thick_grid.points_mm(), 1)
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(thick[inner], expected[inner], atol=0.05)
    others = np.delete(thick_grid.spacing_mm, axis)
    np.testing.assert_allclose(others, 40 / 25 * np.delete(grid.spacing_mm, axis))


def test_field_and_noise_have_the_stated_spread():
    grid = Grid((60, 70, 50), np.diag((3.0, 3.0, 3.0, 1.0)))
    field = smooth_field(grid, np.random.default_rng(2), sd=0.2)
    assert np.log(field).std() == pytest.approx(0.2, rel=1e-4)
    assert np.log(field).mean() == pytest.approx(0, abs=1e-5)
    assert np.abs(np.diff(np.log(field), axis=0)).max() < 0.06  # per 3 mm
    rng = np.random.default_rng(3)
    flat = np.full((60, 70, 50), 100, np.float32)
    assert add_noise(flat, rng, sd=5, rician=False).std() == pytest.approx(5, rel=0.01)
    empty = add_noise(0 * flat, rng, sd=5, rician=True)
    assert empty.min() >= 0
    assert empty.mean() == pytest.approx(5 * np.sqrt(np.pi / 2), rel=0.01)  # Rayleigh


def test_a_recipe_is_reproducible_and_its_parts_matter():
    grid = Grid((40, 44, 50), np.eye(4))
    rng = np.random.default_rng(4)
    data = (100 + 50 * rng.normal(size=grid.shape)).astype(np.float32)

    def run(**changes):
        return degrade(data, grid, Recipe(**changes), np.random.default_rng(5), unit=150.0)[0]

    base = run(noise_sd=0.0)
    assert base.shape == (40, 44, 10)
    np.testing.assert_array_equal(run(bias_sd=0.1), run(bias_sd=0.1))
    assert (run(noise_sd=0.02) - base).std() == pytest.approx(0.02 * 150, rel=0.02)
    for changes in (
        {"profile": "pulse"},
        {"width": 1.1},
        {"bias_sd": 0.1},
        {"thickness_mm": 4.0},
    ):
        assert np.abs(run(noise_sd=0.0, **changes) - base).max() > 1
    assert run(in_plane_mm=2.0).shape == (20, 22, 10)


def test_bad_recipes_are_refused():
    with pytest.raises(UsageError, match="profile must be one of"):
        averaging_weights(60, 1.0, 5.0, 5.0, "triangle")
    with pytest.raises(GeometryError, match="too few for a slice"):
        averaging_weights(3, 1.0, 5.0, 5.0, "boxcar")
    with pytest.raises(GeometryError, match="too few for a slice"):
        averaging_weights(60, 1.0, 5.0, 0.0, "boxcar")
