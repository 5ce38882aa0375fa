# SPDX-License-Identifier: Apache-2.0
"""Averaged brains for the training of the coarse network; see ``engine.coarse``.

There are few brains, so every one is drawn in a new pose and smoothly deformed.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from brainprior_bids.training.preprocess import Brain

PARTS = 2
"""Of a block's edge: the brain is averaged to these, moved by linear interpolation, which blurs
them, and averaged to whole blocks, in which the blur hardly shows."""
ANGLE = 12.0
"""Largest rotation about each axis, degrees."""
SCALE = (0.9, 1.1)
WARP_MM, KNOTS_MM = 1.5, 20.0
"""SD of the deformation at its knots, and their distance."""


def averaged_brain(
    brain: Brain, table: NDArray[np.float32], size: int, edge: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A part of a brain about a random voxel of it, in a random pose.

    Parameters
    ----------
    brain : Brain
    table : (256,) float32 array
        Intensity of each stored value.
    size, edge : int
        Blocks along each axis, and their edge in mm, a multiple of ``PARTS``.
    rng : numpy.random.Generator

    Returns
    -------
    image, matrix
        (size, size, size) float32, and (4, 4) from its blocks to MNI305 mm, with the error of an
        estimated affine.
    """
    linear = Rotation.from_euler("xyz", rng.uniform(-ANGLE, ANGLE, 3), degrees=True).as_matrix()
    part = edge // PARTS
    linear = linear @ np.diag(part / rng.uniform(*SCALE, 3))
    mirrored = rng.random() < 0.5
    if mirrored:
        linear = linear @ np.diag([-1.0, 1.0, 1.0])
    fine = size * PARTS
    inside = np.argwhere(brain.data[::8, ::8, ::8])
    centre = 8 * inside[rng.integers(len(inside))] + rng.uniform(-4, 4, 3)
    to_brain = np.eye(4)  # part of a block -> voxel of the brain
    to_brain[:3, :3] = linear
    to_brain[:3, 3] = centre - linear @ np.full(3, (fine - 1) / 2)
    parts = _average(torch.from_numpy(table[brain.data])[None, None], part)
    at = _positions(to_brain, fine) + _warp(fine, part * fine, rng)
    moved = _sample(parts, (at - (part - 1) / 2) / part)
    image = _average(moved, PARTS)[0, 0].numpy()
    matrix = brain.to_mni305 @ to_brain @ of_blocks(PARTS)
    if mirrored:
        matrix = np.diag([-1.0, 1.0, 1.0, 1.0]) @ matrix  # left is still left
    error = np.eye(4)
    turn = Rotation.from_rotvec(rng.normal(0, 1, 3), degrees=True).as_matrix()
    error[:3, :3] = turn * rng.normal(1, 0.01, 3)
    error[:3, 3] = rng.normal(0, 2, 3)
    return image, error @ matrix


def of_blocks(edge: int) -> NDArray[np.float64]:
    """(4, 4) from blocks of ``edge`` voxels to voxels."""
    matrix = np.diag([float(edge)] * 3 + [1.0])
    matrix[:3, 3] = (edge - 1) / 2
    return matrix


def _average(volume: Tensor, edge: int) -> Tensor:
    """Means of blocks of ``edge`` voxels, after zeros at the ends."""
    padding = [n for size in reversed(volume.shape[2:]) for n in (0, -size % edge)]
    return F.avg_pool3d(F.pad(volume, padding), edge)


def _positions(to_brain: NDArray[np.float64], size: int) -> Tensor:
    """(size, size, size, 3) voxel of the brain for each voxel of the image."""
    matrix, axis = torch.from_numpy(to_brain).float(), torch.arange(size, dtype=torch.float32)
    steps = [axis[:, None] * matrix[:3, a] for a in range(3)]  # (size, 3) each
    along = steps[0][:, None, None] + steps[1][None, :, None] + steps[2][None, None]
    return along + matrix[:3, 3]


def _warp(size: int, extent_mm: float, rng: np.random.Generator) -> Tensor:
    """(size, size, size, 3) smooth displacement, mm."""
    count = max(round(extent_mm / KNOTS_MM), 1) + 1
    knots = torch.from_numpy(rng.normal(0, WARP_MM, (1, 3, count, count, count))).float()
    field = F.interpolate(knots, size=(size,) * 3, mode="trilinear", align_corners=True)
    return field[0].permute(1, 2, 3, 0)


def _sample(volume: Tensor, at: Tensor) -> Tensor:
    """(1, 1, i, j, k) at (a, b, c, 3) voxels, linear, 0 outside."""
    extent = torch.tensor(volume.shape[2:]).float() - 1
    grid = (2 * at / extent - 1).flip(-1)[None]
    return F.grid_sample(volume, grid, mode="bilinear", align_corners=True)
