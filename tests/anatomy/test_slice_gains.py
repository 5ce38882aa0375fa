# SPDX-License-Identifier: Apache-2.0
"""Slice gains are detected if they were simulated, and only then.

The bounds are the measured values (``docs/tasks/restore.md``) with a margin.
"""

import nibabel as nib
import numpy as np
import pytest

from brainprior_bids.anatomy.slice_gains import find_slice_gains, fit_gains, slice_steps
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade, thick_slices


def phantom(axis, spacing_mm=5.0, noise=2.0):
    """Folded shells of two tissues, 2 % noise, a head of 120 x 150 x 110 mm; slices along axis."""
    spacing = [1.5, 1.5, 1.5]
    spacing[axis] = spacing_mm
    shape = tuple(int(n) for n in np.round(np.array((150, 180, 140)) / spacing))
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*mm, indexing="ij")
    radius = np.sqrt((x / 60) ** 2 + (y / 75) ** 2 + (z / 55) ** 2)
    mask = (radius < 1).astype(np.float32)
    folded = radius + 0.08 * np.sin(x / 5) * np.sin(y / 5) * np.sin(z / 6)
    tissue = np.where(folded < 0.75, 100.0, 65.0) * mask
    values = tissue + np.random.default_rng(1).normal(0, noise, shape)
    return values.astype(np.float32), mask, Grid(shape, np.diag([*spacing, 1.0]))


def with_gains(values, log_gains, axis):
    shape = [1, 1, 1]
    shape[axis] = len(log_gains)
    return (values * np.exp(np.reshape(log_gains, shape))).astype(np.float32)


def find(values, mask, grid, axis, log_bias=None):
    spacing = float(grid.spacing_mm[axis])
    bias = np.zeros(grid.shape) if log_bias is None else log_bias
    return find_slice_gains(values, mask, bias, grid, Acquisition(axis, spacing, spacing))


def odd(n, factor):
    return np.where(np.arange(n) % 2 == 1, np.log(factor), 0.0)


def stripes(log_gains, result):
    """RMS of the second difference at the slices that were compared."""
    at = np.flatnonzero(result.compared)
    steps = log_gains[at] - (log_gains[at - 1] + log_gains[at + 1]) / 2
    return float(np.sqrt(np.mean(steps**2)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.02, 1.05, 1.10])
def test_an_alternation_is_found_on_each_axis(axis, factor):
    values, mask, grid = phantom(axis)
    gains = odd(grid.shape[axis], factor)
    result, warnings = find(with_gains(values, gains, axis), mask, grid, axis)
    assert warnings == []
    assert result.applied
    assert -result.alternation == pytest.approx(np.log(factor) / 2, abs=0.002)
    assert stripes(gains - result.log_gains, result) < 0.004
    assert result.along(axis).shape == tuple(
        n if a == axis else 1 for a, n in enumerate(grid.shape)
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_without_gains_nothing_changes(axis):
    values, mask, grid = phantom(axis)
    result, warnings = find(values, mask, grid, axis)
    assert warnings == []
    assert not result.applied
    np.testing.assert_array_equal(result.log_gains, 0)
    assert abs(result.alternation) < 0.002


@pytest.mark.parametrize("sd", [0.02, 0.05])
def test_random_gains_are_found(sd):
    values, mask, grid = phantom(2)
    gains = np.random.default_rng(3).normal(0, sd, grid.shape[2])
    result, _ = find(with_gains(values, gains, 2), mask, grid, 2)
    assert result.gain_sd > 0
    assert stripes(gains - result.log_gains, result) < 0.5 * stripes(gains, result)


def test_a_smooth_change_stays_with_the_bias_field():
    values, mask, grid = phantom(2)
    slow = 0.2 * np.sin(np.arange(grid.shape[2]) / 5)
    result, _ = find(with_gains(values, slow, 2), mask, grid, 2)
    assert not result.applied


def test_the_bias_field_is_divided_out_first():
    values, mask, grid = phantom(2)
    field = np.broadcast_to(odd(grid.shape[2], 1.1), grid.shape)
    result, _ = find(values * np.exp(field), mask, grid, 2, log_bias=field)
    assert not result.applied


def test_a_lost_slice_leaves_the_others_alone():
    values, mask, grid = phantom(2)
    n = grid.shape[2]
    gains = odd(n, 1.05)
    whole, _ = find(with_gains(values, gains, 2), mask, grid, 2)
    for left in (0.0, 0.4):  # of the signal
        lost = with_gains(values, gains, 2)
        lost[:, :, n // 2] *= left
        result, warnings = find(lost, mask, grid, 2)
        assert warnings == []
        assert result.compared.sum() < whole.compared.sum()
        np.testing.assert_allclose(result.log_gains, whole.log_gains, atol=0.003)
    values[:, :, n // 2] = 0
    result, _ = find(values, mask, grid, 2)
    assert not result.applied


def test_3d_scans_and_too_few_slices_have_none():
    values, mask, grid = phantom(2, spacing_mm=1.5)
    assert find(values, mask, grid, 2) == (None, [])
    values, mask, grid = phantom(2, spacing_mm=20.0)
    result, (warning,) = find(values, mask, grid, 2)
    assert result is None
    assert "slices can be compared" in warning
    result, warnings = find(values, np.zeros_like(mask), grid, 2)
    assert result is None
    assert len(warnings) == 1


def test_arrays_must_lie_on_the_grid():
    values, mask, grid = phantom(2)
    with pytest.raises(ShapeMismatchError, match="mask on the grid"):
        find(values, mask[:-1], grid, 2)


def test_the_error_of_a_step_covers_its_scatter():
    """e of pure noise is not far from the SD of r (a median over blocks: 1.25 / sqrt(n))."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.02, (30, 100, 100))).astype(np.float32)
    steps = slice_steps(values, np.ones_like(values), in_plane_mm=(1.5, 1.5))
    ratio = np.sqrt(np.mean(steps.r[steps.used] ** 2)) / np.sqrt(np.mean(steps.e[steps.used] ** 2))
    assert 0.6 < ratio < 1.5
    assert not fit_gains(steps).applied


def thick(path, axis, spacing_mm):
    """A 3-D brain averaged to thick slices with 1 % noise: a scan that has no slice gains."""
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    grid = Grid(data.shape, image.affine)
    recipe = Recipe(axis=axis, spacing_mm=spacing_mm, thickness_mm=spacing_mm, noise_sd=0.01)
    values, thick_grid = degrade(data, grid, recipe, np.random.default_rng(1), unit=240.0)
    share, _ = thick_slices(
        (data > 0).astype(np.float32),
        grid,
        axis=axis,
        spacing_mm=spacing_mm,
        thickness_mm=spacing_mm,
        profile="trapezoid",
    )
    return values, np.clip(share, 0, 1), thick_grid


@pytest.mark.shared
@pytest.mark.parametrize(("axis", "spacing_mm"), [(2, 5.0), (2, 3.0), (1, 5.0), (0, 5.0)])
@pytest.mark.parametrize(
    "name",
    [
        "brains/sub-04_desc-brain_T1w",
        "brains/sub-57_desc-brain_T1w",
        "clinical/sub-c02_desc-brain_T2w",
    ],
)
def test_real_brains(shared_data, name, axis, spacing_mm):
    values, mask, grid = thick(shared_data / f"{name}.nii.gz", axis, spacing_mm)
    n = grid.shape[axis]
    assert not find(values, mask, grid, axis)[0].applied
    for factor in (1.02, 1.05, 1.10):
        gains = odd(n, factor)
        result, _ = find(with_gains(values, gains, axis), mask, grid, axis)
        assert -result.alternation == pytest.approx(np.log(factor) / 2, abs=0.003)
        assert stripes(gains - result.log_gains, result) < 0.006
    gains = np.random.default_rng(5).normal(0, 0.05, n)
    result, _ = find(with_gains(values, gains, axis), mask, grid, axis)
    assert stripes(gains - result.log_gains, result) < 0.8 * stripes(gains, result)
