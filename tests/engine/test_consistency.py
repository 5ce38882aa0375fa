# SPDX-License-Identifier: Apache-2.0
"""Classification of a residual: white noise, too large, smooth, or too few voxels."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage

from brainprior_bids.engine.consistency import Residual, judge, neighbour_correlation

SHAPE = (30, 28, 26)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual(z, where=EVERYWHERE, ratio=1.0):
    pairs = [neighbour_correlation(z, where, axis) for axis in range(3)]
    rho, error = zip(*pairs, strict=True)
    return Residual(ratio, ratio, rho, error)


def test_white_noise_raises_no_warning():
    result = [residual(noise(seed)) for seed in range(3)]
    assert judge(result) == []
    for one in result:
        for rho, error in zip(one.correlation, one.standard_error, strict=True):
            assert abs(rho) < 4 * error
    n = SHAPE[0] * SHAPE[1] * SHAPE[2]
    assert result[0].standard_error[0] == pytest.approx((n * 29 / 30) ** -0.5)


def test_the_correlation_is_that_of_the_process():
    """Noise smoothed by (1 1) along j alone has lag-one correlation 1/2 there, 0 elsewhere."""
    z = noise(1, (30, 29, 26))
    z = (z[:, 1:] + z[:, :-1]) / math.sqrt(2)
    rho = residual(z).correlation
    assert rho == pytest.approx([0, 0.5, 0], abs=4 / math.sqrt(z.numel()))


def test_only_pairs_inside_count():
    z = noise(2)
    z[15:] = 5.0
    inside = EVERYWHERE.clone()
    inside[15:] = False
    assert judge([residual(z)])
    assert judge([residual(z, inside)]) == []


def test_a_smooth_misfit_below_the_noise_is_found():
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise(3).numpy(), 3))
    smooth *= 0.7 / smooth.std()
    (warning,) = judge([residual(noise(4) + smooth)])  # 0.49 / 1.49
    assert "correlated" in warning
    assert "0.3" in warning
    assert judge([residual(noise(4) + 0.3 * smooth)]) == []


def test_a_large_residual_is_found_and_named():
    (warning,) = judge([residual(noise(5), ratio=1.2), residual(noise(6), ratio=1.63)])
    assert "1.63 times the noise" in warning
    assert judge([residual(noise(5), ratio=1.49)]) == []


def test_few_voxels_prove_nothing():
    few = torch.zeros(SHAPE, dtype=torch.bool)
    few[:3, :1, :1] = True
    z = torch.ones(SHAPE)
    assert judge([residual(z, few)]) == []
    none = residual(z, torch.zeros_like(few))
    assert none.correlation == (0, 0, 0)
    assert none.standard_error == (math.inf,) * 3
    assert judge([none]) == []
