# SPDX-License-Identifier: Apache-2.0
"""The SD of its own error that a prior predicts: meaning and use."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calls import restore_one
from gaussian import BAND_SD, gaussian_prior
from test_restore import GAIN, phantom

from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.unet import UNet, from_bands, from_blocks
from brainprior_bids.training.prior import spread_loss

SHAPE = (16, 16, 24)
PHANTOM_SD = torch.tensor([1.0, 0.2, 0.2, 0.06, 0.2, 0.06, 0.06, 0.04])


def slices(spacing=4):
    n = SHAPE[2] // spacing
    return torch.eye(n, dtype=torch.float64).repeat_interleave(spacing, 1) / spacing


def run(case, **changes):
    arguments = {**case["arguments"], **changes}
    return restore_one(arguments.pop("scan"), **arguments)


def test_blocks_are_the_voxels_in_order():
    volume = torch.arange(2.0 * 4 * 6).reshape(1, 1, 2, 4, 6)
    blocks = torch.stack(
        [volume[0, 0, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    )
    assert torch.equal(from_blocks(blocks[None]), volume)


def test_a_network_that_has_learned_nothing_says_what_the_linear_estimate_leaves():
    """In a Gaussian world that is the truth, on average over the voxels."""
    prior, generator = gaussian_prior(spread=True), torch.Generator().manual_seed(1)
    bands = torch.randn((40, 8, *(n // 2 for n in SHAPE)), generator=generator)
    truth = from_bands(bands * BAND_SD[:, None, None, None])
    errors, coordinates = [], torch.zeros(3, *SHAPE)
    for x in truth:
        y = torch.einsum("sk,ijk->ijs", slices().float(), x[0])
        y = y + 0.02 * torch.randn(y.shape, generator=generator)
        mean, sd = prior.estimate(
            torch.zeros(1, 1, *SHAPE),
            100.0,
            coordinates=coordinates,
            contrast="T1w",
            measured=Stack(y, slices(), 2, 0.02),
        )
        errors.append(mean[0] - x)
    expected = float(torch.stack(errors).square().mean().sqrt())
    assert float(sd.square().mean().sqrt()) == pytest.approx(expected, rel=0.02)


def test_the_weights_factor_scales_it():
    def sd(**metadata):
        prior = gaussian_prior(spread=True, **metadata)
        place = torch.zeros(3, *SHAPE)
        return prior.estimate(torch.zeros(1, 1, *SHAPE), 0.5, coordinates=place, contrast="T2w")[1]

    plain = sd()
    assert torch.allclose(sd(spread_factors={"T2w": 1.5, "unknown": 2.0}), 1.5 * plain)
    assert torch.allclose(sd(spread_factors={"unknown": 2.0}), 2 * plain)
    assert not gaussian_prior().predicts_spread
    place = torch.zeros(3, *SHAPE)
    x = torch.zeros(1, 1, *SHAPE)
    assert gaussian_prior().estimate(x, 0.5, coordinates=place, contrast="T2w")[1] is None


def test_it_lies_where_the_image_does_whichever_axis_the_slices_have():
    torch.manual_seed(0)
    network = UNet((8, 8), (1, 1), embedding=8, stacks=True, spread=True)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    prior = Prior(
        Precondition(network, BAND_SD),
        spectra={"unknown": ErrorSpectrum.isotropic(0.5)},
        metadata={"recipe": {"slices_last": True}},
        dtype=torch.float32,
    )
    x, place = torch.randn(1, 1, *SHAPE), 20 * torch.randn(3, *SHAPE)
    y, answers = torch.randn(16, 16, 6), []
    for axis in (0, 1, 2):
        _, sd = prior.estimate(
            x.movedim(-1, 2 + axis),
            0.5,
            coordinates=place.movedim(-1, 1 + axis),
            contrast="T2w",
            measured=Stack(y.movedim(2, axis), slices(), axis, 0.05),
        )
        answers.append(sd.movedim(2 + axis, -1))
    assert float(answers[2].std()) > 0.02 * float(answers[2].mean())
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[2])


def test_the_loss_is_least_at_the_rms_of_the_errors():
    error = 0.3 * torch.randn(4000, generator=torch.Generator().manual_seed(2))
    inside = torch.ones(4000, dtype=torch.bool)
    sds = torch.linspace(0.2, 0.4, 81)
    losses = [float(spread_loss(error, sd.expand(4000), inside=inside)) for sd in sds]
    best = float(sds[int(np.argmin(losses))])
    assert best == pytest.approx(float(error.square().mean().sqrt()), abs=0.0025)


@pytest.mark.parametrize("sampler", ["mean", "conditional"])
def test_a_restoration_takes_it_from_the_first_call(sampler):
    """One call is enough, and the samples' own SD, an estimate from two of them, is not used."""
    case = phantom()
    prior = gaussian_prior(PHANTOM_SD, spread=True, recipe={"holes": 0.0})
    result = run(case, prior=prior, sampler=sampler, n_samples=2, n_steps=6)
    assert result.sd_from == "prior"
    assert not result.warnings or all("uncertainty" not in text for text in result.warnings)
    inside = case["mask"]
    assert result.sd.shape == result.mean.shape
    assert float(result.sd[inside].std()) < 1e-3 * float(result.sd[inside].mean())  # a constant
    assert (result.sd[result.mean == 0] == 0).mean() > 0.99
    if sampler == "conditional":
        drawn = result.samples.std(0, ddof=1)
        mean_drawn = math.sqrt(float((drawn[inside] ** 2).mean()))
        assert float(result.sd[inside].mean()) == pytest.approx(mean_drawn, rel=0.25)
        again = run(
            case,
            prior=gaussian_prior(PHANTOM_SD, recipe={"holes": 0.0}),
            sampler=sampler,
            n_samples=2,
            n_steps=6,
        )
        assert again.sd_from == "samples"
        np.testing.assert_array_equal(again.samples, result.samples)
        np.testing.assert_array_equal(again.mean, result.mean)


def test_beside_another_tools_image_the_samples_say_it():
    """The network was not trained on such images."""
    case = phantom()
    prior = gaussian_prior(PHANTOM_SD, spread=True, recipe={"holes": 0.0})
    image = (GAIN * case["truth"]).astype(np.float32)
    options = {"prior": prior, "sampler": "conditional", "n_samples": 2, "n_steps": 4}
    result = run(case, image=image, trust=0.1, **options)
    assert result.sd_from == "samples"
    assert run(case, sampler="exact", n_samples=2, n_steps=4).sd_from == "samples"
