# SPDX-License-Identifier: Apache-2.0
"""An unknown image on the MNI305 grid: the affine is part of the forward model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calls import restore_one

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import GeometryError, InputError, UsageError
from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.engine.samplers.daps import DapsSettings

TURN = 0.3


def rotation(angle: float) -> np.ndarray:
    matrix = np.eye(4)
    c, s = math.cos(angle), math.sin(angle)
    matrix[1:3, 1:3] = [[c, -s], [s, c]]
    return matrix


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- a small brain, tilted in the scanner -----------------------------------------------------

RADII = (14.0, 17.0, 12.0)
TO_MNI = rotation(TURN) @ np.array([[1, 0, 0, 4], [0, 1, 0, -3], [0, 0, 1, 2], [0, 0, 0, 1.0]])


def anatomy(mm):
    x, y, z = mm[0], mm[1], mm[2]
    r2 = (x / RADII[0]) ** 2 + (y / RADII[1]) ** 2 + (z / RADII[2]) ** 2
    folds = 0.65 + 0.3 * torch.cos(x / 2.5) * torch.cos(y / 3) * torch.cos(z / 2.5)
    return torch.where(r2 < 1, folds, 0.0)


class Prior:
    """Gaussian about ``anatomy``, white with SD 0.1: wrong coordinates show at once."""

    sd = 0.1

    def spectrum(self, contrast):
        prior = self

        class White:
            def variance(self, sigma, frequency):
                v = sigma**2 * prior.sd**2 / (sigma**2 + prior.sd**2)
                return torch.full_like(frequency, v)

        return White()

    def denoise(self, x, sigma, *, coordinates, contrast):
        mean = anatomy(coordinates)
        return mean + (x - mean) * self.sd**2 / (self.sd**2 + sigma**2)


def tilted_scan():
    shape, thick = (36, 44, 12), 4.0
    affine = np.diag([1.0, 1.0, thick, 1.0])
    affine[:3, 3] = [-22.0, -20.0, -26.0]
    grid = Grid(shape, affine)
    fine = grid.one_millimetre()
    truth = anatomy(torch.from_numpy(fine.points_mm(TO_MNI)))
    y = truth.reshape(36, 44, 12, 4).mean(-1)
    y = y + 0.02 * random(*shape, seed=7)
    return {
        "scan": 500 * y,
        "grid": grid,
        "acquisition": Acquisition(2, thick, thick, "boxcar"),
        "mask": (truth > 0).float().reshape(36, 44, 12, 4).mean(-1),
        "mask_1mm": (truth > 0).float(),
        "to_mni305": TO_MNI,
        "contrast": "T1w",
        "prior": Prior(),
        "noise_sd": 0.02,
        "n_samples": 2,
        "n_steps": 6,
    }


def run(**changes):
    case = {**tilted_scan(), **changes}
    return restore_one(case.pop("scan"), home="MNI305", **case)


@pytest.mark.parametrize("sampler", ["exact", "daps"])
def test_a_tilted_scan_is_restored_upright(sampler):
    settings = DapsSettings(n_levels=6, n_ode=2, n_langevin=10, sigma_max=3, sigma_min=0.03)
    result = run(sampler=sampler, daps=settings, sigma_max=1.0)
    assert result.grid == MNI305
    assert result.samples.shape == (2, *MNI305.shape)
    truth = anatomy(torch.from_numpy(MNI305.points_mm())).numpy()
    inner = anatomy(torch.from_numpy(1.15 * MNI305.points_mm())).numpy() > 0
    error = (result.mean / 500 - truth)[inner]
    assert float(np.sqrt(np.mean(error**2))) < 0.1  # the prior's own SD
    upside_down = (result.mean[::-1, ::-1] / 500 - truth)[inner]
    assert float(np.sqrt(np.mean(upside_down**2))) > 0.15
    if sampler == "exact":
        # above 1 by what linear interpolation changes of the folds (measured: 1.20)
        assert all(0.9 < ratio < 1.35 for ratio in result.residual_ratios)
        assert result.residual_map.shape == (36, 44, 12)
        assert result.calls == 6
        again = run(n_samples=1, sigma_max=1.0)
        np.testing.assert_array_equal(again.samples[0], result.samples[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sampler": "conditional"}, UsageError, "conditioned on measurements"),
        ({"n_samples": 0}, UsageError, "n_samples"),
        ({"mask": np.zeros((36, 44, 12))}, InputError, "empty"),
        ({"scan": np.zeros((36, 44, 12))}, InputError, "99th percentile"),
        ({"scan": np.full((36, 44, 12), np.nan)}, InputError, "NaN"),
        ({"to_mni305": np.zeros((4, 4))}, GeometryError, "invertible"),
        ({"to_mni305": TO_MNI + 1e4 * np.eye(4, k=3)}, GeometryError, "no voxel"),
        ({"noise_sd": -1.0}, InputError, "noise SD"),
    ],
)
def test_a_restoration_refuses_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        run(**change)
