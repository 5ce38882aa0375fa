# SPDX-License-Identifier: Apache-2.0
"""A network that is given the surroundings of the brain, in a world known in closed form.

The prior is white: N(0, 0.5²) in every voxel. For slices of four voxels with equal weights, the
posterior mean of a voxel is the value of its slice, shrunk by the noise.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from calls import restore_one
from gaussian import gaussian_prior
from scipy import ndimage
from test_restore import block_mean, grid_of
from torch import full

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.problem import NEAR_MM

SD, NOISE, THICK, UNIT = 0.5, 0.01, 4, 300.0


@functools.cache
def head(bright=1.2):
    """Slices of a ball of random texture in a shell of one brightness: scan, whole head, mask."""
    fine = grid_of((44, 44, 44), (1.0, 1.0, 1.0))
    rng = np.random.default_rng(0)
    radius = np.linalg.norm(fine.points_mm(), axis=0)
    mask = radius < 12
    whole = np.where(mask, rng.uniform(0.2, 1.0, fine.shape), np.where(radius > 21, 0, bright))
    y = block_mean(whole, (1, 1, THICK))
    return y + NOISE * rng.normal(size=y.shape), whole, mask


def restored(y, mask, **options):
    grid = grid_of(y.shape, (1.0, 1.0, float(THICK)))
    prior = gaussian_prior(full((8,), SD))
    result = restore_one(
        scan=(UNIT * y).astype(np.float32),
        grid=grid,
        acquisition=Acquisition(2, float(THICK), float(THICK), profile="boxcar"),
        mask=block_mean(mask.astype(np.float32), (1, 1, THICK)),
        mask_1mm=mask.astype(np.float32),
        to_mni305=np.eye(4),
        contrast="T1w",
        prior=prior,
        sampler="mean",
        noise_sd=NOISE,
        **options,
    )
    return result.mean / result.unit, UNIT / result.unit


def slice_values(whole, gain, mask):
    """The closed form: the slices of the brain and the nearest millimetre, without noise."""
    near = ndimage.distance_transform_edt(~mask) <= NEAR_MM
    seen = SD**2 / THICK
    given = gain * block_mean(whole * near, (1, 1, THICK))
    return np.repeat(given, THICK, axis=2) * seen / (seen + NOISE**2)


@pytest.mark.parametrize("bright", [0.0, 0.3, 1.2])
def test_what_lies_beyond_is_subtracted_from_the_slices_at_the_border(bright):
    """The closed form holds up to the border of the brain, for a stripped scan (brightness 0) too,
    and nothing is restored beyond it.
    """
    y, whole, mask = head(bright)
    image, gain = restored(y, mask)
    error = np.abs(image - slice_values(whole, gain, mask))[mask]
    assert np.sqrt(np.square(error).mean()) < 1.5 * NOISE * gain
    assert error.max() < 0.15 * gain  # where the average includes the air around the head
    assert not image[~mask].any()


def test_what_is_far_away_is_not_given():
    """A bright spot 10 mm from the brain, in the slices of the brain, changes nothing in it."""
    y, _, mask = head()
    other = y.copy()
    far = ndimage.distance_transform_edt(~mask)[:, :, ::THICK] > 9
    other[far] += 20.0
    one, _ = restored(y, mask)
    two, _ = restored(other, mask)
    np.testing.assert_allclose(one[mask], two[mask], atol=1e-3)


def test_beside_another_tools_image_the_brain_alone_is_given():
    """That image does not show the surroundings; this one is so uncertain that it says nothing."""
    y, whole, mask = head()
    truth = whole * mask
    image, gain = restored(y, mask, image=truth.astype(np.float32), trust=100.0)
    share = np.repeat(block_mean(mask.astype(float), (1, 1, THICK)), THICK, axis=2)
    border = mask & (share < 0.9)
    inner = ndimage.binary_erosion(mask, iterations=5)
    exact = slice_values(whole, gain, mask)
    np.testing.assert_allclose(image[inner], exact[inner], atol=6 * NOISE * gain)
    assert np.abs(image - exact)[border].mean() > 0.05
