# SPDX-License-Identifier: Apache-2.0
"""The image-space solve against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from build import sliced_likelihood, stacked_likelihood
from test_operators import NAMES, operators
from test_solve import SPACING, dense_operator, make
from test_solve import Spectrum as Steep
from test_solve import weights as thick

from brainprior_bids.engine.errors import (
    ConvergenceError,
    InputError,
    ShapeMismatchError,
)
from brainprior_bids.engine.gaussian.image_space import ImageSpaceSolve
from brainprior_bids.engine.gaussian.slices import SolveLimits
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood, Term
from brainprior_bids.engine.operators.diagonal import Multiply
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.resample import AffineResample
from brainprior_bids.engine.operators.slices import SliceProfile, boxcar_profile, slice_weights

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
    return bias @ first, second


def likelihood(*operators, **changes):
    operators = operators or two_orientations()
    options = {
        "spectrum": Smooth(),
        "spacing_mm": (1.0, 1.0, 1.0),
        "support": torch.ones(SHAPE),
        "noise_sd": NOISE,
        "excess": [0.01 * random(*a.out_shape, seed=3) ** 2 for a in operators],
        "limits": SolveLimits(tolerance=1e-3, max_iterations=300),
        **changes,
    }
    scans = [1 + 0.2 * random(*a.out_shape, seed=4 + n) for n, a in enumerate(operators)]
    return stacked_likelihood(scans, operators, **options)


def dense_problem(data, sigma, shape):
    """A, V, y and the noise variance, dense, of all scans together."""
    solve = data.solve
    i, j, k = (torch.fft.fftfreq(n) for n in shape)
    frequency = (i[:, None, None] ** 2 + j[:, None] ** 2 + k**2).sqrt()
    spectrum = solve.spectrum.variance(sigma, frequency)
    v = dense(lambda e: torch.fft.ifftn(torch.fft.fftn(e) * spectrum).real, shape)
    noise = torch.cat([term.variance().flatten() for term in data.terms])
    return dense(solve.operator, shape), v, solve.y.double(), noise.double()


def dense(function, shape):
    unit = torch.eye(math.prod(shape)).reshape(-1, *shape)
    return torch.stack([function(e).flatten() for e in unit], 1).double()


@pytest.mark.parametrize("sigma", [3.0, 0.05])
def test_draws_of_two_tilted_scans_against_the_dense_posterior(sigma):
    data = likelihood()
    mean = 0.5 + 0.1 * random(*SHAPE, seed=1)
    a, v, y, noise = dense_problem(data, sigma, SHAPE)
    extra = torch.cat([0.01 * random(*t.y.shape, seed=3).flatten() ** 2 for t in data.terms])
    torch.testing.assert_close(noise.float(), extra + NOISE**2)
    m = mean.flatten().double()
    gain = torch.linalg.solve(a @ v @ a.T + noise.diag(), a @ v).T
    expected, covariance = m + gain @ (y - a @ m), v - gain @ a @ v
    result = data.expect(mean, sigma).flatten().double()
    sd = covariance.diagonal().sqrt()
    assert float(((result - expected) / sd).abs().max()) < 0.01
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
    mean = 0.5 + 0.1 * random(*a.in_shape, seed=1)
    matrix, v, y, noise = dense_problem(data, 0.7, a.in_shape)
    m = mean.flatten().double()
    gain = torch.linalg.solve(matrix @ v @ matrix.T + noise.diag(), matrix @ v).T
    expected, left = m + gain @ (y - matrix @ m), v - gain @ matrix @ v
    result = data.expect(mean, 0.7).flatten().double()
    assert float(((result - expected) / left.diagonal().sqrt()).abs().max()) < 0.02


@pytest.mark.parametrize("plane", [(8, 9), (6, 7)])
@pytest.mark.parametrize("sigma", [2.0, 0.05])
def test_conjugate_gradients_in_the_image_agree_with_the_closed_form(plane, sigma):
    """One scan twice: any operator, and per in-plane frequency with its closed form."""
    solver = make(plane)
    shape, options = solver.image_shape, {"spectrum": Steep(), "noise_sd": NOISE}
    y, mean = 1 + 0.2 * random(4, *plane), 0.5 + 0.1 * random(*shape, seed=1)
    closed = sliced_likelihood(
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
    general = stacked_likelihood(
        [y],
        [operator],
        spacing_mm=SPACING,
        support=torch.ones(shape),
        limits=SolveLimits(tolerance=1e-4, max_iterations=300),
        **options,
    )
    one, other = closed.expect(mean, sigma), general.expect(mean, sigma)
    assert closed.solve.iterations[0] <= 1
    torch.testing.assert_close(one, other, rtol=0, atol=0.02 * NOISE)
    assert closed.residual_ratio(one) == pytest.approx(general.residual_ratio(one), rel=1e-5)


def test_gradient_by_autograd_and_curvature_bounds_it():
    data, x = likelihood(), random(*SHAPE, seed=6).requires_grad_()
    energy = sum(0.5 * ((t.y - t.predict(x)) ** 2 / t.variance()).sum() for t in data.terms)
    (expected,) = torch.autograd.grad(energy, x)
    torch.testing.assert_close(data.misfit_gradient(x.detach()), expected, rtol=1e-4, atol=1e-3)
    a, _, _, noise = dense_problem(data, 1.0, SHAPE)
    largest = float(torch.linalg.eigvalsh(a.T @ (a / noise[:, None]))[-1])
    assert largest <= data.curvature() < 10 * largest


@pytest.mark.parametrize("sigma", [3.0, 0.3])
def test_a_network_that_was_given_the_first_scan_moves_by_the_others_alone(sigma):
    """m = E[x | x_t, y_1] of a Gaussian: with the second scan it is E[x | x_t, y_1, y_2]."""
    both, first = likelihood(), two_orientations()[0]
    one = likelihood(first)
    start = 0.5 + 0.1 * random(*SHAPE, seed=1)
    given = one.expect(start, sigma)
    torch.testing.assert_close(
        both.expect(given, sigma, given=True), both.expect(start, sigma), rtol=0, atol=2e-3
    )
    # and its draws vary as those of both scans do
    generators = (torch.Generator().manual_seed(2), torch.Generator().manual_seed(2))
    plain = both.draw(start, sigma, generators[0]) - both.expect(start, sigma)
    other = both.draw(given, sigma, generators[1], given=True)
    other = other - both.expect(given, sigma, given=True)
    torch.testing.assert_close(other, plain, rtol=0, atol=2e-3)


def test_hidden_voxels_of_any_scan_have_no_say():
    operators = two_orientations()
    hidden = random(*operators[0].out_shape, seed=11) > 0.5
    scans = [1 + 0.2 * random(*a.out_shape, seed=4 + n) for n, a in enumerate(operators)]
    options = {"spectrum": Smooth(), "spacing_mm": (1.0, 1.0, 1.0), "support": torch.ones(SHAPE)}
    options["limits"] = SolveLimits(tolerance=1e-4, max_iterations=300)

    def expected(first):
        terms = [
            Term(first, operator=operators[0], share=torch.ones_like(first), noise_sd=NOISE,
                 hidden=hidden),
            Term(scans[1], operator=operators[1], share=torch.ones_like(scans[1]), noise_sd=NOISE),
        ]  # fmt: skip
        data = Likelihood(terms, options["support"])
        data.solve = ImageSpaceSolve(
            data, options["spectrum"], options["spacing_mm"], options["limits"]
        )
        return data, data.expect(torch.zeros(SHAPE), 0.7)

    data, result = expected(scans[0])
    _, again = expected(torch.where(hidden, 1e3, scans[0]))
    assert torch.equal(result, again)
    a, v, y, noise = dense_problem(data, 0.7, SHAPE)
    seen = torch.cat([t.measured.flatten() for t in data.terms])
    a, y, noise = a[seen], y[seen], noise[seen]
    dense_mean = torch.linalg.solve(a @ v @ a.T + noise.diag(), a @ v).T @ y
    assert float((result.flatten() - dense_mean).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"noise_sd": 0.0}, InputError, "noise SD"),
        ({"noise_sd": math.nan}, InputError, "noise SD"),
        ({"support": torch.ones(3, 3, 3)}, ShapeMismatchError, "support"),
        ({"excess": [torch.ones(3)] * 2}, ShapeMismatchError, "excess"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        likelihood(**change)


def test_nothing_is_drawn_beyond_the_support():
    support = (random(*SHAPE, seed=9) > 0).float()
    data, x = likelihood(support=support), torch.zeros(SHAPE)
    for result in (data.draw(x, 1.0, torch.Generator().manual_seed(0)), data.expect(x, 1.0)):
        assert torch.equal(result != 0, support > 0)
    torch.testing.assert_close(data.constrain(torch.ones(SHAPE)), support)


def test_that_x_is_0_beyond_the_support_is_known_to_the_solve():
    """Against dense matrices with a row more for every voxel outside."""
    support = torch.ones(SHAPE)
    support[:2] = 0
    data, mean = likelihood(support=support), 0.5 + 0.1 * random(*SHAPE, seed=1)
    scans = likelihood()
    a, v, y, noise = dense_problem(scans, 3.0, SHAPE)
    outside = (support.flatten() == 0).nonzero().flatten()
    a = torch.cat((a, torch.eye(support.numel(), dtype=a.dtype)[outside]))
    y = torch.cat((y, y.new_zeros(len(outside))))
    noise = torch.cat((noise, noise.new_full((len(outside),), NOISE**2)))
    m = mean.flatten().double()
    gain = torch.linalg.solve(a @ v @ a.T + noise.diag(), a @ v).T
    expected, left = m + gain @ (y - a @ m), v - gain @ a @ v
    result, sd = data.expect(mean, 3.0).flatten().double(), left.diagonal().sqrt()
    inside = support.flatten() > 0
    assert float(((result - expected) / sd)[inside].abs().max()) < 0.01
    # without those rows the result differs
    other = scans.expect(mean, 3.0).flatten().double()
    assert float(((other - expected) / sd)[inside].abs().max()) > 0.5


def test_data_must_be_finite_and_fit():
    (operator, _) = two_orientations()
    options = {"operator": operator, "share": torch.ones(operator.out_shape), "noise_sd": NOISE}
    with pytest.raises(ShapeMismatchError, match="likelihood: y"):
        Term(torch.zeros(3), **options)
    with pytest.raises(InputError, match="NaN"):
        Term(torch.full(operator.out_shape, math.nan), **options)


def test_a_solve_that_does_not_converge_raises():
    data = likelihood(limits=SolveLimits(tolerance=1e-9, max_iterations=2))
    with pytest.raises(ConvergenceError, match="inner solve at sigma 3"):
        data.expect(torch.zeros(SHAPE), 3.0)
