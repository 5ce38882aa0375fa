# SPDX-License-Identifier: Apache-2.0
"""The general likelihood against dense matrices, and the unknown on the MNI305 grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_operators import NAMES, operators
from test_solve import SPACING, dense_operator, make
from test_solve import Spectrum as Steep
from test_solve import weights as thick

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import (
    ConvergenceError,
    GeometryError,
    InputError,
    ShapeMismatchError,
    UsageError,
)
from brainprior_bids.engine.general import OperatorLikelihood
from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.engine.likelihood import SliceLikelihood, SolveLimits
from brainprior_bids.engine.mni305 import restore_on_mni305
from brainprior_bids.engine.operators.base import Stack
from brainprior_bids.engine.operators.diagonal import Multiply
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.resample import AffineResample
from brainprior_bids.engine.operators.slices import SliceProfile, boxcar_profile, slice_weights
from brainprior_bids.engine.samplers.daps import DapsSettings

SHAPE, NOISE = (6, 5, 8), 0.05
TURN = 0.3


def rotation(angle: float) -> np.ndarray:
    matrix = np.eye(4)
    c, s = math.cos(angle), math.sin(angle)
    matrix[1:3, 1:3] = [[c, -s], [s, c]]
    return matrix


class Smooth:
    """V of a Gaussian prior with power 0.3 / (1 + (k / 0.1)^2) + 0.001."""

    def variance(self, sigma, frequency):
        p = 0.3 / (1 + (frequency / 0.1) ** 2) + 1e-3
        return sigma**2 * p / (sigma**2 + p)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_orientations():
    """The same image as slices along k, and tilted as slices along j, joined."""
    grid = Grid(SHAPE, np.eye(4))

    def profile(n_slices, n_thin):
        return slice_weights(
            boxcar_profile(n_thin / n_slices),
            n_slices=n_slices,
            spacing_mm=n_thin / n_slices,
            n_thin=n_thin,
            thin_mm=1.0,
        )

    first = SliceProfile(profile(4, 8), SHAPE, 2)
    tilted = AffineResample(grid, grid, rotation(TURN))
    second = SliceProfile(profile(2, 5), SHAPE, 1) @ tilted
    bias = Multiply((0.3 * random(*first.out_shape, seed=5)).exp())
    return Stack([bias @ first, second])


def likelihood(operator=None, **changes):
    operator = operator or two_orientations()
    options = {
        "operator": operator,
        "spectrum": Smooth(),
        "spacing_mm": (1.0, 1.0, 1.0),
        "support": torch.ones(SHAPE),
        "noise_sd": NOISE,
        "extra": 0.01 * random(*operator.out_shape, seed=3) ** 2,
        "limits": SolveLimits(tolerance=1e-3, max_iterations=300),
        **changes,
    }
    return OperatorLikelihood(1 + 0.2 * random(*operator.out_shape, seed=4), **options)


def dense(function, shape):
    unit = torch.eye(math.prod(shape)).reshape(-1, *shape)
    return torch.stack([function(e).flatten() for e in unit], 1).double()


@pytest.mark.parametrize("sigma", [3.0, 0.05])
def test_draws_of_two_tilted_scans_against_the_dense_posterior(sigma):
    data = likelihood()
    mean = 0.5 + 0.1 * random(*SHAPE, seed=1)
    a = dense(data.operator, SHAPE)
    spectrum = data._prepare(sigma).spectrum
    v = dense(lambda e: data._filter(spectrum, e), SHAPE)
    extra = 0.01 * random(*data.operator.out_shape, seed=3) ** 2
    torch.testing.assert_close(data.variance(), extra + NOISE**2)
    noise = data.variance().flatten().double()
    m, y = mean.flatten().double(), data.y.double()
    gain = torch.linalg.solve(a @ v @ a.T + noise.diag(), a @ v).T
    expected, covariance = m + gain @ (y - a @ m), v - gain @ a @ v
    found = data.expect(mean, sigma).flatten().double()
    sd = covariance.diagonal().sqrt()
    assert float(((found - expected) / sd).abs().max()) < 0.01
    n = 40
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([data.draw(mean, sigma, generator).flatten() for _ in range(n)]).double()
    z = (draws.mean(0) - expected) / (sd / math.sqrt(n))
    assert float(z.abs().max()) < 5  # 240 voxels
    ratio = draws.var(0) / sd**2
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_solved(name):
    """The conditional mean under each operator of the law kit, against dense matrices."""
    a = operators()[name]
    data = likelihood(a, support=torch.ones(a.in_shape))
    matrix, mean = dense(a, a.in_shape), 0.5 + 0.1 * random(*a.in_shape, seed=1)
    spectrum = data._prepare(0.7).spectrum
    v = dense(lambda e: data._filter(spectrum, e), a.in_shape)
    m, y = mean.flatten().double(), data.y.flatten().double()
    noise = data.variance().flatten().double()
    gain = torch.linalg.solve(matrix @ v @ matrix.T + noise.diag(), matrix @ v).T
    expected, left = m + gain @ (y - matrix @ m), v - gain @ matrix @ v
    found = data.expect(mean, 0.7).flatten().double()
    assert float(((found - expected) / left.diagonal().sqrt()).abs().max()) < 0.02


@pytest.mark.parametrize("plane", [(8, 9), (6, 7)])
@pytest.mark.parametrize("sigma", [2.0, 0.05])
def test_conjugate_gradients_in_the_image_agree_with_the_closed_form(plane, sigma):
    """One scan twice: any operator, and per in-plane frequency with its closed form."""
    solver = make(plane)
    shape, options = solver.image_shape, {"spectrum": Steep(), "noise_sd": NOISE}
    y, mean = 1 + 0.2 * random(4, *plane), 0.5 + 0.1 * random(*shape, seed=1)
    closed = SliceLikelihood(
        y,
        share=torch.ones(y.shape),
        solver=solver,
        slice_axis=0,
        support=torch.ones(shape),
        **options,
    )
    operator = SliceProfile(thick(), shape, 0)
    for axis in (1, 2):
        matrix = resampling_matrix(shape[axis], y.shape[axis])
        operator = SliceProfile(matrix, operator.out_shape, axis) @ operator
    np.testing.assert_allclose(dense(operator, shape), dense_operator(plane), atol=1e-6)
    general = OperatorLikelihood(
        y,
        operator=operator,
        spacing_mm=SPACING,
        support=torch.ones(shape),
        limits=SolveLimits(tolerance=1e-4, max_iterations=300),
        **options,
    )
    one, other = closed.expect(mean, sigma), general.expect(mean, sigma)
    assert closed.iterations[0] <= 1
    torch.testing.assert_close(one, other, rtol=0, atol=0.02 * NOISE)
    assert closed.residual_ratio(one) == pytest.approx(general.residual_ratio(one), rel=1e-5)


def test_gradient_by_autograd_and_curvature_bounds_it():
    data, x = likelihood(), random(*SHAPE, seed=6).requires_grad_()
    energy = 0.5 * ((data.y - data.operator(x)) ** 2 / data.variance()).sum()
    (expected,) = torch.autograd.grad(energy, x)
    torch.testing.assert_close(data.misfit_gradient(x.detach()), expected, rtol=1e-4, atol=1e-3)
    a = dense(data.operator, SHAPE)
    largest = float(torch.linalg.eigvalsh(a.T @ (a / data.variance().double()[:, None]))[-1])
    assert largest <= data.curvature() < 10 * largest


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"noise_sd": 0.0}, InputError, "noise SD"),
        ({"noise_sd": math.nan}, InputError, "noise SD"),
        ({"support": torch.ones(3, 3, 3)}, ShapeMismatchError, "support"),
        ({"extra": torch.ones(3)}, ShapeMismatchError, "extra"),
        ({"core": torch.ones(3, dtype=torch.bool)}, ShapeMismatchError, "core"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        likelihood(**change)


def test_nothing_is_drawn_beyond_the_support():
    support = (random(*SHAPE, seed=9) > 0).float()
    data, x = likelihood(support=support), torch.zeros(SHAPE)
    for found in (data.draw(x, 1.0, torch.Generator().manual_seed(0)), data.expect(x, 1.0)):
        assert torch.equal(found != 0, support > 0)
    torch.testing.assert_close(data.constrain(torch.ones(SHAPE)), support)


def test_data_must_be_finite_and_fit():
    operator = two_orientations()
    options = {
        "operator": operator,
        "spectrum": Smooth(),
        "spacing_mm": (1.0, 1.0, 1.0),
        "support": torch.ones(SHAPE),
        "noise_sd": NOISE,
    }
    with pytest.raises(ShapeMismatchError, match="OperatorLikelihood: y"):
        OperatorLikelihood(torch.zeros(3), **options)
    with pytest.raises(InputError, match="NaN"):
        OperatorLikelihood(torch.full(operator.out_shape, math.nan), **options)


def test_a_solve_that_does_not_converge_raises():
    data = likelihood(limits=SolveLimits(tolerance=1e-9, max_iterations=2))
    with pytest.raises(ConvergenceError, match="inner solve at sigma 3"):
        data.expect(torch.zeros(SHAPE), 3.0)


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
    return restore_on_mni305(case.pop("scan"), **case)


@pytest.mark.parametrize("sampler", ["exact", "daps"])
def test_a_tilted_scan_is_restored_upright(sampler):
    settings = DapsSettings(n_levels=6, n_ode=2, n_langevin=10, sigma_max=3, sigma_min=0.03)
    found = run(sampler=sampler, daps=settings, sigma_max=1.0)
    assert found.grid == MNI305
    assert found.samples.shape == (2, *MNI305.shape)
    truth = anatomy(torch.from_numpy(MNI305.points_mm())).numpy()
    inner = anatomy(torch.from_numpy(1.15 * MNI305.points_mm())).numpy() > 0
    error = (found.mean / 500 - truth)[inner]
    assert float(np.sqrt(np.mean(error**2))) < 0.1  # the prior's own SD
    upside_down = (found.mean[::-1, ::-1] / 500 - truth)[inner]
    assert float(np.sqrt(np.mean(upside_down**2))) > 0.15
    if sampler == "exact":
        # above 1 by what linear interpolation changes of the folds (measured: 1.20)
        assert all(0.9 < ratio < 1.35 for ratio in found.residual_ratios)
        assert found.residual_map.shape == (36, 44, 12)
        assert found.calls == 6
        again = run(n_samples=1, sigma_max=1.0)
        np.testing.assert_array_equal(again.samples[0], found.samples[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sampler": "map"}, UsageError, "exact or daps"),
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
