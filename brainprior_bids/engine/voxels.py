# SPDX-License-Identifier: Apache-2.0
"""The linear posterior given a scan on the restored grid, with hidden voxels, and a noisy image.

``y = x + n`` in the voxels that were measured, nothing in the hidden ones (a lesion, the part
beyond the field of view), and ``x_t = x + sigma e`` everywhere. The pair is one image
``u = x + N(0, C)``, C diagonal over the voxels:

    C = 1 / (1 / sigma² + 1 / n²) where measured, sigma² where hidden

As in ``stacks``, a network that has learned ``E[x | u]`` for such C receives the linear estimate w
and returns the remainder; see there for the symbols. Haar blocks of 2 x 2 x 2 voxels that are all
measured or all hidden have a diagonal K; at the border of a hole, K is an 8 x 8 matrix for each
block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.errors import InputError, ShapeMismatchError
from brainprior_bids.engine.measured import Padding
from brainprior_bids.engine.unet import FEATURES, from_bands, haar_matrix, to_bands


@dataclass(frozen=True, eq=False)
class Voxels:
    """A scan on the grid of the restored image.

    Parameters
    ----------
    y : (i, j, k) float32 tensor
        Engine unit, bias-free; anything finite where hidden.
    hidden : (i, j, k) bool tensor
        True where nothing was measured.
    noise_sd : float
        Noise SD of a measured voxel.

    Raises
    ------
    InputError
        If the noise SD is not above 0.
    ShapeMismatchError
        If y and hidden disagree.
    """

    y: Tensor
    hidden: Tensor
    noise_sd: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_sd) and self.noise_sd > 0):
            raise InputError(f"Voxels: noise SD must be above 0, got {self.noise_sd}.")
        if self.y.ndim != 3 or self.y.shape != self.hidden.shape:
            raise ShapeMismatchError(
                f"Voxels: y and hidden must be (i, j, k) alike, got {tuple(self.y.shape)} and "
                f"{tuple(self.hidden.shape)}."
            )

    def posterior(
        self, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> VoxelPosterior:
        """See ``measured.Measured``."""
        return VoxelPosterior(self, band_sd, sigma, device)

    def padded(self, padding: Padding) -> Voxels:
        """See ``measured.Measured``; the new ends are hidden."""
        ends = [end for both in reversed(padding) for end in both]
        return Voxels(F.pad(self.y, ends), F.pad(self.hidden, ends, value=True), self.noise_sd)


def _blocks(volume: Tensor) -> Tensor:
    """(i, j, k) -> (8, i/2, j/2, k/2), the voxels of each block in i, j, k order."""
    i, j, k = volume.shape
    apart = volume.reshape(i // 2, 2, j // 2, 2, k // 2, 2).permute(1, 3, 5, 0, 2, 4)
    return apart.reshape(8, i // 2, j // 2, k // 2)


class VoxelPosterior:
    """``Voxels`` at one noise level: a ``measured.BandPosterior``.

    Parameters
    ----------
    voxels : Voxels
        Even sizes.
    band_sd : (8,) tensor
        s_b.
    sigma : float
        Noise of x_t.
    device : torch.device
        Where the images are.
    """

    def __init__(
        self, voxels: Voxels, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> None:
        self.voxels, self.sigma = voxels, float(sigma)
        hidden = voxels.hidden.to(device)
        alone, both = self.sigma**2, 1 / (1 / self.sigma**2 + 1 / voxels.noise_sd**2)
        self.hidden = hidden
        self.trust, self.rest = both / voxels.noise_sd**2, both / self.sigma**2  # sum 1
        self.y = voxels.y.float().to(device)
        blocks = _blocks(hidden)
        count = blocks.sum(0)
        self.border = (count > 0) & (count < 8)  # (i/2, j/2, k/2)
        square = band_sd.double().to(device).square()[:, None, None, None]
        c = torch.where(count == 8, alone, both)
        variance = square * c / (square + c)  # (8, i/2, j/2, k/2)
        self.skip = (square / (square + c)).float()
        # the border: K = S - S (S + H C H^T)^-1 S, one 8 x 8 matrix a block
        haar = haar_matrix().double().to(device)
        spread = torch.diag(square.flatten())
        noise = torch.where(blocks[:, self.border].T, alone, both)  # (m, 8)
        total = spread + haar @ (noise[..., None] * haar.T)
        skip = torch.linalg.solve(total, spread.expand_as(total)).mT  # S total^-1
        k = spread - skip @ spread
        values, vectors = torch.linalg.eigh(0.5 * (k + k.mT))
        root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
        # Voxels -> bands of w. A hidden voxel of x_t is of the order of sigma and counts little;
        # bands of the block would mix it with the measured ones, whose digits float32 then loses.
        self.border_skip, self.border_root = (skip @ haar).float(), root.float()
        self.root = variance.sqrt().float()
        variance[:, self.border] = k.diagonal(dim1=1, dim2=2).T
        self.c_out = variance.mean((1, 2, 3)).sqrt().float()
        explained = square.flatten() - (square * both / (square + both)).flatten()
        self.c_in = explained.clamp_min(1e-24).rsqrt().float()  # as where it was measured

    def features(self) -> Tensor:
        """(8,): the log noise; no slices."""
        row = torch.zeros(FEATURES)
        row[3] = math.log(self.voxels.noise_sd) / 4
        return row

    def estimate(self, noisy: Tensor) -> Tensor:
        """(8, i, j, k) bands of x_t -> those of w."""
        with torch.autocast(noisy.device.type, enabled=False):
            image = from_bands(noisy.float()[None])[0, 0]
            measured = self.rest * image + self.trust * self.y
            together = torch.where(self.hidden, image, measured)
            result = self.skip * to_bands(together[None, None])[0]
            own = _blocks(together)[:, self.border].T[..., None]  # (m, 8, 1)
            result[:, self.border] = (self.border_skip @ own)[..., 0].T
            return result

    def spread_out(self, unit: Tensor) -> Tensor:
        """(8, i, j, k) -> K^1/2 of it."""
        with torch.autocast(unit.device.type, enabled=False):
            result = self.root * unit.float()
            own = unit.float()[:, self.border].T[..., None]  # (m, 8, 1)
            result[:, self.border] = (self.border_root @ own)[..., 0].T
            return result

    def unknown_map(self, shape: tuple[int, ...]) -> Tensor:
        """(1, 1, i, j, k): sqrt(C) / sigma."""
        ratio = 1 / math.sqrt(1 + (self.sigma / self.voxels.noise_sd) ** 2)
        return torch.where(self.hidden, 1.0, ratio).reshape(1, 1, *shape)
