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
from brainprior_bids.engine.operators.base import LinearOperator, Shape


def kept_frequencies(n_fine: int, n_coarse: int) -> Tensor:
    """Integer frequencies (cycles per field of view) that both grids represent, in FFT order.

    All of them if the sizes agree; without the Nyquist frequency otherwise, whose phase a real
    image of even size cannot hold.
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

    Rows sum to 1. To more voxels it is trigonometric interpolation, to fewer a k-space crop.
    """
    k = kept_frequencies(max(n_in, n_out), min(n_in, n_out)).to(torch.float64)
    if n_in == n_out:
        return torch.eye(n_in, dtype=torch.float64)
    position_in = (torch.arange(n_in, dtype=torch.float64) + 0.5) / n_in
    position_out = (torch.arange(n_out, dtype=torch.float64) + 0.5) / n_out
    phase = 2 * math.pi * k * (position_out[:, None, None] - position_in[None, :, None])
    return phase.cos().sum(-1) / n_in


class FourierResample(LinearOperator):
    """K-space resampling of one axis by FFT: ``(..., n_in, ...) -> (..., n_out, ...)``.

    The same map as ``resampling_matrix``, at the price of an FFT.
    """

    def __init__(self, in_shape: Shape, axis: int, n_out: int) -> None:
        self.in_shape = tuple(in_shape)
        self.axis = axis - len(in_shape)
        out = list(in_shape)
        out[axis] = n_out
        self.out_shape = tuple(out)
        n_in = in_shape[axis]
        self._k = kept_frequencies(max(n_in, n_out), min(n_in, n_out))
        self._shift = 0.5 / n_out - 0.5 / n_in

    def _map(self, x: Tensor, n_out: int, shift: float, scale: float) -> Tensor:
        moved = x.movedim(self.axis, -1)
        n_in = moved.shape[-1]
        if n_in == n_out:
            return x
        k = self._k.to(x.device)
        phase = torch.polar(
            torch.full_like(k, 1, dtype=x.dtype), (2 * math.pi * shift * k).to(x.dtype)
        )
        spectrum = torch.fft.fft(moved, dim=-1)[..., k % n_in] * phase
        full = torch.zeros(*moved.shape[:-1], n_out, dtype=spectrum.dtype, device=x.device)
        full[..., k % n_out] = spectrum
        out: Tensor = torch.fft.ifft(full, dim=-1).real * scale
        return out.movedim(-1, self.axis)

    def _forward(self, x: Tensor) -> Tensor:
        n_in, n_out = self.in_shape[self.axis], self.out_shape[self.axis]
        return self._map(x, n_out, self._shift, n_out / n_in)

    def _adjoint(self, y: Tensor) -> Tensor:
        # A = (n_out / n_in) F_out^-1 S F_in, so that A^T = F_in^-1 S^T F_out (unnormalised FFTs)
        return self._map(y, self.in_shape[self.axis], -self._shift, 1.0)
