# SPDX-License-Identifier: Apache-2.0
"""The rigid motion between two scans of one brain; two different brains are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.motion import PlacedScan, common_mask, find_motion
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade

SHAPE = (60, 70, 60)
CENTRE = np.array(SHAPE) / 2


def brain(seed):
    """Blobs of about 8 mm in the ellipsoid of that participant."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3.5)
    radii = np.array([20.0, 25.0, 19.0]) * (1 + 0.03 * rng.normal(size=3))
    away = (np.indices(SHAPE).T - CENTRE) / radii
    return np.where((away**2).sum(-1).T < 1, 0.6 + 0.15 * texture / texture.std(), 0)


def motion(degrees, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees)).as_matrix()
    matrix[:3, 3] = CENTRE - matrix[:3, :3] @ CENTRE + shift
    return matrix


def stack(name, image, axis, matrix=None, gain=1.0):
    grid = Grid(SHAPE, np.eye(4))
    moved = image if matrix is None else resample(image, grid, grid, matrix=matrix)
    recipe = Recipe(axis=axis, spacing_mm=5.0, thickness_mm=5.0, noise_sd=0.03)
    data, own = degrade(
        moved.astype(np.float32), grid, recipe, np.random.default_rng(axis), unit=1.0
    )
    return PlacedScan(name, data * gain, own, Acquisition(axis, 5.0, 5.0), moved > 0.3)


TRUE = motion((4, -3, 5), (4, -3, 2))


@pytest.mark.parametrize(("axis", "most_mm"), [(0, 0.2), (2, 0.5)])
def test_the_motion_between_two_stacks_is_found(axis, most_mm):
    image = brain(1)
    reference = stack("one", image, 2)
    result = find_motion(reference, stack("two", image, axis, TRUE, gain=0.5))
    corners = CENTRE + 30 * (np.indices((2, 2, 2)).reshape(3, -1).T - 0.5)
    off = result.to_reference @ TRUE - np.eye(4)
    error = np.linalg.norm(corners @ off[:3, :3].T + off[:3, 3], axis=1).max()
    assert (
        error < most_mm
    )  # measured: 0.05 and 0.37, for blobs that are hardly resolved in 5 mm slices
    np.testing.assert_allclose(
        result.to_reference[:3, :3] @ result.to_reference[:3, :3].T, np.eye(3), atol=1e-9
    )
    assert result.gain == pytest.approx(2.0, rel=0.03)
    assert result.correlation > 0.9
    assert result.shared > 0.9
    assert result.angle_deg == pytest.approx(np.linalg.norm([4, -3, 5]), abs=1.0)
    assert result.shift_mm(CENTRE) == pytest.approx(np.linalg.norm([4, -3, 2]), abs=0.5)


def test_another_person_is_refused_by_name():
    with pytest.raises(InputError, match="two and one do not show the same brain"):
        find_motion(stack("one", brain(1), 2), stack("two", brain(2), 0, TRUE))


def test_scans_without_a_brain_in_common_are_refused():
    one = stack("one", brain(1), 2)
    empty = PlacedScan("two", one.data, one.grid, one.acquisition, np.zeros(SHAPE))
    with pytest.raises(InputError, match="two: the brain mask is empty"):
        find_motion(one, empty)


def test_the_common_mask_is_that_of_most_runs():
    image = brain(1)
    reference = stack("one", image, 2)
    grid = reference.grid.one_millimetre()
    ragged = np.array(reference.mask)
    ragged[:, :, :24] = False  # the reference's mask lacks the lower part
    reference = PlacedScan("one", reference.data, reference.grid, reference.acquisition, ragged)
    others = []
    for name, axis in (("two", 0), ("three", 1)):
        other = stack(name, image, axis, TRUE)
        others.append((other, find_motion(reference, other)))
    output = common_mask(reference, others) > 0
    truth = image > 0.3
    assert output.shape == grid.shape
    assert 2 * (output & truth).sum() / (output.sum() + truth.sum()) > 0.97


def test_a_lesion_is_not_compared_but_is_brain():
    """A lesion that is much brighter in one run would make two runs appear different."""
    image = brain(1)
    reference, other = stack("one", image, 2), stack("two", image, 0, TRUE)
    centre = CENTRE + np.array([8, 0, 0])
    where = np.linalg.norm(reference.grid.points_mm().T - centre, axis=-1).T < 9
    bright = np.where(where, 5.0, reference.data).astype(np.float32)
    lost = np.array(reference.mask) & ~resample(
        where, reference.grid, reference.grid.one_millimetre(), order=1
    ).astype(bool)
    damaged = replace(reference, data=bright, mask=lost)
    with pytest.raises(InputError, match="do not show the same brain"):
        find_motion(damaged, other)
    messages = replace(damaged, hidden=where)
    motion = find_motion(messages, other)
    assert motion.correlation > 0.9
    assert motion.gain == pytest.approx(1.0, rel=0.05)
    output = common_mask(messages, [(other, motion)]) > 0
    assert output[messages.lesion].all()
    assert messages.lesion.sum() == pytest.approx(where.sum() * 5, rel=0.2)  # slices of 5 mm
