# SPDX-License-Identifier: Apache-2.0
"""Random surroundings of training brains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainprior_bids.training import surroundings
from brainprior_bids.training.crops import Crops
from brainprior_bids.training.preprocess import Brain
from brainprior_bids.training.stacks import draw_stack

MASK = np.linalg.norm(np.indices((32, 32, 32)) - 15.5, axis=0) < 9
DISTANCE = ndimage.distance_transform_edt(~MASK)


def draws(contrast, count):
    rng = np.random.default_rng(0)
    return [surroundings.draw_surroundings(MASK, contrast, rng) for _ in range(count)]


def test_the_layers_lie_around_the_brain_and_the_regions_in_one_another():
    result = draws("T1w", 60)
    for one in result:
        assert not one.head[MASK].any()
        assert one.head.min() >= 0
        assert (one.region >= MASK).all()
        assert (one.near >= one.region).all()
        assert DISTANCE[one.region].max() <= surroundings.RIM_MM[1]
        low, high = surroundings.NEAR_MM
        assert low - 1 < DISTANCE[one.near].max() <= high
    stripped = [not one.head.any() for one in result]
    assert np.mean(stripped) == pytest.approx(surroundings.STRIPPED, abs=0.15)


@pytest.mark.parametrize(("contrast", "low", "high"), [("T1w", 0, 0.6), ("T2w", 0.5, 1.1)])
def test_fluid_is_next_to_the_brain(contrast, low, high):
    """Dark in a T1w, bright in a T2w; thin fluid lets other layers come close to some voxels."""
    heads = [one.head for one in draws(contrast, 30) if one.head.any()]
    first = [np.median(head[(DISTANCE > 0) & (DISTANCE <= 1)]) for head in heads]
    assert low <= np.median(first) <= high


def test_without_a_border_there_are_no_surroundings():
    rng = np.random.default_rng(0)
    for mask in (np.ones((8, 8, 8), bool), np.zeros((8, 8, 8), bool)):
        one = surroundings.draw_surroundings(mask, "T1w", rng)
        assert not one.head.any()
        assert one.region.all()


def test_a_stack_of_a_head_is_one_of_the_part_near_the_brain():
    """As ``draw_stack`` where everything is near, and 0 where nothing is."""
    head = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0))
    near = torch.zeros(24, 24, 24, dtype=torch.bool)
    near[:14, :14, :14] = True
    for seed in range(20):
        plain = draw_stack(head, torch.Generator().manual_seed(seed))
        whole = surroundings.draw_stack_of_head(
            head, torch.ones_like(near), torch.Generator().manual_seed(seed)
        )
        part = surroundings.draw_stack_of_head(head, near, torch.Generator().manual_seed(seed))
        assert torch.equal(plain.slice_weights, part.slice_weights)
        seen = plain.slice_weights.abs().sum(1) > 0  # slices that lie in the crop
        apart = (whole.y - plain.y).movedim(plain.axis, 0)[seen]
        assert float(apart.abs().max()) < 1e-4
        if part.whole_plane:
            beyond = part.y.movedim(part.axis, -1)[15:, 15:]
            assert not beyond.any()


def test_crops_contain_a_rim_of_their_surroundings():
    data = np.where(MASK, np.random.default_rng(1).integers(50, 200, MASK.shape), 0)
    tissues = np.array([0.25, 0.6, 0.9])
    brain = Brain("01", "T1w", "train", data.astype(np.uint8), np.eye(4), tissues)
    crops = Crops([brain], size=16, seed=3, surroundings=True)
    some = [crops[n] for n in range(30)]
    assert torch.equal(crops[7]["head"], some[7]["head"])
    for crop in some:
        assert torch.equal(crop["image"], crop["head"] * crop["region"])
    assert any(bool((crop["head"] * crop["near"] != crop["image"]).any()) for crop in some)
    plain = Crops([brain], size=16, seed=3)
    assert all(torch.equal(plain[n]["image"], plain[n]["head"]) for n in range(5))
