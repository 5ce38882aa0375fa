# SPDX-License-Identifier: Apache-2.0
"""From the 1 mm grid along a scan's axes to the scan's voxels: profiles, shares, grids.

The scan's grid and its 1 mm grid share their outer edges. Axes of the scan that are finer than the
image are first reduced to it by a k-space crop: the prior has no finer detail than 1 mm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.box import Box, Triple
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import (
    SliceProfile,
    boxcar_profile,
    slice_weights,
)

THREE_D = 1.25
"""Slices whose spacing is at most this times the in-plane voxel size are encoded in k-space
(3-D)."""


def triple(values: tuple[int, ...] | torch.Size) -> Triple:
    """Three integers."""
    return int(values[0]), int(values[1]), int(values[2])


def is_3d(grid: Grid, acquisition: Acquisition) -> bool:
    """Whether the slices are those of a 3-D scan, encoded in k-space."""
    axis = acquisition.slice_axis
    spacing = float(grid.spacing_mm[axis])
    in_plane = max(float(s) for a, s in enumerate(grid.spacing_mm) if a != axis)
    return spacing <= THREE_D * max(in_plane, 1.0) and abs(acquisition.gap_mm) < 0.1 * spacing


def sensitivity(
    grid: Grid, acquisition: Acquisition, data_shape: Triple, thickness_factor: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """The slice weights, and for each axis a non-negative version of a data voxel's profile.

    Parameters
    ----------
    data_shape : (i', j', k')
        Voxels of the scan after ``reduce_to``.
    thickness_factor : float
        Ratio of assumed to stated slice thickness; ignored for 3-D scans.

    Returns
    -------
    (n_slices, n_thin) float64 tensor, and three such matrices
        Over the whole field of view.
    """
    axis, fine = acquisition.slice_axis, grid.one_millimetre()

    def matrix(a: int, profile: object) -> Tensor:
        extent = float(fine.extent_mm[a])
        return slice_weights(
            profile,  # type: ignore[arg-type]
            n_slices=data_shape[a],
            spacing_mm=extent / data_shape[a],
            n_thin=fine.shape[a],
            thin_mm=extent / fine.shape[a],
        )

    boxes = [boxcar_profile(float(fine.extent_mm[a]) / data_shape[a]) for a in range(3)]
    weights = [matrix(a, boxes[a]) for a in range(3)]
    if is_3d(grid, acquisition):
        return resampling_matrix(fine.shape[axis], data_shape[axis]), weights
    weights[axis] = matrix(axis, acquisition.cumulative(thickness_factor))
    return weights[axis], weights


def brain_share(mask_1mm: Tensor, seen: list[Tensor]) -> Tensor:
    """(i', j', k') share of each data voxel's profile that lies in the brain, 0 to 1."""
    share = mask_1mm
    for axis, weights in enumerate(seen):
        share = SliceProfile(weights, tuple(share.shape), axis)(share)
    return share.clamp(0, 1)


def reduce_to(volume: Tensor, fine_shape: Triple) -> tuple[Tensor, float]:
    """Bring axes that are finer than the image to its grid by a k-space crop.

    Only the low frequencies of the data carry information about the image. Returns the data, and
    the factor by which the crop lowers the SD of white noise.
    """
    factor = 1.0
    for axis in range(3):
        n, m = fine_shape[axis], volume.shape[axis]
        if m > n:
            volume = SliceProfile(resampling_matrix(m, n), tuple(volume.shape), axis)(volume)
            factor *= math.sqrt(n / m)
    return volume, factor


def to_scan_grid(part: Tensor, box: Box, data_shape: Triple, scan_shape: Triple) -> Tensor:
    """From the box of the data to the scan's grid, 0 outside; the reverse of ``reduce_to``."""
    whole = torch.zeros(data_shape)
    whole[box.data_slices] = part.cpu()
    for axis in range(3):
        n, m = whole.shape[axis], scan_shape[axis]
        if m > n:
            whole = SliceProfile(resampling_matrix(n, m), tuple(whole.shape), axis)(whole)
    return whole


def hidden_voxels(hidden: Tensor, data_shape: Triple) -> Tensor:
    """(i', j', k') bool: data voxels that contain any of the hidden voxels of the scan.

    Along the axes on which the scan was reduced, its k-space crop spreads a hidden voxel to its
    neighbours: there, one voxel more is hidden.
    """
    reach = [int(n != m) for n, m in zip(hidden.shape, data_shape, strict=True)]
    covered = F.adaptive_max_pool3d(hidden.float()[None, None], data_shape)
    return F.max_pool3d(covered, [2 * n + 1 for n in reach], 1, reach)[0, 0] > 0


def interpolate_field(volume: Tensor, shape: Triple) -> Tensor:
    """Linear interpolation between grids whose edges meet; for smooth fields."""
    if tuple(volume.shape) == tuple(shape):
        return volume
    return F.interpolate(volume[None, None], size=shape, mode="trilinear")[0, 0]


def with_rim(mask: Tensor, grid: Grid, rim_mm: float) -> Tensor:
    """1 where the mask is above 0 or no further than ``rim_mm`` away; without a rim, the mask.

    Raises
    ------
    UsageError
        If the rim is negative or not finite.
    """
    if not 0 <= rim_mm < math.inf:
        raise UsageError(f"restore: rim_mm must be at least 0, got {rim_mm}.")
    reach = [int(rim_mm / s) for s in grid.spacing_mm]
    if not any(reach):
        return mask
    steps = torch.meshgrid(
        *(torch.arange(-n, n + 1) * s for n, s in zip(reach, grid.spacing_mm, strict=True)),
        indexing="ij",
    )
    ball = (torch.stack(steps).norm(dim=0) <= rim_mm).float()
    touched = F.conv3d((mask > 0).float()[None, None], ball[None, None], padding=reach)[0, 0]
    return (touched > 0.5).float()


def relative_positions(
    box: Box, shape: Triple, fine_shape: Triple, part: tuple[slice, ...]
) -> list[Tensor]:
    """Positions along each axis (0 and 1 at the box's edges) of the voxels ``part`` of a grid of
    ``shape`` that spans the field of view."""
    positions = []
    for a in range(3):
        index = torch.arange(shape[a], dtype=torch.float64)[part[a]]
        at = (index + 0.5) * fine_shape[a] / shape[a]  # in 1 mm voxels from the edge
        positions.append((at - box.start[a]) / (box.stop[a] - box.start[a]))
    return positions
