# SPDX-License-Identifier: Apache-2.0
"""The samplers against distributions in closed form.

Many chains at once: axes of the image whose voxels are ``FAR`` apart have no frequency but 0, so
that what lies along them is independent. A world is a problem of one or two dimensions, 400 times,
which runs through the very code of a scan; ``test_exact_reaches_the_gaussian_posterior_in_3d``
takes one chain after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import pytest
import torch
from build import sliced_likelihood

from brainprior_bids.engine.denoiser import ErrorSpectrum
from brainprior_bids.engine.errors import DivergenceError, UsageError
from brainprior_bids.engine.gaussian.spectral import SpectralSolver
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import boxcar_profile, slice_weights
from brainprior_bids.engine.samplers.conditional import SIGMA_MAX, sample_conditional
from brainprior_bids.engine.samplers.daps import DapsSettings, langevin, sample_daps
from brainprior_bids.engine.samplers.exact import sample_exact
from brainprior_bids.engine.samplers.mean import expected_image
from brainprior_bids.engine.schedules import edm_schedule

CHAINS = 400
NOISE = 0.01
FAR = 1e9  # mm between columns


def prior_power(frequency):
    """Power of the Gaussian prior at |k| (cycles/mm), orthonormal."""
    return 0.3 / (1 + (frequency / 0.05) ** 2) ** 1.5 + 1e-4


class GaussianSpectrum:
    """The exact error spectrum of the Wiener denoiser for ``prior_power``."""

    def variance(self, sigma, frequency):
        power = prior_power(frequency)
        return sigma**2 * power / (sigma**2 + power)


@dataclass(frozen=True)
class World:
    """An image and its slices along the first axis; the trailing ``repeats`` are independent."""

    image: tuple[int, ...]  # voxels of 1 mm
    slices: int
    plane: tuple[int, ...]  # voxels of the data along the other axes
    repeats: tuple[int, ...]

    @property
    def shape(self):
        return (*self.image, *self.repeats)

    @property
    def size(self):
        return math.prod(self.image)

    @cached_property
    def weights(self):
        thick = self.image[0] / self.slices
        return slice_weights(
            boxcar_profile(thick),
            n_slices=self.slices,
            spacing_mm=thick,
            n_thin=self.image[0],
            thin_mm=1.0,
        )

    @cached_property
    def a(self):
        """The measurement, dense, float64."""
        matrix = self.weights
        for n, m in zip(self.image[1:], self.plane, strict=True):
            matrix = torch.kron(matrix, resampling_matrix(n, m))
        return matrix

    @cached_property
    def frequency(self):
        axes = [torch.fft.fftfreq(n, dtype=torch.float64) for n in self.image]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)

    @cached_property
    def covariance(self):
        """Of the prior, dense, by the DFT."""
        unit = torch.eye(self.size, dtype=torch.float64).reshape(-1, *self.image)
        axes = tuple(range(1, unit.ndim))
        k = torch.fft.fftn(unit, dim=axes) * prior_power(self.frequency)
        return torch.fft.ifftn(k, dim=axes).real.reshape(self.size, self.size)

    def wiener(self, x, sigma, mean=0.0):
        """E[x0 | x] under N(mean, prior_power)."""
        axes = tuple(range(len(self.image)))
        power = prior_power(self.frequency).to(x).reshape(*self.image, *(1 for _ in self.repeats))
        k = torch.fft.fftn(x - mean, dim=axes) * (power / (power + sigma**2))
        return mean + torch.fft.ifftn(k, dim=axes).real

    def likelihood(self, y, spectrum=None):
        """That of the same data in every repeat."""
        data = (self.slices, *self.plane, *self.repeats)
        spacing = (1.0,) * len(self.image) + (FAR,) * len(self.repeats)
        y = y.float().reshape(self.slices, *self.plane, *(1 for _ in self.repeats))
        return sliced_likelihood(
            y.expand(data),
            share=torch.ones(data),
            solver=SpectralSolver(self.weights, self.shape, data, spacing),
            slice_axis=0,
            spectrum=spectrum or GaussianSpectrum(),
            support=torch.ones(self.shape),
            noise_sd=NOISE,
        )

    def measurement(self, truth, generator):
        return self.a @ truth + NOISE * torch.randn(len(self.a), generator=generator)

    def posterior(self, mean, y):
        """Mean and covariance of x given y under N(mean, covariance), and log p(y)."""
        c, a = self.covariance, self.a
        s = a @ c @ a.T + NOISE**2 * torch.eye(len(a), dtype=torch.float64)
        gain = torch.linalg.solve(s, a @ c).T
        e = y - a @ mean
        evidence = -0.5 * (e @ torch.linalg.solve(s, e) + torch.logdet(s))
        return mean + gain @ e, c - gain @ a @ c, float(evidence)

    def modes(self):
        """(4, size): brains that differ in shape, little of it seen through the slices."""
        t = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) / n for n in self.image), indexing="ij"
        )
        wave = [
            torch.cos(2 * math.pi * sum(t) + 0.9 * m) * (1 + 0.2 * m) * self.swing
            for m in range(4)
        ]
        return 0.5 + torch.stack(wave).reshape(4, -1)

    @property
    def swing(self):
        return 0.25 if len(self.image) == 1 else 0.05


LINE = World((60,), 12, (), (20, 20))
PLANE = World((15, 6), 5, (4,), (CHAINS,))  # coarser than the image in its plane
BLOCK = World((9, 6, 5), 3, (4, 5), ())
WORLDS = pytest.mark.parametrize("world", [LINE, PLANE], ids=["line", "plane"])


def measure(world, samples, mean, covariance):
    """Mean error in posterior SD (its Monte-Carlo part removed), and variance ratios in the
    directions that the data see and in those they do not; samples are (size, chains)."""
    samples = samples.reshape(world.size, -1).double()
    deviation = samples - mean[:, None]
    chol = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(chol, deviation.mean(1, keepdim=True), upper=False)
    mean_error = float((white.square().mean() - 1 / samples.shape[1]).clamp_min(0).sqrt())
    _, values, basis = torch.linalg.svd(world.a)
    rank = int((values > 1e-9).sum())  # a crop of k-space leaves out the Nyquist frequency
    ratios = []
    for part in (basis[:rank], basis[rank:]):
        expected = part @ covariance @ part.T
        values, vectors = torch.linalg.eigh(expected)
        z = (vectors.T @ part @ deviation) / values.sqrt()[:, None]
        ratios.append(float(z.var(1).mean()))
    return mean_error, ratios


def draw_truth(world, generator):
    white = torch.randn(world.size, generator=generator).double()
    return torch.linalg.cholesky(world.covariance) @ white


@WORLDS
@pytest.mark.parametrize("calls", [8, 20])
def test_exact_reaches_the_gaussian_posterior(calls, world):
    generator = torch.Generator().manual_seed(1)
    y = world.measurement(draw_truth(world, generator), generator)
    data = world.likelihood(y)
    x = sample_exact(
        world.wiener,
        data,
        edm_schedule(calls, 10.0, 0.01),
        shape=world.shape,
        generator=generator,
    )
    mean, covariance, _ = world.posterior(torch.zeros(world.size).double(), y)
    mean_error, (seen, unseen) = measure(world, x, mean, covariance)
    assert mean_error < 0.1
    assert 0.9 < seen < 1.1
    assert 0.9 < unseen < 1.1
    assert 0.95 < data.residual_ratio(x) < 1.05
    assert (
        max(data.solve.iterations) <= 1
    )  # nothing but white noise: the closed form is the answer


def test_exact_reaches_the_gaussian_posterior_in_3d():
    generator = torch.Generator().manual_seed(1)
    y = BLOCK.measurement(draw_truth(BLOCK, generator), generator)
    data, levels = BLOCK.likelihood(y), edm_schedule(20, 10.0, 0.01)
    samples = [
        sample_exact(BLOCK.wiener, data, levels, shape=BLOCK.shape, generator=generator)
        for _ in range(60)
    ]
    mean, covariance, _ = BLOCK.posterior(torch.zeros(BLOCK.size).double(), y)
    x = torch.stack(samples, -1)
    mean_error, (seen, unseen) = measure(BLOCK, x, mean, covariance)
    assert mean_error < 0.1
    assert 0.9 < seen < 1.1
    assert 0.9 < unseen < 1.1
    residuals = torch.tensor([data.residual_ratio(one) for one in samples])
    assert 0.95 < float(residuals.square().mean().sqrt()) < 1.05


# ---- a mixture of four ------------------------------------------------------------------------


def as_image(world, vector):
    return vector.float().reshape(*world.image, *(1 for _ in world.repeats))


def mixture_denoiser(world):
    axes = tuple(range(len(world.image)))
    power = prior_power(world.frequency).float()

    def denoise(x, sigma):
        weight, answers = [], []
        for mode in world.modes():
            m = as_image(world, mode)
            k = torch.fft.fftn(x - m, dim=axes, norm="ortho").abs() ** 2
            weight.append(-0.5 * (k / as_image(world, power + sigma**2)).sum(axes))
            answers.append(world.wiener(x, sigma, m))
        share = torch.softmax(torch.stack(weight), 0)
        return (share.reshape(4, *(1 for _ in axes), *world.repeats) * torch.stack(answers)).sum(0)

    return denoise


def calibrated_spectrum(world, generator):
    """The mixture denoiser's error spectrum, measured as for a trained network."""
    sigmas = torch.logspace(-2.3, 1.2, 24, dtype=torch.float64)
    radii, place = torch.unique((world.frequency * 1e9).round(), return_inverse=True)
    count = torch.bincount(place.flatten()).double()
    chol = torch.linalg.cholesky(world.covariance).float()
    denoise, axes, table = mixture_denoiser(world), tuple(range(len(world.image))), []
    for sigma in sigmas.tolist():
        kind = torch.randint(4, (CHAINS,), generator=generator)
        spread = chol @ torch.randn(world.size, CHAINS, generator=generator)
        x = (world.modes().float()[kind].T + spread).reshape(world.shape)
        noisy = x + sigma * torch.randn(x.shape, generator=generator)
        k = torch.fft.fftn(x - denoise(noisy, sigma), dim=axes, norm="ortho").abs() ** 2
        power = k.double().reshape(*world.image, -1).mean(-1)
        total = torch.zeros(len(radii)).double().index_add_(0, place.flatten(), power.flatten())
        table.append(total / count)
    return ErrorSpectrum(sigmas, radii / 1e9, torch.stack(table))


def mixture_data(world, generator):
    """Data between two modes, and the modes' posterior weights."""
    modes = world.modes()
    y = world.measurement(0.5 * (modes[1] + modes[2]), generator)
    posteriors = [world.posterior(mode, y) for mode in modes]
    return y, posteriors, torch.softmax(torch.tensor([p[2] for p in posteriors]).double(), 0)


def found_weights(world, x):
    """The mean probability of each mode, over the samples."""
    c = torch.linalg.inv(world.covariance)
    samples = x.reshape(world.size, -1).double()
    apart = [samples - mode[:, None] for mode in world.modes()]
    score = torch.stack([-0.5 * (e * (c @ e)).sum(0) for e in apart])
    return torch.softmax(score, 0).mean(1)


@WORLDS
def test_exact_finds_the_weights_of_a_mixture(world):
    generator = torch.Generator().manual_seed(2)
    spectrum = calibrated_spectrum(world, generator)
    y, _, expected = mixture_data(world, generator)
    assert expected.sort().values[-2] > 0.2  # the data do not determine the mode
    x = sample_exact(
        mixture_denoiser(world),
        world.likelihood(y, spectrum),
        edm_schedule(20, 10.0, 0.01),
        shape=world.shape,
        generator=generator,
    )
    assert (found_weights(world, x) - expected).abs().max() < 0.05


@WORLDS
def test_conditional_finds_the_weights_of_a_mixture_and_its_spread(world):
    """With the exact E[x | x_t, y], which the network approximates.

    The levels end at 0.003. The last call leaves out what is open below the last level: at 0.01,
    where ``restore`` ends, the variance is 0.81 to 0.93 of what it should be here. The embedded
    network is wrong by more than that, and gains nothing from lower levels.
    """
    generator = torch.Generator().manual_seed(2)
    _, posteriors, expected = mixture_data(world, generator)
    evidence = torch.tensor([p[2] for p in posteriors])
    eye = torch.eye(world.size, dtype=torch.float64)
    means = torch.stack([p[0] for p in posteriors])

    def denoise(x, sigma):
        at, covariance = x.reshape(world.size, -1).double(), posteriors[0][1]
        precision = torch.linalg.inv(covariance + sigma**2 * eye)
        apart = at - means[:, :, None]
        pulled = precision @ apart
        share = torch.softmax(evidence[:, None] - 0.5 * (apart * pulled).sum(1), 0)
        answers = means[:, :, None] + covariance @ pulled
        return (share[:, None] * answers).sum(0).float().reshape(x.shape)

    x = sample_conditional(
        denoise,
        edm_schedule(19, SIGMA_MAX, 0.003),
        expected=expected_image(denoise, shape=world.shape),
        generator=generator,
    )
    result = found_weights(world, x)
    assert (result - expected).abs().max() < 0.05
    mean = expected @ means
    away = means - mean
    covariance = posteriors[0][1] + (expected[:, None] * away).T @ away
    mean_error, (seen, unseen) = measure(world, x, mean, covariance)
    assert mean_error < 0.1
    assert 0.9 < seen < 1.1
    assert 0.9 < unseen < 1.1


SETTINGS = DapsSettings(n_levels=15, n_ode=3, n_langevin=25, sigma_max=10.0, sigma_min=0.05)
HMC = replace(SETTINGS, n_leapfrog=6, stability=0.2)


def daps_law(world, y, settings):
    """Mean and covariance that DAPS itself ends at: every step is affine."""
    eye = torch.eye(world.size, dtype=torch.float64)
    a, c, w = world.a, world.covariance, world.weights
    sigmas = settings.levels()
    scale = len(world.a) / len(w) / (world.size / w.shape[1])  # a crop of k-space shrinks
    curvature = 1 / NOISE**2 * float(w.sum(0).max() * w.sum(1).max()) * scale
    mean, covariance = torch.zeros(world.size).double(), sigmas[0] ** 2 * eye
    for level, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ode = eye
        for s, s_next in pairwise(
            edm_schedule(settings.n_ode, sigma, min(settings.ode_sigma_min, sigma))
        ):
            denoise = c @ torch.linalg.inv(c + s**2 * eye)
            ode = (eye + (s_next - s) / s * (eye - denoise)) @ ode
        falling = 1 + (settings.step_decay - 1) * level / (settings.n_levels - 1)
        step = min(settings.step * falling, settings.stability * 2 / (curvature + sigma**-2))
        # leapfrog of length eps from the fixed point of the drift h (x - fixed): the deviation
        # after k steps is cos-like in x and sin-like in the momentum (Chebyshev recurrences)
        h = eye / sigma**2 + a.T @ a / NOISE**2
        inverse = torch.linalg.inv(h)
        eps = math.sqrt(2 * step)
        left, linear, noise = settings.n_langevin, eye, torch.zeros_like(eye)
        while left > 0:
            n = min(settings.n_leapfrog, left)
            left -= n
            of_x, of_v = [eye, eye - step * h], [torch.zeros_like(eye), eps * eye]
            for _ in range(n - 1):
                # x_{k+1} - 2 x_k + x_{k-1} = -eps^2 h x_k
                of_x.append(2 * of_x[-1] - of_x[-2] - eps**2 * h @ of_x[-1])
                of_v.append(2 * of_v[-1] - of_v[-2] - eps**2 * h @ of_v[-1])
            linear = of_x[n] @ linear
            noise = of_x[n] @ noise @ of_x[n].T + of_v[n] @ of_v[n].T
        start = ode @ mean  # the fixed point is inverse (x0_hat / sigma^2 + a^T y / noise^2)
        pulled = linear + (eye - linear) @ inverse / sigma**2
        mean = pulled @ start + (eye - linear) @ inverse @ a.T @ y / NOISE**2
        pulled = pulled @ ode
        covariance = pulled @ covariance @ pulled.T + noise + sigma_next**2 * eye
    return mean, covariance


def standard_errors(world, x, mean, covariance):
    """Largest deviation of the mean, and of the variance, in standard errors over the voxels."""
    samples = x.reshape(world.size, -1).double()
    variance = covariance.diagonal()
    z = (samples.mean(1) - mean) / (variance / CHAINS).sqrt()
    v = (samples.var(1) / variance - 1) / math.sqrt(2 / (CHAINS - 1))
    return float(z.abs().max()), float(v.abs().max())


class WithoutHalf:
    """The data term of the public code: no 1/2 in the loss, hence twice the gradient."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def misfit_gradient(self, x):
        return 2 * self.data.misfit_gradient(x)


def walk(world, settings, half=True):
    """Deviation of DAPS from its own distribution, in standard errors."""
    generator = torch.Generator().manual_seed(4)
    y = world.measurement(draw_truth(world, generator), generator)
    data = world.likelihood(y)
    x = sample_daps(
        world.wiener,
        data if half else WithoutHalf(data),
        settings,
        shape=world.shape,
        generator=generator,
    )
    return max(standard_errors(world, x, *daps_law(world, y, settings)))


@WORLDS
@pytest.mark.parametrize("settings", [SETTINGS, HMC], ids=["Langevin", "HMC"])
@pytest.mark.parametrize("half", [True, False])
def test_daps_follows_its_own_law_and_not_without_the_half(half, settings, world):
    assert (walk(world, settings, half) < 4) == half


@WORLDS
def test_a_step_too_long_is_cut_to_the_stated_part_of_the_stability_limit(world):
    assert walk(world, replace(HMC, step=1.0)) < 4


def test_daps_puts_nothing_beyond_the_support():
    data = LINE.likelihood(torch.ones(LINE.slices))
    data.support[:10] = 0.0
    settings = DapsSettings(n_levels=2, n_ode=1, n_langevin=2)
    generator = torch.Generator().manual_seed(0)
    x = sample_daps(LINE.wiener, data, settings, shape=LINE.shape, generator=generator)
    assert not x[:10].any()
    assert x[10:].all()


def test_langevin_raises_when_it_diverges():
    with pytest.raises(DivergenceError, match="Lower the step"):
        langevin(
            torch.zeros(LINE.shape),
            LINE.likelihood(torch.ones(LINE.slices)),
            sigma=1.0,
            step=2.5 / (0.2 / NOISE**2),
            n_steps=200,
            generator=torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize("sampler", [sample_exact, sample_daps, sample_conditional])
def test_a_broken_denoiser_raises(sampler):
    data, levels = LINE.likelihood(torch.ones(LINE.slices)), [1.0, 0.0]
    arguments, options = {
        sample_exact: ((data, levels), {"shape": LINE.shape}),
        sample_daps: ((data, SETTINGS), {"shape": LINE.shape}),
        sample_conditional: ((levels,), {"expected": torch.zeros(LINE.shape)}),
    }[sampler]
    with pytest.raises(DivergenceError, match=r"denoiser gave non-finite values at sigma"):
        sampler(
            lambda x, sigma: x * float("nan"),
            *arguments,
            **options,
            generator=torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize(
    "arguments", [(0, 1.0, 0.1), (5, 0.1, 1.0), (5, float("nan"), 0.1), (5, 1.0, 0.0)]
)
def test_a_schedule_that_does_not_fall_is_refused(arguments):
    with pytest.raises(UsageError, match="edm_schedule"):
        edm_schedule(*arguments)


def test_the_schedule_is_edms():
    """Against table 1 of Karras et al. written out, and its ends."""
    levels = edm_schedule(4, 80.0, 0.002)
    for i in range(4):
        expected = (80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert levels[i] == pytest.approx(expected)
    assert levels[-1] == 0.0
    assert levels[0] == pytest.approx(80.0)
    assert levels[3] == pytest.approx(0.002)


@pytest.mark.parametrize(
    "settings",
    [{"n_ode": 0}, {"step": 0.0}, {"stability": 1.0}, {"n_leapfrog": 0}, {"n_leapfrog": 101}],
)
def test_daps_settings_are_checked(settings):
    with pytest.raises(UsageError, match="DapsSettings"):
        DapsSettings(**settings)
