# SPDX-License-Identifier: Apache-2.0
"""The samplers against laws known in closed form.

Many chains at once: the image has 20 x 20 columns whose in-plane voxels are so large that every
in-plane frequency is 0; V then depends on the frequency along the slice axis alone, and the
columns are 400 independent one-dimensional problems that run through the very code of a scan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from brainprior_bids.engine.denoiser import ErrorSpectrum
from brainprior_bids.engine.errors import DivergenceError, UsageError
from brainprior_bids.engine.likelihood import SliceLikelihood
from brainprior_bids.engine.operators.slices import boxcar_profile, slice_weights
from brainprior_bids.engine.samplers.daps import DapsSettings, langevin, sample_daps
from brainprior_bids.engine.samplers.exact import sample_exact
from brainprior_bids.engine.samplers.map import estimate_map
from brainprior_bids.engine.schedules import edm_schedule
from brainprior_bids.engine.spectral import SpectralSolver

N, SLICES, SIDE = 60, 12, 20
CHAINS = SIDE * SIDE
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


def wiener(x, sigma, mean=0.0):
    """E[x0 | x] along the first axis under N(mean, prior_power)."""
    power = prior_power(torch.fft.rfftfreq(N).to(x.dtype))[:, None, None]
    gain = power / (power + sigma**2)
    return mean + torch.fft.irfft(gain * torch.fft.rfft(x - mean, dim=0), n=N, dim=0)


def weights():
    return slice_weights(
        boxcar_profile(5.0), n_slices=SLICES, spacing_mm=5.0, n_thin=N, thin_mm=1.0
    )


def columns(y, spectrum, noise=NOISE):
    """The likelihood of the same column of data, 400 times."""
    solver = SpectralSolver(weights(), (N, SIDE, SIDE), (SLICES, SIDE, SIDE), (1.0, FAR, FAR))
    return SliceLikelihood(
        y.float()[:, None, None].expand(-1, SIDE, SIDE),
        share=torch.ones(SLICES, SIDE, SIDE),
        solver=solver,
        slice_axis=0,
        spectrum=spectrum,
        support=torch.ones(N, SIDE, SIDE),
        noise_sd=noise,
    )


def covariance_matrix():
    """Of the prior, dense."""
    first = torch.fft.ifft(prior_power(torch.fft.fftfreq(N, dtype=torch.float64))).real
    index = (torch.arange(N)[:, None] - torch.arange(N)) % N
    return first[index]


def gaussian_posterior(mean, y, noise=NOISE):
    """Mean (N,) and covariance (N, N) of x given y, and log p(y)."""
    c, w = covariance_matrix(), weights()
    s = w @ c @ w.T + noise**2 * torch.eye(SLICES, dtype=torch.float64)
    gain = torch.linalg.solve(s, w @ c).T
    e = y - w @ mean
    evidence = -0.5 * (e @ torch.linalg.solve(s, e) + torch.logdet(s))
    return mean + gain @ e, c - gain @ w @ c, float(evidence)


def measure(x, mean, covariance):
    """Mean error in posterior SD (its Monte-Carlo part removed), and variance ratios in the
    directions that the data see and in those they do not."""
    samples = x.reshape(N, -1).double()
    deviation = samples - mean[:, None]
    chol = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(
        chol, samples.mean(1, keepdim=True) - mean[:, None], upper=False
    )
    mean_error = float((white.square().mean() - 1 / samples.shape[1]).clamp_min(0).sqrt())
    basis = torch.linalg.svd(weights()).Vh
    seen, unseen = basis[:SLICES], basis[SLICES:]
    ratios = []
    for part in (seen, unseen):
        expected = part @ covariance @ part.T
        values, vectors = torch.linalg.eigh(expected)
        z = (vectors.T @ part @ deviation) / values.sqrt()[:, None]
        ratios.append(float(z.var(1).mean()))
    return mean_error, ratios


@pytest.mark.parametrize("calls", [8, 20])
def test_exact_reaches_the_gaussian_posterior(calls):
    generator = torch.Generator().manual_seed(1)
    truth = (
        torch.linalg.cholesky(covariance_matrix()) @ torch.randn(N, generator=generator).double()
    )
    y = weights() @ truth + NOISE * torch.randn(SLICES, generator=generator)
    data = columns(y, GaussianSpectrum())
    x = sample_exact(
        wiener, data, edm_schedule(calls, 10.0, 0.01), shape=(N, SIDE, SIDE), generator=generator
    )
    mean, covariance, _ = gaussian_posterior(torch.zeros(N).double(), y)
    mean_error, (seen, unseen) = measure(x, mean, covariance)
    assert mean_error < 0.1
    assert 0.9 < seen < 1.1
    assert 0.9 < unseen < 1.1
    assert 0.95 < data.residual_ratio(x) < 1.05
    assert max(data.iterations) <= 1  # nothing but white noise: the closed form is the answer


def test_map_finds_the_posterior_mean_of_a_gaussian():
    """For a Gaussian the most probable image is the mean; nothing of the spread is left."""
    generator = torch.Generator().manual_seed(1)
    y = weights() @ (0.5 + 0.3 * torch.sin(torch.arange(N).double() / 7))
    x = estimate_map(
        wiener,
        columns(y, GaussianSpectrum()),
        edm_schedule(20, 10.0, 0.01),
        shape=(N, SIDE, SIDE),
        generator=generator,
    )
    mean, covariance, _ = gaussian_posterior(torch.zeros(N).double(), y)
    sd = covariance.diagonal().sqrt()
    samples = x.reshape(N, -1).double()
    assert float(((samples.mean(1) - mean) / sd).square().mean().sqrt()) < 0.15


MODES = 4


def mode_means():
    """Four brains that differ by 0.1 in shape, little of it seen through the slices."""
    t = torch.arange(N, dtype=torch.float64)
    return torch.stack(
        [
            0.5 + 0.25 * torch.cos(2 * math.pi * t / N + 0.9 * m) * (1 + 0.2 * m)
            for m in range(MODES)
        ]
    )


def mixture_denoiser(x, sigma):
    means = mode_means().float()
    power = prior_power(torch.fft.fftfreq(N))
    weight, answers = [], []
    for mean in means:
        m = mean[:, None, None]
        k = torch.fft.fft(x - m, dim=0, norm="ortho")
        weight.append(-0.5 * (k.abs() ** 2 / (power + sigma**2)[:, None, None]).sum(0))
        answers.append(wiener(x, sigma, m))
    share = torch.softmax(torch.stack(weight), 0)
    return (share[:, None] * torch.stack(answers)).sum(0)


def calibrated_spectrum(generator):
    """The mixture denoiser's error spectrum, measured as for a trained network."""
    sigmas = torch.logspace(-2.3, 1.2, 24, dtype=torch.float64)
    frequency = torch.fft.rfftfreq(N).double()
    chol = torch.linalg.cholesky(covariance_matrix()).float()
    table = []
    for sigma in sigmas.tolist():
        kind = torch.randint(MODES, (CHAINS,), generator=generator)
        x = mode_means().float()[kind].T + chol @ torch.randn(N, CHAINS, generator=generator)
        x = x.reshape(N, SIDE, SIDE)
        noisy = x + sigma * torch.randn(x.shape, generator=generator)
        k = torch.fft.rfft(x - mixture_denoiser(noisy, sigma), dim=0, norm="ortho")
        table.append((k.abs() ** 2).mean((1, 2)).double())
    return ErrorSpectrum(sigmas, frequency, torch.stack(table))


def test_exact_finds_the_weights_of_a_mixture():
    generator = torch.Generator().manual_seed(2)
    spectrum = calibrated_spectrum(generator)
    means = mode_means()
    truth = means[1] + 0.5 * (means[2] - means[1])
    y = weights() @ truth + NOISE * torch.randn(SLICES, generator=generator)
    x = sample_exact(
        mixture_denoiser,
        columns(y, spectrum),
        edm_schedule(20, 10.0, 0.01),
        shape=(N, SIDE, SIDE),
        generator=generator,
    )
    posteriors = [gaussian_posterior(mean, y) for mean in means]
    log_weight = torch.tensor([p[2] for p in posteriors])
    expected = torch.softmax(log_weight, 0)
    c = torch.linalg.inv(covariance_matrix())
    samples = x.reshape(N, -1).double()
    score = torch.stack(
        [-0.5 * ((samples - m[:, None]) * (c @ (samples - m[:, None]))).sum(0) for m in means]
    )
    found = torch.softmax(score, 0).mean(1)
    assert (found - expected).abs().max() < 0.05


SETTINGS = DapsSettings(n_levels=15, n_ode=3, n_langevin=25, sigma_max=10.0, sigma_min=0.05)
HMC = replace(SETTINGS, n_leapfrog=6, stability=0.2)


def daps_law(y, settings):
    """Mean (N,) and covariance (N, N) that DAPS itself ends at: every step is affine."""
    eye = torch.eye(N, dtype=torch.float64)
    w, c = weights(), covariance_matrix()
    sigmas = settings.levels()
    curvature = 1 / NOISE**2 * float(w.sum(0).max() * w.sum(1).max())
    mean, covariance = torch.zeros(N).double(), sigmas[0] ** 2 * eye
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
        h = eye / sigma**2 + w.T @ w / NOISE**2
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
        start = ode @ mean  # the fixed point is inverse (x0_hat / sigma^2 + w^T y / noise^2)
        pulled = linear + (eye - linear) @ inverse / sigma**2
        mean = pulled @ start + (eye - linear) @ inverse @ w.T @ y / NOISE**2
        pulled = pulled @ ode
        covariance = pulled @ covariance @ pulled.T + noise + sigma_next**2 * eye
    return mean, covariance


def standard_errors(x, mean, covariance):
    """Largest deviation of the mean, and of the variance, in standard errors over the voxels."""
    samples = x.reshape(N, -1).double()
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


@pytest.mark.parametrize("settings", [SETTINGS, HMC], ids=["Langevin", "HMC"])
@pytest.mark.parametrize("half", [True, False])
def test_daps_follows_its_own_law_and_not_without_the_half(half, settings):
    generator = torch.Generator().manual_seed(3)
    y = weights() @ (0.5 + 0.3 * torch.sin(torch.arange(N).double() / 7))
    data = columns(y, GaussianSpectrum())
    x = sample_daps(
        wiener,
        data if half else WithoutHalf(data),
        settings,
        shape=(N, SIDE, SIDE),
        generator=generator,
    )
    errors = standard_errors(x, *daps_law(y, settings))
    assert (max(errors) < 4) == half


def test_langevin_raises_when_it_diverges():
    data = columns(torch.ones(SLICES), GaussianSpectrum())
    with pytest.raises(DivergenceError, match="Lower the step"):
        langevin(
            torch.zeros(N, SIDE, SIDE),
            data,
            sigma=1.0,
            step=2.5 / (0.2 / NOISE**2),
            n_steps=200,
            generator=torch.Generator().manual_seed(0),
        )


def test_exact_raises_on_a_broken_denoiser():
    data = columns(torch.ones(SLICES), GaussianSpectrum())
    with pytest.raises(DivergenceError, match="denoiser"):
        sample_exact(
            lambda x, sigma: x * float("nan"),
            data,
            [1.0, 0.0],
            shape=(N, SIDE, SIDE),
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
