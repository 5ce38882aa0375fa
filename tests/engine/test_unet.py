# SPDX-License-Identifier: Apache-2.0
"""The band transform and the network around it."""

from __future__ import annotations

import pytest
import torch

from brainprior_bids.engine import unet


def randomised(network: unet.UNet, seed: int = 0) -> unet.UNet:
    """Every weight random: a fresh network is zero at its end and would pass anything."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def test_bands_are_orthonormal():
    matrix = unet.haar_matrix().double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64), atol=1e-6)


def test_bands_keep_energy_and_come_back():
    x = torch.randn(2, 1, 6, 8, 10, generator=torch.Generator().manual_seed(1))
    bands = unet.to_bands(x)
    assert bands.shape == (2, 8, 3, 4, 5)
    assert torch.allclose(bands.square().sum(), x.square().sum(), rtol=1e-5)
    assert torch.allclose(unet.from_bands(bands), x, atol=1e-6)


def test_autocast_does_not_round_the_image():
    """At sigma 0.01 the noise is as small as the rounding of bfloat16."""
    x = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unet.to_bands(x), unet.to_bands(x).float())
        assert torch.allclose(unet.from_bands(unet.to_bands(x)), x, atol=1e-6)


def test_each_band_is_the_difference_it_names():
    x = torch.zeros(1, 1, 2, 2, 2)
    x[..., 1] = 1.0  # varies along k alone
    bands = unet.to_bands(x)[0, :, 0, 0, 0]
    expected = torch.zeros(8)
    expected[0], expected[1] = 4 / 8**0.5, -4 / 8**0.5  # sums over 8 voxels / sqrt(8)
    assert torch.allclose(bands, expected, atol=1e-6)


def test_coordinate_features_are_those_of_the_block_centre():
    points = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"))[None] * 10
    features = unet.coordinate_features(points)
    assert features.shape == (1, unet.COORDINATE_FEATURES, 2, 2, 2)
    assert torch.allclose(features[0, :3, 1, 0, 1], torch.tensor([25.0, 5.0, 25.0]) / 100)
    angle = torch.tensor(25.0) * 2 * torch.pi / unet.WAVELENGTHS_MM[0]
    assert torch.allclose(features[0, 3, 1, 0, 1], angle.sin())
    assert torch.allclose(features[0, 6, 1, 0, 1], angle.cos())


def test_far_voxels_do_not_matter():
    """No statistic over space: what is beyond the receptive field changes nothing at all."""
    network = randomised(unet.UNet((8, 8), (1, 1), embedding=8))
    generator = torch.Generator().manual_seed(2)
    bands = torch.randn(1, 8, 64, 4, 4, generator=generator)
    place = torch.randn(1, unet.COORDINATE_FEATURES, 64, 4, 4, generator=generator)
    args = (place, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        before = network(bands, *args)
        changed = bands.clone()
        changed[:, :, :8] *= 100
        after = network(changed, *args)
    assert torch.equal(before[:, :, 32:], after[:, :, 32:])
    assert not torch.allclose(before[:, :, :8], after[:, :, :8])


@pytest.mark.parametrize("which", ["noise", "contrast", "place"])
def test_every_condition_reaches_the_output(which):
    network = randomised(unet.UNet((8, 8), (1, 1), embedding=8))
    bands = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    condition = {
        "place": torch.zeros(1, unet.COORDINATE_FEATURES, 4, 4, 4),
        "noise": torch.zeros(1),
        "contrast": torch.zeros(1, dtype=torch.long),
    }
    with torch.no_grad():
        before = network(bands, **condition)
        condition[which] = condition[which] + 1
        after = network(bands, **condition)
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_fresh_network_says_zero():
    network = unet.UNet((8, 8), (1, 1), embedding=8)
    bands = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    out = network(
        bands, torch.zeros(1, 27, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    )
    assert torch.equal(out, torch.zeros_like(out))
