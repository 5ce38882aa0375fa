# SPDX-License-Identifier: Apache-2.0
"""Anatomy at large: a second network, on brains averaged to 2 mm, next to the prior's.

A network on 1 mm voxels learns texture and edges; where nothing is measured over centimetres (a
large hole, or no data at all), it knows hardly which anatomy belongs there. The coarse network is
the same U-Net, trained on means of blocks of 2 x 2 x 2 voxels. These means are one band of a
further Haar level: white noise of SD sigma in the image is white noise of SD sigma / sqrt(8) in
them, so that the coarse network denoises the same chain. With P the mean over blocks, D the
prior's answer and C the coarse network's, the answer becomes

    D(x_t) + U w (C(P x_t) - P D(x_t)),   P U = 1, U smooth.

The weight w has been measured on validation brains: it minimises the error of the means. It is
near 1 at high noise and 0 at low noise, where the fine network sees more. Given a scan with hidden
voxels (``voxels``), C is conditioned on the means of the measured ones, and only blocks without
any are corrected; w then depends also on the hidden share of the surroundings, because the fine
network continues well what is measured nearby. Given slices, the fine network's answer stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.measured import Measured, Padding
from brainprior_bids.engine.stacks import Stack, mirrored
from brainprior_bids.engine.voxels import Voxels

EDGE = 2
"""Edge of a block in restored voxels."""
NOISE_FACTOR = EDGE**-1.5
"""SD of white noise in the mean of a block, relative to that of a voxel."""
LEAST_NOISE = 0.004
"""Smallest noise SD of a scan on which the coarse network was trained."""
LEAST_WEIGHT = 0.02
"""Below this weight the coarse network is not asked."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Hidden shares of the surroundings for which there are weights in holes; linear between them."""
AROUND_MM = 6.0
"""SD of the Gaussian that weights the surroundings."""
MEAN_GRID = Grid(
    (48, 58, 50), np.array([[4.0, 0, 0, -94], [0, 4.0, 0, -132], [0, 0, 4.0, -92], [0, 0, 0, 1]])
)
"""Grid of the mean brains, MNI305 mm."""


def block_means(volume: Tensor) -> Tensor:
    """(n, c, i, j, k) -> (n, c, i/2, j/2, k/2); P."""
    return F.avg_pool3d(volume, EDGE)


@cache
def _interpolation(n: int) -> Tensor:
    """(2 n, n) float64: from means of blocks to voxels, piecewise linear, with these means."""
    linear = F.interpolate(
        torch.eye(n, dtype=torch.float64)[None], scale_factor=float(EDGE), mode="linear"
    )[0].T
    means = F.avg_pool1d(linear.T[None], EDGE)[0].T
    matrix: Tensor = linear @ torch.linalg.inv(means)
    return matrix


def smooth_field(means: Tensor) -> Tensor:
    """(n, 1, i, j, k) -> (n, 1, 2 i, 2 j, 2 k): continuous, with these means; U."""
    field = means
    for axis in (2, 3, 4):
        matrix = _interpolation(field.shape[axis]).to(field)
        field = torch.tensordot(field, matrix, dims=([axis], [1])).movedim(-1, axis)
    return field


class MeanBrains:
    """The mean brain of the training data at each place of MNI305.

    The coarse network denoises the difference from it: where x_t says nothing, the answer is the
    mean brain, whatever the network has learned.

    Parameters
    ----------
    volumes : mapping
        Contrast -> ``MEAN_GRID`` tensor, image unit; "unknown" is required.

    Raises
    ------
    ShapeMismatchError
        If a volume has another shape, or "unknown" is missing.
    """

    def __init__(self, volumes: Mapping[str, Tensor]) -> None:
        wrong = {name: tuple(v.shape) for name, v in volumes.items() if v.shape != MEAN_GRID.shape}
        if wrong or "unknown" not in volumes:
            raise ShapeMismatchError(
                f"MeanBrains: expected volumes {MEAN_GRID.shape}, one of them 'unknown', got "
                f"{wrong or list(volumes)}."
            )
        self.volumes = {name: volume.float() for name, volume in volumes.items()}

    def at(self, coordinates: Tensor, contrast: str) -> Tensor:
        """(3, i, j, k) MNI305 mm -> (i, j, k), linear, 0 beyond the grid."""
        volume = self.volumes.get(contrast, self.volumes["unknown"])
        return sample_linear(volume.to(coordinates), coordinates, MEAN_GRID.affine)


def sample_linear(volume: Tensor, points: Tensor, affine: NDArray[np.float64]) -> Tensor:
    """Values of a volume (a, b, c) at points (3, i, j, k) in mm, (i, j, k); 0 outside."""
    inverse = torch.from_numpy(np.linalg.inv(affine)).to(points)
    voxels = torch.tensordot(inverse[:3, :3], points, dims=1) + inverse[:3, 3, None, None, None]
    extent = torch.tensor(volume.shape, device=points.device)[:, None, None, None] - 1
    at = (2 * voxels / extent - 1).flip(0).permute(1, 2, 3, 0)[None]
    return F.grid_sample(volume[None, None], at, mode="bilinear", align_corners=True)[0, 0]


class Denoiser(Protocol):
    """What ``Coarse`` requires of its network (``denoiser.Prior``)."""

    metadata: dict[str, Any]

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
    ) -> Tensor:
        """See ``denoiser.Prior``."""
        ...


class BlockWeights:
    """How far the means of blocks move towards the coarse network's.

    Parameters
    ----------
    free : sequence of (sigma, w)
        Where nothing is measured; sigma of the image, ascending.
    holes : sequence of (sigma, w, w, …)
        In holes, one weight for each of ``SHARES``.
    """

    def __init__(self, free: Sequence[Sequence[float]], holes: Sequence[Sequence[float]]) -> None:
        self._free = np.asarray(free, float).reshape(-1, 2)
        self._holes = np.asarray(holes, float).reshape(-1, 1 + len(SHARES))
        self.least_sigma = min([*self._free[:, 0], *self._holes[:, 0]], default=math.inf)
        """Lowest noise at which there are weights."""

    def at(self, sigma: float, hidden: Tensor | None) -> Tensor:
        """w of each block, 0 below the lowest noise at which it was measured.

        Parameters
        ----------
        sigma : float
        hidden : tensor, optional
            Of ``hidden_around``; the weight is 0 at 0. None: nothing is measured.
        """
        rows = self._free if hidden is None else self._holes
        if not len(rows) or sigma < rows[0, 0]:
            return torch.zeros(()) if hidden is None else torch.zeros(hidden.shape)
        values = [np.interp(math.log(sigma), np.log(rows[:, 0]), row) for row in rows.T[1:]]
        if hidden is None:
            return torch.tensor(values[0]).float()
        found = np.interp(hidden.numpy(), SHARES, values)
        return torch.from_numpy(found).float() * (hidden > 0)


class Coarse:
    """The coarse network and its weights.

    Parameters
    ----------
    prior : Denoiser
        Trained on means of blocks.
    weights : BlockWeights
    brains : MeanBrains
    """

    def __init__(self, prior: Denoiser, weights: BlockWeights, brains: MeanBrains) -> None:
        self.prior, self.weights, self.brains = prior, weights, brains

    @property
    def card(self) -> dict[str, Any]:
        """Name and SHA-256 of the weights, for a record."""
        return {key: self.prior.metadata[key] for key in ("name", "sha256")}

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Voxels | None = None,
    ) -> Tensor:
        """As ``Prior.denoise``, of the means of blocks."""
        mean = self.brains.at(coordinates.to(x), contrast)
        if measured is not None:
            measured = replace(measured, y=measured.y - mean.to(measured.y))
        rest = self.prior.denoise(
            x - mean, sigma, coordinates=coordinates, contrast=contrast, measured=measured
        )
        return mean + rest

    def means(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Voxels | None,
    ) -> Tensor:
        """C: the expected means of blocks, (n, 1, i/2, j/2, k/2). Arguments as ``Prior.denoise``;
        sizes are even.
        """
        given = None if measured is None else mean_scan(measured)
        return self.denoise(
            block_means(x),
            sigma * NOISE_FACTOR,
            coordinates=block_means(coordinates[None].float())[0],
            contrast=contrast,
            measured=given,
        )

    def correct(
        self,
        answer: Tensor,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
    ) -> Tensor:
        """The answer of both networks, or ``answer`` itself if the coarse network was not asked;
        arguments as ``Prior.denoise``.

        Parameters
        ----------
        answer : (n, 1, i, j, k) float32
            D, the fine network's.
        """
        if isinstance(measured, Stack) or sigma < self.weights.least_sigma:
            return answer
        padding: Padding = [(0, -n % EDGE) for n in answer.shape[2:]]
        scan = measured.padded(padding) if isinstance(measured, Voxels) else None
        weight = self.weights.at(sigma, None if scan is None else hidden_around(scan)).to(answer)
        if float(weight.max()) < LEAST_WEIGHT:
            return answer
        image, place = mirrored(x, padding), mirrored(coordinates[None].float(), padding)[0]
        means = self.means(image, sigma, coordinates=place, contrast=contrast, measured=scan)
        change = weight * (means.to(answer) - block_means(mirrored(answer, padding)))
        field = smooth_field(change)
        if scan is not None:
            field = field * scan.hidden.to(field)
        i, j, k = (slice(n) for n in answer.shape[2:])
        return answer + field[:, :, i, j, k]


def hidden_around(scan: Voxels) -> Tensor:
    """(1, 1, i/2, j/2, k/2): share of the surroundings that is hidden, for blocks without
    measurements; 0 for the others.
    """
    unseen = _hidden_share(scan)[0, 0].cpu().numpy() == 1
    share = ndimage.gaussian_filter(unseen.astype(np.float32), AROUND_MM / EDGE, mode="nearest")
    return torch.from_numpy(np.where(unseen, share, 0))[None, None]


def _hidden_share(scan: Voxels) -> Tensor:
    """(1, 1, i/2, j/2, k/2): share of each block's voxels that are hidden."""
    return block_means(scan.hidden.double()[None, None])


def mean_scan(scan: Voxels) -> Voxels:
    """The means of blocks of a scan; blocks of which less than half is measured are hidden."""
    measured = 1 - _hidden_share(scan)[0, 0]
    sums = block_means((scan.y.double() * ~scan.hidden)[None, None])[0, 0]
    y = (sums / measured.clamp_min(1e-6)).float()
    noise_sd = max(scan.noise_sd * NOISE_FACTOR, LEAST_NOISE)
    return Voxels(y, measured < 0.5, noise_sd)
