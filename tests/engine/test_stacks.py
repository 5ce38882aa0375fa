# SPDX-License-Identifier: Apache-2.0
"""Conditioning on a stack of slices: against dense matrices, and in the sampler."""

import math

import pytest
import torch
from gaussian import BAND_SD, gaussian_prior, told

from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.errors import InputError, ShapeMismatchError, UsageError
from brainprior_bids.engine.operators.slices import gaussian_profile, slice_weights
from brainprior_bids.engine.samplers.conditional import sample_conditional
from brainprior_bids.engine.samplers.mean import expected_image
from brainprior_bids.engine.schedules import edm_schedule
from brainprior_bids.engine.stacks import (
    Stack,
    StackPosterior,
    columns,
    from_columns,
    keep,
    mirrored,
)
from brainprior_bids.engine.unet import UNet, from_bands, to_bands
from brainprior_bids.engine.voxels import Voxels

SHAPE = (6, 8, 10)
NOISE = 0.02


def make_stack(axis, y=None, shape=SHAPE):
    n = shape[axis]
    weights = slice_weights(
        gaussian_profile(3.0), n_slices=int(n / 2.5), spacing_mm=2.5, n_thin=n, thin_mm=1.0
    )
    if y is None:
        size = list(shape)
        size[axis] = len(weights)
        y = torch.randn(size, generator=torch.Generator().manual_seed(3))
    return Stack(y, weights, axis, NOISE)


def dense(stack, sigma):
    """(K, w of an x_t) of the textbook formula, in float64 over all voxels."""
    n = math.prod(SHAPE)
    voxels = torch.eye(n, dtype=torch.float64).reshape(n, 1, *SHAPE)
    haar = to_bands(voxels).reshape(n, n).T
    power = BAND_SD.double().square()[:, None].expand(8, n // 8).reshape(-1)
    prior = haar.T @ torch.diag(1 / power) @ haar
    rows = [
        torch.tensordot(stack.slice_weights, v[0], dims=([1], [stack.axis])).movedim(0, stack.axis)
        for v in voxels
    ]
    a = torch.stack([row.reshape(-1) for row in rows], 1)
    k = torch.linalg.inv(prior + torch.eye(n) / sigma**2 + a.T @ a / NOISE**2)
    pull = a.T @ stack.y.double().reshape(-1) / NOISE**2
    return k, lambda x_t: k @ (x_t.double().reshape(-1) / sigma**2 + pull)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_columns_and_back(axis):
    bands = torch.randn(8, 4, 5, 6)
    assert torch.equal(from_columns(columns(bands, axis), axis, (4, 5, 6)), bands)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sigma", [0.05, 2.0, 100.0])
def test_estimate_and_spread_are_the_dense_posterior(axis, sigma):
    stack = make_stack(axis)
    k, estimate = dense(stack, sigma)
    posterior = StackPosterior(stack, BAND_SD, sigma)
    x_t = sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    result = from_bands(posterior.estimate(to_bands(x_t[None, None])[0])[None]).reshape(-1)
    assert torch.allclose(result.double(), estimate(x_t), atol=1e-5)
    n = math.prod(SHAPE)
    units = to_bands(torch.eye(n).reshape(n, 1, *SHAPE))
    root = torch.stack([from_bands(posterior.spread_out(u)[None]).reshape(-1) for u in units], 1)
    assert torch.allclose((root @ root).double(), k, atol=1e-6 * float(k.max()) + 1e-7)
    haar = to_bands(torch.eye(n, dtype=torch.float64).reshape(n, 1, *SHAPE)).reshape(n, n).T
    left = (haar @ k @ haar.T).diagonal().reshape(8, -1).mean(1).sqrt()
    assert torch.allclose(posterior.c_out.double(), left, rtol=1e-5)


def test_slices_that_tell_nothing_leave_edms_preconditioning():
    """Noise of 1e4: the stack is uninformative."""
    stack = make_stack(2)
    deaf = Stack(stack.y, stack.slice_weights, 2, 1e4)
    posterior = StackPosterior(deaf, BAND_SD, 0.3)
    model = Precondition(UNet((4, 4), (1, 1)), BAND_SD)
    c_skip, c_out, c_in = (c[0, :, 0, 0, 0] for c in model.scales(torch.tensor([0.3])))
    noisy = torch.randn(8, 3, 4, 5)
    assert torch.allclose(
        posterior.estimate(noisy), c_skip[:, None, None, None] * noisy, atol=1e-4
    )
    assert torch.allclose(posterior.c_out, c_out, rtol=1e-4)
    assert torch.allclose(posterior.c_in * c_skip, c_in, rtol=1e-3)


def test_bfloat16_convolutions_leave_the_estimate_in_float32():
    posterior = StackPosterior(make_stack(2), BAND_SD, 2.0)
    noisy = torch.randn(8, 3, 4, 5)
    alone = posterior.estimate(noisy), posterior.spread_out(noisy)
    with torch.autocast("cpu", torch.bfloat16):
        inside = posterior.estimate(noisy), posterior.spread_out(noisy)
    assert torch.equal(alone[0], inside[0])
    assert torch.equal(alone[1], inside[1])


def test_features_say_what_the_slices_are():
    n = 60
    weights = slice_weights(
        gaussian_profile(4.0), n_slices=12, spacing_mm=5.0, n_thin=n, thin_mm=1.0
    )
    row = Stack(torch.zeros(8, 12, 8), weights, 1, 0.01).features()
    expected = [1, math.log(5), math.log(4), math.log(0.01) / 4, 0, 1, 0, 0]
    assert row.tolist() == pytest.approx(expected, abs=0.06)


def test_samples_have_the_posteriors_mean_and_spread():
    """20 calls, against the closed form, in the data's directions and in those left open."""
    torch.manual_seed(0)
    shape, count = (8, 8, 12), 80
    n = math.prod(shape)
    weights = slice_weights(
        gaussian_profile(4.0), n_slices=3, spacing_mm=4.0, n_thin=12, thin_mm=1.0
    )
    truth_bands = BAND_SD[:, None, None, None] * torch.randn(8, 4, 4, 6)
    truth = from_bands(truth_bands[None])[0, 0]
    y = truth @ weights.float().T
    stack = Stack(y + NOISE * torch.randn(y.shape), weights, 2, NOISE)
    denoise, posterior = told(gaussian_prior(), stack, shape), StackPosterior(stack, BAND_SD, 1e4)
    generator = torch.Generator().manual_seed(5)
    levels = edm_schedule(19, 3.0, 0.001)
    expected = expected_image(denoise, shape=shape)
    draws = torch.stack(
        [
            sample_conditional(denoise, levels, expected=expected, generator=generator)
            for _ in range(count)
        ]
    )
    mean = from_bands(posterior.estimate(torch.zeros(8, 4, 4, 6))[None])[0, 0]
    whiten = torch.linalg.pinv(posterior.root.double(), rtol=1e-4).float()
    lines = torch.stack([columns(to_bands((d - mean)[None, None])[0], 2) for d in draws])
    white = torch.einsum("cab,ncbq->ncaq", whiten, lines)
    white = torch.einsum("cab,ncbq->ncaq", posterior.root, white)  # in units of x, K-weighted
    variance = white.square().mean((0, 3))  # (4, 12)
    assert float(variance.sum() / (posterior.variance.sum())) == pytest.approx(
        1, abs=0.08
    )  # 20 calls: 1.06, 40: 1.02, 80: 1.01
    # over six seeds 0.96 to 1.29; for the mean of 1500 draws 1.17
    centre = draws.mean(0) - mean
    ratio = float(centre.square().mean() / (posterior.variance.mean() / count))
    assert ratio == pytest.approx(1.05, abs=0.4)
    residual = draws @ weights.float().T - stack.y
    assert float(residual.square().mean().sqrt()) / NOISE == pytest.approx(1, abs=0.2)
    assert n == draws[0].numel()


def test_eps_says_the_same_for_the_same_seed_and_refuses_a_prior_without_stacks():
    stack = make_stack(2, shape=(8, 8, 12))
    denoise = told(gaussian_prior(), stack, (8, 8, 12))

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        expected = expected_image(denoise, shape=(8, 8, 12))
        return sample_conditional(denoise, [1.0, 0.1, 0.0], expected=expected, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    plain = Prior(
        Precondition(UNet((4, 4), (1, 1)), BAND_SD),
        spectra={"unknown": ErrorSpectrum.isotropic(0.2)},
        metadata={},
    )
    with pytest.raises(UsageError, match="not trained to be conditioned on measurements"):
        plain.denoise(
            torch.zeros(1, 1, 8, 8, 12),
            1.0,
            coordinates=torch.zeros(3, 8, 8, 12),
            contrast="T1w",
            measured=stack,
        )


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tile_mm", [None, 8])
def test_another_position_of_the_blocks_is_that_of_an_image_with_one_voxel_more(
    axis, turned, tile_mm
):
    shape = (8, 8, 8)
    prior = gaussian_prior(recipe={"slices_last": turned, "holes": 0.1})
    prior.tile_mm = tile_mm
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(shape, generator=generator) > 0.9
    x = torch.randn(1, 1, *shape, generator=generator)
    for measured in (make_stack(axis, shape=shape), Voxels(x[0, 0] + 1, hidden, NOISE)):
        across = axis if isinstance(measured, Stack) else 2
        more = [(0, 0) if a == across else (1, 1) for a in range(3)]
        inside = tuple(slice(first, first + n) for (first, _), n in zip(more, shape, strict=True))

        def estimate(x, measured, **options):
            place = torch.zeros(3, *x.shape[2:])
            given = {"coordinates": place, "contrast": "T1w", "measured": measured}
            return prior.estimate(x, 1.0, **given, **options)[0][0, 0]

        moved = estimate(x, measured, position=(1, 1))
        by_hand = estimate(mirrored(x, more), measured.padded(more))[inside]
        torch.testing.assert_close(moved, by_hand)
        assert (moved - estimate(x, measured)).abs().max() > 0.01


def test_a_factor_on_the_noise_widens_the_samples_about_the_same_mean():
    stack, shape = make_stack(2, shape=(8, 8, 12)), (8, 8, 12)
    denoise = told(gaussian_prior(), stack, shape)

    def run(factor):
        return sample_conditional(
            denoise,
            edm_schedule(19, 3.0, 0.001),
            expected=expected_image(denoise, shape=shape),
            generator=torch.Generator().manual_seed(2),
            inflation=factor,
        )

    centre, one, wider = run(0.0), run(1.0), run(1.25)
    assert float((one - centre).std()) > 0.05
    assert torch.allclose(wider - centre, 1.25 * (one - centre), atol=1e-5)


def test_bad_stacks_are_refused():
    weights = make_stack(2).slice_weights
    with pytest.raises(InputError, match="noise SD"):
        Stack(torch.zeros(6, 8, 4), weights, 2, float("nan"))
    with pytest.raises(ShapeMismatchError, match="4 slices along axis 2"):
        Stack(torch.zeros(6, 8, 5), weights, 2, 0.1)


def test_a_coarse_plane_changes_what_it_measured_and_nothing_else():
    """Half of the frequencies per axis: there the estimate changes as if all were measured."""
    shape, kept = (16, 16, 10), (0.5, 0.5)
    white = torch.full((8,), 0.3)
    full = make_stack(2, shape=shape)
    y = keep(full.y, 2, kept)
    stack = Stack(y, full.slice_weights, 2, NOISE, kept)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    bands = to_bands(x_t[None, None])[0]
    alone = 0.09 / (0.09 + 0.25) * x_t
    result = from_bands(StackPosterior(stack, white, 0.5).estimate(bands)[None])[0, 0]
    whole = from_bands(
        StackPosterior(Stack(y, full.slice_weights, 2, NOISE), white, 0.5).estimate(bands)[None]
    )[0, 0]
    # a white prior: frequencies of the plane are apart, so the two estimates agree where measured
    assert torch.allclose(keep(result, 2, kept), keep(whole, 2, kept), atol=1e-5)
    assert torch.allclose(result - keep(result, 2, kept), alone - keep(alone, 2, kept), atol=1e-5)
    posterior = StackPosterior(stack, white, 0.5)
    n = math.prod(shape)
    draws = torch.stack(
        [from_bands(posterior.spread_out(torch.randn(8, 8, 8, 5))[None])[0, 0] for _ in range(100)]
    )
    total = float(posterior.c_out.square().sum()) * n / 8
    assert float(draws.square().sum() / 100) == pytest.approx(total, rel=0.03)
    silent = draws[0] - keep(draws[0], 2, kept)
    power = float(silent.square().sum()) / (n * (1 - 0.4375**2))  # 7 of 16 frequencies per axis
    assert power == pytest.approx(0.09 * 0.25 / (0.09 + 0.25), rel=0.25)
