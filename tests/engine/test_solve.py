# SPDX-License-Identifier: Apache-2.0
"""The inner solve: against dense matrices, against the closed form, and where it must fail."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from build import sliced_likelihood

from brainprior_bids.engine.bias import CosineField, gauss_newton_step
from brainprior_bids.engine.errors import (
    ConvergenceError,
    DivergenceError,
    GeometryError,
    InputError,
    ShapeMismatchError,
)
from brainprior_bids.engine.gaussian.conjugate_gradients import (
    conjugate_gradients,
    split_conjugate_gradients,
)
from brainprior_bids.engine.gaussian.slices import WIDE, SolveLimits
from brainprior_bids.engine.gaussian.spectral import SpectralSolver
from brainprior_bids.engine.noise import estimate_noise_sd
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import (
    SliceProfile,
    gaussian_profile,
    slice_weights,
)

IMAGE, SPACING = (12, 8, 9), (1.0, 0.98, 1.02)


class Spectrum:
    def variance(self, sigma, frequency):
        power = 3 / (1 + (frequency / 0.1) ** 2) ** 1.5 + 1e-3
        return sigma**2 * power / (sigma**2 + power)


def weights():
    return slice_weights(gaussian_profile(4.0), n_slices=4, spacing_mm=3.0, n_thin=12, thin_mm=1.0)


def make(data_plane=(8, 9), **options):
    return SpectralSolver(weights(), IMAGE, (4, *data_plane), SPACING, **options)


def dense_operator(plane):
    """A, dense, by the operators' own (separately tested) matrices."""
    a = resampling_matrix(IMAGE[1], plane[0])
    b = resampling_matrix(IMAGE[2], plane[1])
    return torch.kron(weights(), torch.kron(a, b))


def dense_covariance(sigma):
    """V_sigma, dense, from the unbinned spectrum by the DFT."""
    frequency = torch.stack(
        torch.meshgrid(
            *(
                torch.fft.fftfreq(n, d=d, dtype=torch.float64)
                for n, d in zip(IMAGE, SPACING, strict=True)
            ),
            indexing="ij",
        )
    ).norm(dim=0)
    v = Spectrum().variance(sigma, frequency)
    n = math.prod(IMAGE)
    unit = torch.eye(n, dtype=torch.float64).reshape(n, *IMAGE)
    return torch.fft.ifftn(torch.fft.fftn(unit, dim=(1, 2, 3)) * v, dim=(1, 2, 3)).real.reshape(
        n, n
    )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLANES = [(8, 9), (6, 7), (5, 9), (8, 6)]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("sigma", [3.0, 0.05])
def test_products_against_dense_matrices(plane, sigma):
    solver = make(plane)
    factors = solver.factors(Spectrum(), sigma, 0.02)
    a, v = dense_operator(plane), dense_covariance(sigma)
    g = a @ v @ a.T
    x, u = random(*IMAGE), random(4, *plane, seed=1)
    xd, ud = x.double().flatten(), u.double().flatten()

    def close(found, expected):
        torch.testing.assert_close(
            found.double().flatten(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )

    close(solver.forward(x), a @ xd)
    close(solver.adjoint(u), a.T @ ud)
    close(solver.covariance(factors, u), g @ ud)
    eye = torch.eye(len(ud), dtype=torch.float64)
    close(solver.precondition(factors, u), torch.linalg.solve(g + 0.02 * eye, ud))
    nothing, _ = solver.draw_prior(factors, torch.Generator().manual_seed(0))
    close(solver.correct(factors, torch.zeros_like(nothing), u), v @ a.T @ ud)
    inverse = torch.linalg.inv(g + 0.02 * eye)
    trace, squared = solver.inverse_traces(factors)
    assert trace == pytest.approx(float(inverse.trace()), rel=1e-5)
    assert squared == pytest.approx(float((inverse @ inverse).trace()), rel=1e-5)
    assert solver.mean_variance(factors) == pytest.approx(float(g.diagonal().mean()), rel=1e-6)
    again = solver.renoise(factors, 0.5)
    close(solver.precondition(again, u), torch.linalg.solve(g + 0.5 * eye, ud))


@pytest.mark.parametrize("plane", PLANES)
def test_a_prior_draw_has_covariance_v_and_its_data_agree(plane):
    """Variance of projections on random directions, 4 standard errors; ``A v`` exactly."""
    solver = make(plane)
    factors = solver.factors(Spectrum(), 0.7, 0.02)
    generator = torch.Generator().manual_seed(5)
    n = 800
    draws = []
    for _ in range(n):
        k, seen = solver.draw_prior(factors, generator)
        v = solver.correct(factors, k, torch.zeros(4, *plane))
        draws.append(v.flatten())
    torch.testing.assert_close(solver.forward(v), seen, rtol=0, atol=1e-5)
    draws = torch.stack(draws).double()
    covariance = dense_covariance(0.7)
    directions = torch.cat(
        [
            torch.linalg.eigh(covariance).eigenvectors.T[::60],
            torch.eye(len(covariance))[:12].double(),
        ]
    )
    result = (draws @ directions.T).var(0)
    expected = (directions @ covariance * directions).sum(1)
    assert ((result / expected - 1).abs() < 4 * math.sqrt(2 / n)).all()


def test_few_bins_are_again_a_covariance_and_close_to_v():
    fine, coarse = make(), make(n_bins=12)
    assert len(coarse.radii) <= 12 < len(fine.radii)
    u = random(4, 8, 9)
    factors = coarse.factors(Spectrum(), 0.5, 0.02)
    solved = coarse.precondition(factors, u)
    again = coarse.covariance(factors, solved) + 0.02 * solved
    torch.testing.assert_close(again, u, rtol=0, atol=1e-4)
    exact = fine.precondition(fine.factors(Spectrum(), 0.5, 0.02), u)
    assert float((solved - exact).norm() / exact.norm()) < 0.05


def test_solver_checks_its_shapes():
    with pytest.raises(ShapeMismatchError, match="SpectralSolver"):
        SpectralSolver(weights(), IMAGE, (5, 8, 9), SPACING)
    with pytest.raises(GeometryError, match="finer"):
        SpectralSolver(weights(), IMAGE, (4, 10, 9), SPACING)


def likelihood(y, **options):
    """A brain in the middle, a bias field, shares between 0 and 1."""
    share = torch.zeros(4, 8, 9)
    share[:, 1:7, 1:8] = 0.6
    share[:, 2:6, 2:7] = 1.0
    settings = {
        "share": share,
        "solver": make(),
        "slice_axis": 0,
        "spectrum": Spectrum(),
        "support": torch.ones(IMAGE),
        "noise_sd": 0.05,
        "log_bias": 0.4 * torch.linspace(-1, 1, 9).expand(4, 8, 9),
        **options,
    }
    return sliced_likelihood(y, **settings)


HIDDEN = torch.zeros(4, 8, 9)
HIDDEN[1:3, 3:6, 2:6] = 1.0


def masked(y, **options):
    return likelihood(y, hidden=HIDDEN, **options)


def dense_data(data):
    """All measurements of x: matrix, values and variances, dense."""
    term = data.reference
    a = term.bias.flatten()[:, None].double() * dense_operator((8, 9))
    seen = term.measured.flatten()
    y, variance = term.y.flatten().double(), term.variance().flatten().double()
    return a[seen], y[seen], variance[seen]


@pytest.mark.parametrize(("sigma", "noise"), [(3.0, 0.01), (0.02, 0.05)], ids=["wide", "narrow"])
def test_conditional_draw_against_the_dense_posterior(sigma, noise):
    """Mean and variance of draws with bias and shares, against N(m, V) N(y; b A x, Sigma).

    Both forms of the solve: V wide against the noise, and narrow.
    """
    limits = SolveLimits(tolerance=1e-4)
    data = likelihood(1 + 0.1 * random(4, 8, 9), limits=limits, noise_sd=noise)
    solver = make()
    wide = solver.mean_variance(solver.factors(Spectrum(), sigma, noise**2)) > WIDE * noise**2
    assert wide == (sigma == 3.0)
    mean = 0.5 + 0.1 * random(*IMAGE, seed=1)
    generator = torch.Generator().manual_seed(2)
    n = 300
    draws = torch.stack([data.draw(mean, sigma, generator).flatten() for _ in range(n)]).double()
    a = data.reference.bias.flatten()[:, None].double() * dense_operator((8, 9))
    v = dense_covariance(sigma)
    precision = 1 / data.reference.variance(noise).flatten().double()
    covariance = torch.linalg.inv(torch.linalg.inv(v) + a.T @ (precision[:, None] * a))
    e = data.reference.y.flatten().double() - a @ mean.flatten().double()
    expected = mean.flatten().double() + covariance @ (a.T @ (precision * e))
    z = (draws.mean(0) - expected) / (covariance.diagonal() / n).sqrt()
    assert float(z.abs().max()) < 5  # 864 voxels
    assert float(z.square().mean()) == pytest.approx(1, abs=0.25)
    ratio = draws.var(0) / covariance.diagonal()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.03)
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_what_is_outside_the_brain_is_uncertain_by_its_share():
    """foreign = 0.05: s^2 inside and far outside, more where a voxel shows both."""
    data, noise = likelihood(random(4, 8, 9), foreign=0.05).reference, 0.02
    for where, expected in (((0, 4, 4), 0.0), ((0, 1, 4), (0.4 * 0.05) ** 2), ((0, 0, 0), 0.0)):
        assert float(data.variance(noise)[where]) == pytest.approx(noise**2 + expected)
    excess = torch.full((4, 8, 9), 0.01)
    more = likelihood(random(4, 8, 9), excess=excess).reference
    assert float(more.variance(noise)[0, 4, 4]) == pytest.approx(noise**2 + 0.01)
    assert not data.y[0, 0].any()  # far outside, 0 was measured


KINDS = pytest.mark.parametrize("kind", [likelihood, masked])


@KINDS
@pytest.mark.parametrize("sigma", [3.0, 0.05])
def test_conditional_mean_against_the_dense_posterior(kind, sigma):
    """With hidden voxels as well."""
    data = kind(1 + 0.1 * random(4, 8, 9), limits=SolveLimits(tolerance=1e-4))
    mean = 0.5 + 0.1 * random(*IMAGE, seed=1)
    a, y, variance = dense_data(data)
    v, m = dense_covariance(sigma), mean.flatten().double()
    gain = torch.linalg.solve(a @ v @ a.T + variance.diag(), a @ v).T
    expected, sd = m + gain @ (y - a @ m), (v - gain @ a @ v).diagonal().sqrt()
    result = data.expect(mean, sigma).flatten().double()
    assert float(((result - expected) / sd).abs().max()) < 0.01


class WideSpectrum:
    """Images whose mean is open: the power at low frequencies is far above that of the noise."""

    def variance(self, sigma, frequency):
        power = 1e4 / (1 + (frequency / 0.02) ** 2) ** 2 + 1e-4
        return sigma**2 * power / (sigma**2 + power)


def test_rounding_where_v_is_very_wide_leaves_no_offset():
    """The mean is known by every voxel: its residual is 0 to within the solve's tolerance."""
    image, data, noise_sd = (48, 96, 96), (12, 60, 60), 0.005
    thick = slice_weights(
        gaussian_profile(4.0), n_slices=12, spacing_mm=4.0, n_thin=48, thin_mm=1.0
    )
    share = torch.zeros(data)
    share[:, 6:54, 6:54] = 0.6  # these voxels contradict the others
    share[:, 14:46, 14:46] = 1.0
    y = torch.where(share == 1, 0.6, 0.3 * random(*data)) + noise_sd * random(*data, seed=1)
    lh = likelihood(
        y,
        share=share,
        solver=SpectralSolver(thick, image, data, (1.0, 1.0, 1.0)),
        spectrum=WideSpectrum(),
        support=torch.ones(image),
        noise_sd=noise_sd,
        log_bias=torch.zeros(data),
    )
    term = lh.reference
    precision = term.precision()
    for x in (
        lh.expect(torch.zeros(image), 30.0),
        lh.draw(torch.zeros(image), 30.0, torch.Generator().manual_seed(0)),
    ):
        residual = term.y - term.predict(x)
        offset = float((precision * residual).sum() / precision.sum())
        drawn = 3 / float(precision.sum().sqrt())  # a draw scatters about the mean
        assert abs(offset) < SolveLimits().tolerance * noise_sd + drawn


@KINDS
def test_nothing_is_drawn_beyond_the_support(kind):
    support = torch.zeros(IMAGE)
    support[2:10, 1:7, 1:8] = 1.0
    data, inside = kind(1 + 0.1 * random(4, 8, 9), support=support), support > 0
    x, image = torch.zeros(IMAGE), torch.ones(IMAGE)
    for result in (data.draw(x, 1.0, torch.Generator().manual_seed(0)), data.expect(x, 1.0)):
        assert not result[~inside].any()
        assert result[inside].all()
    torch.testing.assert_close(data.constrain(image), support)


@KINDS
def test_the_residual_is_that_of_the_biased_scan(kind):
    data, x = kind(1 + 0.1 * random(4, 8, 9)), 0.5 + 0.1 * random(*IMAGE, seed=3)
    term = data.reference
    a = term.bias.flatten()[:, None].double() * dense_operator((8, 9))
    assert float(term.bias.std()) > 0.1
    r = term.y.double() - (a @ x.flatten().double()).reshape(4, 8, 9)
    z = term.standardised_residual(x, 0.03)
    expected = r / term.variance(0.03).sqrt()
    torch.testing.assert_close(z.double(), expected.double(), rtol=1e-4, atol=1e-4)
    core = torch.zeros(4, 8, 9, dtype=torch.bool)
    core[:, 2:6, 2:7] = True
    if kind is masked:
        core &= HIDDEN == 0
    assert torch.equal(term.core, core)
    ratio = float((r[core] / 0.05).square().mean().sqrt())
    assert data.residual_ratio(x) == pytest.approx(ratio, rel=1e-5)
    result, left = term.explain(x)
    assert result.ratio == pytest.approx(ratio, rel=1e-5)
    assert not left[~core].any()


@KINDS
def test_misfit_gradient_and_a_bound_of_its_curvature(kind):
    data = kind(1 + 0.1 * random(4, 8, 9))
    x = 0.5 + 0.1 * random(*IMAGE, seed=3)
    a, y, variance = dense_data(data)
    expected = a.T @ ((a @ x.flatten().double() - y) / variance)
    result = data.misfit_gradient(x).flatten().double()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)
    largest = float(torch.linalg.eigvalsh(a.T @ (a / variance[:, None]))[-1])
    assert largest <= data.curvature() < 20 * largest


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_slice_axis_may_be_any(axis):
    """The same problem with its axes moved gives the same answer, moved."""
    y, x = random(4, 8, 9), random(*IMAGE, seed=1)
    plain = likelihood(y)
    share = plain.reference.share
    moved = likelihood(
        y.movedim(0, axis),
        slice_axis=axis,
        share=share.movedim(0, axis),
        support=torch.ones(IMAGE).movedim(0, axis),
        log_bias=plain.reference.nuisance.initial_log_bias.movedim(0, axis),
    )
    torch.testing.assert_close(
        moved.reference.predict(x.movedim(0, axis)).movedim(axis, 0), plain.reference.predict(x)
    )
    torch.testing.assert_close(
        moved.misfit_gradient(x.movedim(0, axis)).movedim(axis, 0), plain.misfit_gradient(x)
    )
    assert moved.residual_ratio(x.movedim(0, axis)) == pytest.approx(plain.residual_ratio(x))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"noise_sd": 0.0}, InputError, "noise SD must be above 0"),
        ({"noise_sd": float("nan")}, InputError, "noise SD must be above 0"),
        ({"share": torch.zeros(4, 8, 9)}, InputError, "no voxel"),
        ({"share": torch.ones(4, 8, 8)}, ShapeMismatchError, "share"),
        ({"support": torch.ones(3, 3, 3)}, ShapeMismatchError, "support"),
        ({"log_bias": torch.zeros(1, 2, 3)}, ShapeMismatchError, "log_bias"),
    ],
)
def test_likelihood_refuses_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        likelihood(random(4, 8, 9), **change)


def test_nan_inside_the_brain_is_refused_and_outside_is_ignored():
    y = random(4, 8, 9)
    y[0, 0, 0] = float("nan")
    assert bool(likelihood(y).reference.y.isfinite().all())
    y[0, 4, 4] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        likelihood(y)


def test_an_inner_solve_that_does_not_converge_raises():
    data = likelihood(random(4, 8, 9), limits=SolveLimits(tolerance=1e-9, max_iterations=2))
    with pytest.raises(ConvergenceError, match="inner solve at sigma"):
        data.draw(torch.zeros(IMAGE), 3.0, torch.Generator().manual_seed(0))


# ---- conjugate gradients ----------------------------------------------------------------------


def spd(n=40):
    q = random(n, n).double()
    return q @ q.T / n + 0.05 * torch.eye(n, dtype=torch.float64)


def test_conjugate_gradients_against_a_direct_solve():
    m, rhs = spd(), random(40, seed=1).double()
    expected = torch.linalg.solve(m, rhs)
    plain, n_plain = conjugate_gradients(lambda v: m @ v, rhs, tolerance=1e-10)
    torch.testing.assert_close(plain, expected)
    for start in (expected * (1 + 1e-6), random(40, seed=3).double()):
        warm, _ = conjugate_gradients(lambda v: m @ v, rhs, start=start, tolerance=1e-10)
        torch.testing.assert_close(warm, expected)
    _, n_warm = conjugate_gradients(
        lambda v: m @ v, rhs, start=expected * (1 + 1e-6), tolerance=1e-5
    )
    assert n_warm == 0 < n_plain
    exact = torch.linalg.inv(m)
    solved, n = conjugate_gradients(lambda v: m @ v, rhs, precondition=lambda r: exact @ r)
    assert n == 1
    torch.testing.assert_close(solved, expected)
    nothing, n = conjugate_gradients(lambda v: m @ v, torch.zeros(40).double())
    assert n == 0
    assert not nothing.any()


def test_split_conjugate_gradients_against_a_direct_solve():
    k, rhs = spd(), random(40, seed=1).double()
    excess = random(40, seed=2).double().abs()
    inverse = torch.linalg.inv(k)
    result, _ = split_conjugate_gradients(
        lambda r: inverse @ r,
        excess,
        rhs,
        residual_size=lambda r: float(r.norm()),
        tolerance=1e-10,
        max_iterations=100,
        who="test",
    )
    torch.testing.assert_close(result, torch.linalg.solve(k + torch.diag(excess), rhs))


def test_solvers_fail_loudly():
    m, rhs = spd(), random(40, seed=1).double()
    with pytest.raises(ConvergenceError, match="after 3 iterations"):
        conjugate_gradients(lambda v: m @ v, rhs, max_iterations=3, tolerance=1e-12)
    with pytest.raises(DivergenceError, match="not positive definite"):
        conjugate_gradients(lambda v: -v, rhs)
    options = {"residual_size": lambda r: float(r.norm()), "tolerance": 1e-12, "who": "test"}
    with pytest.raises(ConvergenceError, match="test"):
        split_conjugate_gradients(lambda r: r, 1 + rhs.abs(), rhs, max_iterations=1, **options)
    with pytest.raises(DivergenceError, match="test"):
        split_conjugate_gradients(
            lambda r: r, torch.full_like(rhs, float("nan")), rhs, max_iterations=9, **options
        )


# ---- bias and noise ---------------------------------------------------------------------------


def box_positions(shape):
    return [(torch.arange(n).double() + 0.5) / n for n in shape]


def test_cosine_field_against_a_slow_sum_and_its_adjoint():
    field = CosineField((180.0, 130.0, 70.0))
    shape = (9, 8, 7)
    basis = field.basis(box_positions(shape))
    c = random(field.n).double()
    slow = torch.zeros(shape).double()
    for value, (f, g, h) in zip(c, field.keep.nonzero().tolist(), strict=True):
        i, j, k = torch.meshgrid(*box_positions(shape), indexing="ij")
        slow += (
            value
            * torch.cos(math.pi * f * i)
            * torch.cos(math.pi * g * j)
            * torch.cos(math.pi * h * k)
        )
    torch.testing.assert_close(field.evaluate(c, basis).double(), slow, rtol=0, atol=1e-5)
    volume = random(*shape, seed=1)
    left = float((field.evaluate(c, basis).double() * volume).sum())
    assert left == pytest.approx(float(c @ field.project(volume, basis)), rel=1e-4)


def test_gauss_newton_finds_a_small_bias():
    """White residual: one step from 0 recovers the coefficients up to the ridge."""
    field = CosineField((160.0, 160.0, 160.0))
    shape = (16, 16, 16)
    basis = field.basis(box_positions(shape))
    true = 0.05 * random(field.n).double() / field.precision.sqrt() * 5
    prediction = 0.5 + 0.2 * random(*shape, seed=1)
    noise = 0.01
    y = prediction * (1 + field.evaluate(true, basis)) + noise * random(*shape, seed=2)
    result = gauss_newton_step(
        field,
        basis,
        coefficients=torch.zeros(field.n, dtype=torch.float64),
        prediction=prediction,
        residual=y - prediction,
        whiten=lambda v: v / noise**2,
        iterations=30,
    )
    error = field.evaluate(result - true, basis).std() / field.evaluate(true, basis).std()
    assert float(error) < 0.1


def test_gauss_newton_is_the_dense_ridge_solution():
    """From coefficients that are not 0, the data trusted by a third."""
    field = CosineField((160.0, 130.0, 70.0))
    shape, trust = (7, 6, 5), 0.3
    basis = field.basis(box_positions(shape))
    unit = torch.eye(field.n, dtype=torch.float64)
    phi = torch.stack([field.evaluate(e, basis).flatten() for e in unit], 1).double()
    prediction, residual = random(*shape, seed=1), 0.1 * random(*shape, seed=2)
    weight = 50 * random(*shape, seed=3).exp()
    start = 0.1 * random(field.n, seed=4).double()
    j, w = prediction.flatten().double()[:, None] * phi, weight.flatten().double()
    ridge = field.precision
    assert float(ridge[0]) == pytest.approx(0.15**-2)
    assert float(ridge[1]) == pytest.approx((0.15 / 2) ** -2)  # one half wave along k
    hessian = trust * j.T @ (w[:, None] * j) + ridge.diag()
    pull = trust * j.T @ (w * residual.flatten().double()) - ridge * start
    result = gauss_newton_step(
        field,
        basis,
        coefficients=start,
        prediction=prediction,
        residual=residual,
        whiten=lambda v: weight * v,
        trust=trust,
        iterations=50,
    )
    torch.testing.assert_close(
        result, start + torch.linalg.solve(hessian, pull), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_noise_is_found_beside_smooth_anatomy(axis):
    t = torch.meshgrid(*(torch.linspace(0, 3, 40) for _ in range(3)), indexing="ij")
    anatomy = torch.sin(t[0]) + torch.cos(2 * t[1]) * t[2]
    inside = (t[0] - 1.5) ** 2 + (t[1] - 1.5) ** 2 + (t[2] - 1.5) ** 2 < 2
    result = estimate_noise_sd(anatomy + 0.03 * random(40, 40, 40), inside, axis)
    assert result == pytest.approx(0.03, rel=0.08)  # correlated filter output


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_white_noise_is_told_from_interpolated_noise_and_from_anatomy(noise):
    t = torch.meshgrid(*(torch.linspace(0, 3, 24) for _ in range(3)), indexing="ij")
    coarse = torch.sin(t[0]) + torch.cos(2 * t[1]) * t[2] + noise * random(24, 24, 24)
    inside = torch.ones(48, 48, 48).bool()
    zeros = resampling_matrix(24, 48).float()
    zero_filled = torch.einsum("ai,bj,ck,ijk->abc", zeros, zeros, zeros, coarse)
    linear = F.interpolate(coarse[None, None], scale_factor=2, mode="trilinear")[0, 0]
    across = torch.einsum("ck,ijk->ijc", zeros, noise * random(48, 48, 24))
    assert estimate_noise_sd(across, inside, 2, only_white=True) is None  # slices interpolated
    for interpolated in (zero_filled, linear):
        assert estimate_noise_sd(interpolated, inside, 2) < 0.6 * noise
        assert estimate_noise_sd(interpolated, inside, 2, only_white=True) is None
    white = torch.sin(torch.linspace(0, 3, 48)) + noise * random(48, 48, 48)
    assert estimate_noise_sd(white, inside, 2, only_white=True) == pytest.approx(noise, rel=0.05)
    texture = torch.sin(1.5 * torch.arange(48.0))[:, None, None]
    anatomy = 0.1 * texture * torch.sin(1.5 * torch.arange(48.0))[:, None] + 0.001 * white
    assert estimate_noise_sd(anatomy, inside, 2, only_white=True) is None


def test_noise_needs_voxels():
    assert estimate_noise_sd(torch.zeros(9, 2, 9), torch.ones(9, 2, 9).bool(), 0) is None
    assert estimate_noise_sd(torch.zeros(9, 9, 9), torch.zeros(9, 9, 9).bool(), 0) is None


def test_noise_level_moves_to_the_truth_in_the_loop():
    """Data with noise 0.05 and a start of 0.08: where V is narrow, the residual determines it."""
    data = likelihood(
        torch.zeros(4, 8, 9), noise_sd=0.08, share=torch.ones(4, 8, 9), log_bias=None
    )
    truth = random(*IMAGE, seed=1)
    data.reference.y = data.reference.predict(truth) + 0.05 * random(4, 8, 9, seed=2)
    for _ in range(5):
        data.refine(truth, 0.01, bias=False, noise=True)
    expected = float((data.reference.y - data.reference.predict(truth)).square().mean().sqrt())
    assert data.reference.noise_sd == pytest.approx(expected, rel=0.05)
    data.reset()
    assert data.reference.noise_sd == 0.08
    data.reference.y = data.reference.predict(
        truth
    )  # no noise at all: held at half the value known beforehand
    for _ in range(5):
        data.refine(truth, 0.01, bias=False, noise=True)
    assert data.reference.noise_sd == pytest.approx(0.04)


@pytest.mark.parametrize("sigma", [3.0, 0.1, 0.02])
def test_the_step_of_the_noise_is_fishers_weighted_by_what_the_data_tell(sigma):
    """Against dense matrices: where V is wide, the data hardly separate noise from anatomy."""
    data = likelihood(
        torch.zeros(4, 8, 9), noise_sd=0.08, share=torch.ones(4, 8, 9), log_bias=None
    )
    truth = random(*IMAGE, seed=1)
    data.reference.y = data.reference.predict(truth) + 0.07 * random(4, 8, 9, seed=2)
    a, e = (
        dense_operator((8, 9)),
        (data.reference.y - data.reference.predict(truth)).flatten().double(),
    )
    inverse = torch.linalg.inv(a @ dense_covariance(sigma) @ a.T + 0.08**2 * torch.eye(len(e)))
    squared = (inverse @ inverse).trace()
    step = ((inverse @ e).square().sum() - inverse.trace()) / squared
    messages = 0.08**4 * squared / len(e)
    data.refine(truth, sigma, bias=False, noise=True)
    low, high = 0.04, 0.08
    expected = math.sqrt(0.08**2 + float(messages * step))
    assert data.reference.noise_sd == pytest.approx(min(max(expected, low), high), rel=1e-4)
    assert low < data.reference.noise_sd < high


def test_finer_slices_than_profile_reduce():
    """A profile narrower than a voxel still averages to the voxel that contains it."""
    w = slice_weights(gaussian_profile(0.2), n_slices=6, spacing_mm=1.0, n_thin=6, thin_mm=1.0)
    torch.testing.assert_close(w, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    x = random(6, 2, 2).double()
    torch.testing.assert_close(SliceProfile(w, (6, 2, 2), 0)(x), x, rtol=0, atol=1e-5)
