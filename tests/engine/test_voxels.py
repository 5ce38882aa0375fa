# SPDX-License-Identifier: Apache-2.0
"""Conditioning on a scan with hidden voxels: against dense matrices, and in the sampler."""

import math

import pytest
import torch
from gaussian import BAND_SD, gaussian_prior, told

from brainprior_bids.engine.denoiser import Precondition
from brainprior_bids.engine.errors import InputError, ShapeMismatchError
from brainprior_bids.engine.samplers.conditional import sample_conditional
from brainprior_bids.engine.samplers.mean import expected_image
from brainprior_bids.engine.schedules import edm_schedule
from brainprior_bids.engine.unet import UNet, from_bands, to_bands
from brainprior_bids.engine.voxels import Voxels

SHAPE = (6, 8, 10)
NOISE = 0.02


def make(shape=SHAPE):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.zeros(shape, dtype=torch.bool)
    hidden[1:5, 2:7, 3:6] = True  # whole blocks and parts of blocks
    return Voxels(torch.randn(shape, generator=generator), hidden, NOISE)


def haar(shape):
    n = math.prod(shape)
    voxels = torch.eye(n, dtype=torch.float64).reshape(n, 1, *shape)
    return to_bands(voxels).reshape(n, n).T


def dense(voxels, sigma):
    """(K, w of an x_t) of the textbook formula, in float64 over all voxels."""
    shape = voxels.y.shape
    n = math.prod(shape)
    power = BAND_SD.double().square()[:, None].expand(8, n // 8).reshape(-1)
    h = haar(shape)
    seen = (~voxels.hidden).double().reshape(-1) / NOISE**2
    k = torch.linalg.inv(h.T @ torch.diag(1 / power) @ h + torch.eye(n) / sigma**2 + seen.diag())
    pull = seen * voxels.y.double().reshape(-1)
    return k, lambda x_t: k @ (x_t.double().reshape(-1) / sigma**2 + pull)


@pytest.mark.parametrize("sigma", [0.05, 2.0, 100.0, 1e4])  # 1e4: the sampler's blind call
def test_estimate_and_spread_are_the_dense_posterior(sigma):
    voxels = make()
    k, estimate = dense(voxels, sigma)
    posterior = voxels.posterior(BAND_SD, sigma)
    x_t = sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    result = from_bands(posterior.estimate(to_bands(x_t[None, None])[0])[None]).reshape(-1)
    # Three sums of 8 terms in float32, each rounded to 2^-24, of bands up to sqrt(8) max |w|: 1e-5
    # here, whatever sigma is. (Measured: 7e-7 up to sigma 100, 4e-6 at 1e4.)
    expected = estimate(x_t)
    bound = 3 * 8 * 2**-24 * math.sqrt(8) * float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=bound)
    n = math.prod(SHAPE)
    units = to_bands(torch.eye(n).reshape(n, 1, *SHAPE))
    root = torch.stack([from_bands(posterior.spread_out(u)[None]).reshape(-1) for u in units], 1)
    assert torch.allclose((root @ root).double(), k, atol=1e-6 * float(k.max()) + 1e-7)
    left = (haar(SHAPE) @ k @ haar(SHAPE).T).diagonal().reshape(8, -1).mean(1).sqrt()
    assert torch.allclose(posterior.c_out.double(), left, rtol=1e-5)
    share = posterior.unknown_map(SHAPE)[0, 0]
    assert bool((share[voxels.hidden] == 1).all())
    assert float(share[~voxels.hidden].max()) == pytest.approx(1 / math.hypot(1, sigma / NOISE))


def test_nothing_hidden_is_white_noise_of_less():
    """x_t and y are one image with noise 1 / sqrt(1/sigma² + 1/n²): EDM's own preconditioning."""
    sigma = 0.03
    y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    posterior = Voxels(y, torch.zeros(SHAPE, dtype=torch.bool), NOISE).posterior(BAND_SD, sigma)
    both = 1 / math.sqrt(1 / sigma**2 + 1 / NOISE**2)
    model = Precondition(UNet((4, 4), (1, 1)), BAND_SD)
    c_skip, c_out, c_in = (c[0] for c in model.scales(torch.tensor([both])))
    x_t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    u = both**2 * (x_t / sigma**2 + y / NOISE**2)
    expected = c_skip * to_bands(u[None, None])[0]
    assert torch.allclose(posterior.estimate(to_bands(x_t[None, None])[0]), expected, atol=1e-6)
    assert torch.allclose(posterior.c_out, c_out.flatten(), rtol=1e-5)
    assert torch.allclose(posterior.c_in * c_skip.flatten(), c_in.flatten(), rtol=1e-4)


def test_bfloat16_convolutions_leave_the_estimate_in_float32():
    posterior, noisy = make().posterior(BAND_SD, 2.0), torch.randn(8, 3, 4, 5)
    alone = posterior.estimate(noisy), posterior.spread_out(noisy)
    with torch.autocast("cpu", torch.bfloat16):
        inside = posterior.estimate(noisy), posterior.spread_out(noisy)
    assert torch.equal(alone[0], inside[0])
    assert torch.equal(alone[1], inside[1])


def test_samples_have_the_posteriors_mean_and_spread():
    """20 calls under a Gaussian prior (its network answers 0), in and out of a hole."""
    torch.manual_seed(0)
    voxels = make((8, 8, 12))
    prior = gaussian_prior(recipe={"holes": 0.1})
    assert prior.takes_holes
    denoise = told(prior, voxels, (8, 8, 12))
    generator = torch.Generator().manual_seed(5)
    levels = edm_schedule(19, 20.0, 0.001)
    expected = expected_image(denoise, shape=(8, 8, 12))
    draws = torch.stack(
        [
            sample_conditional(denoise, levels, expected=expected, generator=generator)
            for _ in range(100)
        ]
    )
    k, estimate = dense(voxels, 1e4)
    variance = k.diagonal().reshape(8, 8, 12)
    mean = estimate(torch.zeros(8, 8, 12)).reshape(8, 8, 12)
    for part in (voxels.hidden, ~voxels.hidden):
        ratio = float(draws.var(0)[part].mean() / variance[part].mean())
        assert ratio == pytest.approx(1, abs=0.15)  # 40 calls: 1.03
        off = (draws.mean(0) - mean)[part].square().mean() / (variance[part].mean() / 100)
        assert float(off) < 1.6  # 1 on average, with few independent directions


def test_bad_voxels_are_refused():
    hidden = torch.zeros(SHAPE, dtype=torch.bool)
    with pytest.raises(InputError, match="above 0"):
        Voxels(torch.zeros(SHAPE), hidden, 0.0)
    with pytest.raises(ShapeMismatchError, match="alike"):
        Voxels(torch.zeros(6, 8, 9), hidden, 0.1)
