# SPDX-License-Identifier: Apache-2.0
"""Baselines against slow or dense versions of themselves."""

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.baselines import interpolate, tikhonov, total_variation
from brainprior_bids.evaluation.degrade import averaging_weights


def test_interpolation_along_the_slices():
    thick = Grid((6, 5, 12), np.diag((1.0, 1.0, 5.0, 1.0)))
    fine = thick.one_millimetre()
    data = np.random.default_rng(0).normal(size=thick.shape).astype(np.float32)
    z = (np.arange(60) - 2) / 5
    linear = interpolate(data, thick, fine, order=1)
    expected = np.interp(np.clip(z, 0, 11), np.arange(12), data[3, 2])
    np.testing.assert_allclose(linear[3, 2], expected, atol=1e-5)
    cubic = interpolate(data, thick, fine, order=3)
    spline = CubicSpline(np.arange(12), data[3, 2])
    inner = (z > 4) & (z < 7)  # away from the ends, where the boundary rules differ
    np.testing.assert_allclose(cubic[3, 2][inner], spline(z[inner]), atol=0.02)
    np.testing.assert_allclose(cubic[:, :, 2::5], data, atol=1e-5)


def test_turned_grids_are_refused():
    a = Grid((6, 5, 12), np.eye(4))
    b = Grid(
        (6, 5, 12), np.array([[0.9, 0.1, 0, 0], [-0.1, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    )
    with pytest.raises(GeometryError, match="same axes"):
        interpolate(np.zeros(a.shape), a, b, order=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tikhonov_solves_its_normal_equations(axis):
    weights = averaging_weights(30, 1.0, 5.0, 5.0, "trapezoid")
    shape = [4, 3, 5]
    shape[axis] = 6
    y = np.random.default_rng(1).normal(size=shape)
    x = np.moveaxis(tikhonov(y, weights, axis=axis, penalty=0.05), axis, 0).astype(float)
    gradient = np.tensordot(weights.T @ weights, x, 1)
    gradient -= np.tensordot(weights.T, np.moveaxis(y, axis, 0), 1)
    step = np.diff(x, axis=0)
    gradient[:-1] -= 0.05 * step
    gradient[1:] += 0.05 * step
    assert np.abs(gradient).max() < 1e-5


def objective(x, y, weights, penalty):
    gradient = [np.diff(x, axis=a, append=x.take([-1], axis=a)) for a in range(3)]
    data = np.moveaxis(np.tensordot(weights, x, axes=(1, 2)), 0, 2) - y
    return 0.5 * (data**2).sum() + penalty * np.sqrt(sum(g**2 for g in gradient)).sum()


def test_total_variation_reaches_a_minimum():
    rng = np.random.default_rng(2)
    weights = averaging_weights(20, 1.0, 4.0, 4.0, "boxcar")
    truth = np.zeros((10, 10, 20))
    truth[3:7, 2:8, 6:15] = 1
    y = np.moveaxis(np.tensordot(weights, truth, axes=(1, 2)), 0, 2)
    y = (y + rng.normal(0, 0.02, y.shape)).astype(np.float32)
    x = total_variation(y, weights, axis=2, penalty=0.01, iterations=2000).astype(float)
    best = objective(x, y, weights, 0.01)
    for size in (1e-2, 1e-3):
        for _ in range(20):
            assert objective(x + size * rng.normal(size=x.shape), y, weights, 0.01) > best
    assert objective(truth, y, weights, 0.01) > best
    assert (
        np.abs(x - truth).mean()
        < np.abs(tikhonov(y, weights, axis=2, penalty=1e-3) - truth).mean()
    )


def test_weights_of_another_scan_are_refused():
    weights = averaging_weights(30, 1.0, 5.0, 5.0, "boxcar")
    with pytest.raises(ShapeMismatchError, match="6 rows of slice weights for 7 slices"):
        tikhonov(np.zeros((4, 4, 7)), weights, axis=2, penalty=1.0)
    with pytest.raises(ShapeMismatchError, match="6 rows"):
        total_variation(np.zeros((4, 4, 7), np.float32), weights, axis=2, penalty=1.0)
