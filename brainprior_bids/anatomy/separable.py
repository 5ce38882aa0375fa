# SPDX-License-Identifier: Apache-2.0
"""Between grids with common axes and edges: one matrix for each axis."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def averaging_matrix(n_in: int, n_out: int) -> NDArray[np.float32]:
    """(n_out, n_in) weights between two grids with common edges; rows sum to 1.

    To larger voxels: the mean over the voxel, each input voxel weighted by its overlap. To
    smaller voxels: linear interpolation between centres, constant beyond the outermost ones.
    """
    width = n_in / n_out  # of an output voxel, in input voxels
    centres = (np.arange(n_out) + 0.5) * width
    inputs = np.arange(n_in) + 0.5
    if width >= 1:
        low = np.maximum(centres[:, None] - width / 2, inputs - 0.5)
        high = np.minimum(centres[:, None] + width / 2, inputs + 0.5)
        weights = np.clip(high - low, 0, None)
    else:
        clipped = np.clip(centres, inputs[0], inputs[-1])
        weights = np.clip(1 - np.abs(clipped[:, None] - inputs), 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resample_separable(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(..., i, j, k) -> (..., *shape) between grids with common axes and edges."""
    for axis in (-1, -2, -3):
        if x.shape[axis] != shape[axis]:
            x = along(x, averaging_matrix(x.shape[axis], shape[axis]), axis)
    return x


def along(x: Tensor, matrix: NDArray[np.float32], axis: int) -> Tensor:
    """Apply an (m, n) matrix along one axis of length n."""
    weights = torch.from_numpy(np.ascontiguousarray(matrix))
    return torch.movedim(torch.movedim(x, axis, -1) @ weights.T, -1, axis)
