# SPDX-License-Identifier: Apache-2.0
"""Random stacks of slices and holes: what the prior is trained to be told."""

import math

import pytest
import torch

from brainprior_bids.engine.stacks import StackPosterior, keep
from brainprior_bids.training import stacks
from brainprior_bids.training.crops import matrix_points

IMAGE = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0))


def draws(count):
    generator = torch.Generator().manual_seed(1)
    return [stacks.draw_stack(IMAGE, generator) for _ in range(count)]


def test_stacks_are_as_varied_as_scans():
    result = draws(300)
    axes = [stack.axis for stack in result]
    assert axes.count(2) / 300 == pytest.approx(0.5, abs=0.1)
    assert axes.count(0) / 300 == pytest.approx(0.25, abs=0.08)
    noise = torch.tensor([stack.noise_sd for stack in result])
    assert stacks.NOISE_SD[0] <= float(noise.min()) <= float(noise.max()) <= stacks.NOISE_SD[1]
    spacing = torch.tensor([math.exp(stack.features()[1]) for stack in result if len(stack.y) > 1])
    assert 0.95 < float(spacing.min()) < 2.2
    assert float(spacing.max()) > 6.5
    sinc = [stack for stack in result if float(stack.slice_weights.min()) < -0.01]
    assert len(sinc) / 300 == pytest.approx(stacks.THREE_D, abs=0.05)
    coarse = [stack for stack in result if not stack.whole_plane]
    assert len(coarse) / 300 == pytest.approx(stacks.COARSE, abs=0.1)
    assert all(0.4 < share <= 1 for stack in coarse for share in stack.kept)


def test_the_measurement_is_that_of_the_image_but_for_profile_and_noise():
    for stack in draws(40):
        expected = torch.tensordot(stack.slice_weights.float(), IMAGE, dims=([1], [stack.axis]))
        error = stack.y - keep(expected.movedim(0, stack.axis), stack.axis, stack.kept)
        whole = stack.slice_weights.sum(1) > 0.999  # slices wholly inside the crop
        inner = error.movedim(stack.axis, 0)[whole]
        if inner.numel() == 0:
            continue
        # a profile up to 10 % wider of another shape, on white noise of SD 0.29
        assert float(inner.square().mean().sqrt()) < 1.2 * stack.noise_sd + 0.06
        assert float(inner.mean().abs()) < 0.02


def test_the_same_seed_draws_the_same_stack():
    one, other = draws(3), draws(3)
    assert all(torch.equal(a.y, b.y) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_profiles_have_the_stated_width(kind):
    centres = torch.tensor([50.0], dtype=torch.float64)
    row = stacks.sampled_profile(stacks.profile(kind, 12.0), centres, 100)[0]
    assert float(row.sum()) == pytest.approx(1, abs=1e-6)
    assert int((row >= 0.5 * row.max()).sum()) == pytest.approx(12, abs=1)


def test_a_level_of_every_stack_is_finite():
    generator = torch.Generator().manual_seed(2)
    band_sd = torch.tensor([0.5, 0.05, 0.05, 0.02, 0.05, 0.02, 0.02, 0.01])
    for stack in draws(30):
        posterior = StackPosterior(stack, band_sd, stacks.log_uniform(0.02, 100.0, generator))
        noisy = posterior.estimate(torch.randn(8, 12, 12, 12, generator=generator))
        assert bool(torch.isfinite(noisy).all())
        assert bool(torch.isfinite(posterior.c_in).all())
        assert bool((posterior.c_out > 0).all())


def test_holes_are_in_the_brain_and_nothing_else_is_hidden():
    generator = torch.Generator().manual_seed(3)
    image = torch.zeros(48, 48, 48)
    image[8:40, 8:40, 8:40] = 0.7
    result = [stacks.draw_voxels(image, generator) for _ in range(60)]
    share = torch.tensor([float(v.hidden.float().mean()) for v in result])
    assert 0 < float(share.min()) < 0.01
    assert 0.1 < float(share.max()) < 0.6
    ends = [
        v for v in result if any(bool(v.hidden.amin(d).any()) for d in ((0, 1), (0, 2), (1, 2)))
    ]
    assert len(ends) / 60 == pytest.approx(stacks.SLAB, abs=0.12)
    for voxels in result:
        assert bool((voxels.hidden & (image > 0.05)).any())
        error = (voxels.y - image)[~voxels.hidden]
        assert float(error.std()) == pytest.approx(voxels.noise_sd, rel=0.05)
        posterior = voxels.posterior(torch.full((8,), 0.1), 0.5)
        assert bool(torch.isfinite(posterior.estimate(torch.randn(8, 24, 24, 24))).all())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_crop_is_turned_so_that_its_slices_lie_on_the_last_axis(axis):
    image = IMAGE[None]
    stack = next(stack for stack in draws(50) if stack.axis == axis)
    matrix = torch.rand((4, 4), generator=torch.Generator().manual_seed(1))
    turned, place, last = stacks.slices_last(image, matrix, stack)
    assert last.axis == 2
    assert last.noise_sd == stack.noise_sd
    assert torch.equal(turned, image.movedim(1 + axis, -1))
    mm = matrix_points(matrix[None], (24, 24, 24))[0]
    torch.testing.assert_close(
        matrix_points(place[None], (24, 24, 24))[0], mm.movedim(1 + axis, -1)
    )
    seen = torch.tensordot(
        stack.slice_weights.float(), image[0], dims=([1], [axis])
    )  # slices first
    also = torch.tensordot(last.slice_weights.float(), turned[0], dims=([1], [2]))
    torch.testing.assert_close(seen, also)
    assert torch.equal(last.y.movedim(2, axis), stack.y)
