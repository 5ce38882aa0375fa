# SPDX-License-Identifier: Apache-2.0
"""Samples without data: those of a known distribution."""

from __future__ import annotations

import pytest
import torch

from brainprior_bids.training.samples import HEAD, draw_samples, unconditional


class Gaussian:
    """The exact denoiser of independent voxels, N(x / 100, SD²), x the MNI305 coordinate."""

    SD = 0.3

    def __init__(self):
        self.calls = []

    def denoise(self, x, sigma, *, coordinates, contrast):
        self.calls.append((sigma, contrast))
        mean = coordinates[0].float() / 100
        return mean + self.SD**2 / (self.SD**2 + sigma**2) * (x - mean)


def test_a_sample_has_the_mean_and_the_spread_of_the_prior():
    prior = Gaussian()
    sample = unconditional(prior, "T2w", seed=3, n_steps=40)
    rest = sample - torch.from_numpy(HEAD.points_mm())[0] / 100
    assert sample.shape == HEAD.shape
    assert float(rest.mean()) == pytest.approx(0, abs=0.01)
    assert float(rest.std()) == pytest.approx(prior.SD, rel=0.04)
    sigmas = [sigma for sigma, _ in prior.calls]
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(sigmas) == 40
    assert {contrast for _, contrast in prior.calls} == {"T2w"}


def test_its_seed_decides_on_a_sample():
    one, again, other = (unconditional(Gaussian(), "T1w", seed=s, n_steps=4) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_picture_has_a_row_for_each_contrast(tmp_path):
    from PIL import Image

    heights = []
    for contrasts in (["T1w"], ["T1w", "T2w"]):
        path = tmp_path / f"{len(contrasts)}.png"
        draw_samples(Gaussian(), path, contrasts, n_steps=2)
        with Image.open(path) as image:
            heights.append(image.height)
    assert heights[1] == 2 * heights[0]
