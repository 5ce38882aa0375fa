# SPDX-License-Identifier: Apache-2.0
"""The measurements that a prior can be conditioned on, beside a noisy image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class BandPosterior(Protocol):
    """A measurement and one noise level, as the network's preconditioning needs them.

    ``c_in`` (8,) scales the bands of the linear estimate to unit spread; ``c_out`` (8,) is the
    spread of what the linear estimate leaves.
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
        """(1, 1, i, j, k): the share of a voxel's noise that the measurement leaves, 0 to 1."""
        ...


class Measured(Protocol):
    """A measurement of the image itself, with white noise."""

    def posterior(
        self, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> BandPosterior:
        """Beside an image with noise of SD ``sigma``, the bands having spreads ``band_sd``."""
        ...

    def padded(self, padding: Sequence[int]) -> Measured:
        """The same of an image whose axes have grown at their ends: nothing measured there."""
        ...


BandPosteriors = Sequence[BandPosterior | None] | None
"""For each image of a batch what is known of it besides, if anything is."""
