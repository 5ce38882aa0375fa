# SPDX-License-Identifier: Apache-2.0
"""The rigid transform between two contrasts; two different brains are refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.contrasts import RestoredContrast, align_contrast
from brainprior_bids.anatomy.spaces import Kind, move
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid

SHAPE = (60, 70, 60)
CENTRE = np.array(SHAPE) / 2
MOTION = np.eye(4)
MOTION[:3, :3] = Rotation.from_rotvec(np.radians((4, -3, 5))).as_matrix()
MOTION[:3, 3] = CENTRE - MOTION[:3, :3] @ CENTRE + (4, -3, 2)


def contrast(name, seed, matrix=None, *, inverted=False):
    """Four tissues in a participant's ellipsoid, bright to dark or dark to bright."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3.5)
    away = (np.indices(SHAPE).T - CENTRE) / np.array([20.0, 25.0, 19.0])
    mask = (away**2).sum(-1).T < 1
    labels = np.where(mask, 1 + np.digitize(texture / texture.std(), (-0.7, 0, 0.7)), 0)
    bright = np.array([0, 900, 300, 500, 700.0] if inverted else [0, 200, 400, 600, 800.0])
    noisy = ndimage.gaussian_filter(bright[labels], 0.7) + rng.normal(0, 20, SHAPE)
    grid = Grid(SHAPE, np.eye(4))
    kinds = {Kind.IMAGE: noisy * mask, Kind.MASK: mask, Kind.LABELS: labels}
    images = []
    for kind, data in kinds.items():
        image = nib.Nifti1Image(data.astype(np.float32), grid.affine)
        images.append(image if matrix is None else move(image, grid, matrix, kind=kind))
    return RestoredContrast(name, *images)


def test_the_motion_between_two_contrasts_is_found():
    result = align_contrast(contrast("T1w", 1), contrast("T2w", 1, MOTION, inverted=True))
    corners = CENTRE + 30 * (np.indices((2, 2, 2)).reshape(3, -1).T - 0.5)
    off = result.to_reference @ MOTION - np.eye(4)
    assert np.linalg.norm(corners @ off[:3, :3].T + off[:3, 3], axis=1).max() < 0.3
    rotation = result.to_reference[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert result.shared > 0.95
    assert result.alike > 0.8
    assert result.certain


def test_another_person_is_refused_by_name():
    motion = align_contrast(contrast("T1w", 1), contrast("T2w", 2, inverted=True))
    assert not motion.certain
    text = motion.refusal("T1w", "T2w")
    assert text.startswith("T2w could not be registered to T1w: ")
    assert f"{100 * motion.alike:.0f} % of it has the same label" in text


def test_an_empty_mask_is_named():
    empty = contrast("T2w", 1)
    nothing = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    lost = RestoredContrast("T2w", empty.image, nothing, empty.structures)
    with pytest.raises(InputError, match=r"^T2w: the brain mask is empty"):
        align_contrast(contrast("T1w", 1), lost)
