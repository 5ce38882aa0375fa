# SPDX-License-Identifier: Apache-2.0
"""Resampling by k-space: what a scanner does within a slice.

A coarser in-plane matrix keeps the low spatial frequencies of a finer one. The outer edges of
the two grids meet, so that their first voxel centres differ by half the difference of their
voxel sizes; that shift is a phase.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError


def kept_frequencies(n_fine: int, n_coarse: int) -> Tensor:
    """Integer frequencies (cycles per field of view) that both grids represent, in FFT order.

    All of them if the sizes agree; otherwise without the Nyquist frequency, whose phase a real
    image of even size cannot represent.
    """
    if n_coarse > n_fine:
        raise GeometryError(
            f"kept_frequencies: the data ({n_coarse} voxels) are finer than the image ({n_fine}). "
            "Reduce them to the image's grid first."
        )
    frequency: Tensor = torch.fft.fftfreq(n_coarse, d=1 / n_coarse).round().long()
    if n_coarse == n_fine:
        return frequency
    return frequency[2 * frequency.abs() < n_coarse]


def resampling_matrix(n_in: int, n_out: int) -> Tensor:
    """The dense (n_out, n_in) float64 matrix of k-space resampling to fewer or more voxels.

    Rows sum to 1. Resampling to more voxels is trigonometric interpolation, to fewer a k-space
    crop.
    """
    k = kept_frequencies(max(n_in, n_out), min(n_in, n_out)).to(torch.float64)
    if n_in == n_out:
        return torch.eye(n_in, dtype=torch.float64)
    position_in = (torch.arange(n_in, dtype=torch.float64) + 0.5) / n_in
    position_out = (torch.arange(n_out, dtype=torch.float64) + 0.5) / n_out
    phase = 2 * math.pi * k * (position_out[:, None, None] - position_in[None, :, None])
    return phase.cos().sum(-1) / n_in
