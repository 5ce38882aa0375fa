# SPDX-License-Identifier: Apache-2.0
"""The measurements on which a prior can be conditioned, in addition to a noisy image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Padding = Sequence[tuple[int, int]]
"""Voxels before and after each axis."""


class BandPosterior(Protocol):
    """A measurement at one noise level, as the network's preconditioning needs it. ``c_in`` (8,)
    scales the bands of the linear estimate to unit SD; ``c_out`` (8,) is the SD of the linear
    posterior.
    """

    c_in: Tensor
    c_out: Tensor

    def features(self) -> Tensor:
        """(8,) numbers that describe the measurement to the network."""
        ...

    def estimate(self, noisy: Tensor) -> Tensor:
        """(8, i, j, k) bands of x_t -> those of w = E[x | x_t, y] under independent bands."""
        ...

    def spread_out(self, unit: Tensor) -> Tensor:
        """(8, i, j, k) -> K^1/2 of it, K = Cov[x | x_t, y]."""
        ...

    def unknown_map(self, shape: tuple[int, ...]) -> Tensor:
        """(1, 1, i, j, k): remaining fraction of each voxel's noise, 0 to 1."""
        ...


class Measured(Protocol):
    """A measurement of the image itself, with white noise."""

    def posterior(
        self, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> BandPosterior:
        """The posterior together with an image with noise of SD ``sigma``; the bands have SDs
        ``band_sd``.
        """
        ...

    def padded(self, padding: Padding) -> Measured:
        """The same for an image that was padded at the ends of its axes, where nothing is
        measured.
        """
        ...


BandPosteriors = Sequence[BandPosterior | None] | None
"""For each image of a batch its measurements, if any."""
