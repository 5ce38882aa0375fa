# SPDX-License-Identifier: Apache-2.0
"""Anatomy at large: a second network, on brains averaged to 2 mm and to 4 mm, next to the prior's.

A network on 1 mm voxels learns texture and edges; where nothing is measured over centimetres (a
large hole, or no data at all), it knows hardly which anatomy belongs there. The coarse network is
the same U-Net, trained on means of blocks of 2 x 2 x 2 and of 4 x 4 x 4 voxels. The means over
blocks of edge a are one band of further Haar levels: white noise of SD sigma in the image is white
noise of SD sigma a^(-3/2) in them, so that the coarse network denoises the same chain. With P the
mean over blocks, D the answer so far and C the coarse network's, the answer becomes

    D(x_t) + U w (C(P x_t) - P D(x_t)),   P U = 1, U smooth,

at 2 mm first, then at 4 mm. The weight w of each has been measured on validation brains: it
minimises the error of the means. It is near 1 at high noise and 0 at low noise, where the fine
network sees more. Given a scan with hidden voxels (``voxels``), C is conditioned on the means of
the measured ones, and only blocks without any are corrected; w then rises with the share of the
surroundings that is hidden, because the fine network continues well what is measured nearby. Given
slices, the fine network's answer stands.
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

EDGES = (2, 4)
"""Edges of the blocks, in restored voxels, in the order of the corrections."""
WIDEST = max(EDGES)
LEAST_NOISE = 0.004
"""Smallest noise SD of a scan on which the coarse network was trained."""
LEAST_WEIGHT = 0.02
"""Below this weight the coarse network is not asked."""
FREE = "free"
"""Kind of weights where nothing is measured."""
SHARES = {"20 %": 0.2, "40 %": 0.4, "60 %": 0.6, "80 %": 0.8}
"""Kinds of weights in holes, by the hidden share of the surroundings; linear between them."""
AROUND_MM = 6.0
"""SD of the Gaussian that weights the surroundings."""
MEAN_GRID = Grid(
    (48, 58, 50), np.array([[4.0, 0, 0, -94], [0, 4.0, 0, -132], [0, 0, 4.0, -92], [0, 0, 0, 1]])
)
"""Grid of the mean brains, MNI305 mm."""


def noise_factor(edge: int) -> float:
    """SD of white noise in the mean of a block, relative to that of a voxel."""
    return float(edge**-1.5)


def coarse_matrix(matrix: NDArray[np.float64], edge: int) -> NDArray[np.float64]:
    """(4, 4) from voxels to mm -> from blocks of ``edge`` voxels to mm."""
    block = np.diag([float(edge)] * 3 + [1.0])
    block[:3, 3] = (edge - 1) / 2
    return np.asarray(matrix @ block)


def block_means(volume: Tensor, edge: int) -> Tensor:
    """(n, c, i, j, k) -> (n, c, i/edge, j/edge, k/edge); P."""
    return F.avg_pool3d(volume, edge)


@cache
def _interpolation(n: int, edge: int) -> Tensor:
    """(edge n, n) float64: from means of blocks to voxels, piecewise linear, with these means."""
    linear = F.interpolate(
        torch.eye(n, dtype=torch.float64)[None], scale_factor=float(edge), mode="linear"
    )[0].T
    means = F.avg_pool1d(linear.T[None], edge)[0].T
    matrix: Tensor = linear @ torch.linalg.inv(means)
    return matrix


def smooth_field(means: Tensor, edge: int) -> Tensor:
    """(n, 1, i, j, k) -> (n, 1, edge i, edge j, edge k): continuous, with these means; U."""
    field = means
    for axis in (2, 3, 4):
        matrix = _interpolation(field.shape[axis], edge).to(field)
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


Weights = Mapping[str, Sequence[tuple[float, float]]]
"""``FREE`` and the names of ``SHARES`` -> pairs (sigma, w), sigma of the image, ascending."""


class Coarse:
    """The coarse network and its weights.

    Parameters
    ----------
    prior : Denoiser
        Trained on means of blocks of ``EDGES``.
    weights : mapping
        Edge -> weights; blocks of other edges are not corrected.
    brains : MeanBrains
    """

    def __init__(
        self, prior: Denoiser, weights: Mapping[int, Weights], brains: MeanBrains
    ) -> None:
        self.prior, self.brains = prior, brains
        self._weights = {
            edge: {kind: np.asarray(kinds[kind], float) for kind in (FREE, *SHARES)}
            for edge, kinds in weights.items()
        }
        every = [pairs[0, 0] for kinds in self._weights.values() for pairs in kinds.values()]
        self._least_sigma = min(every, default=math.inf)

    @property
    def card(self) -> dict[str, Any]:
        """Name and SHA-256 of the weights, for a record."""
        return {key: self.prior.metadata[key] for key in ("name", "sha256")}

    def weight(self, edge: int, sigma: float, hidden: Tensor | None) -> Tensor:
        """w of blocks, as ``weight_map``; 0 below the lowest noise level at which it was measured.
        ``sigma`` is that of the image.
        """
        at = {
            kind: float(np.interp(math.log(sigma), np.log(pairs[:, 0]), pairs[:, 1], left=0.0))
            for kind, pairs in self._weights.get(edge, {}).items()
        }
        return weight_map(at, hidden)

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
        edge: int,
        coordinates: Tensor,
        contrast: str,
        measured: Voxels | None,
    ) -> Tensor:
        """C: the expected means of blocks, (n, 1, i/edge, j/edge, k/edge). Other arguments as
        ``Prior.denoise``; sizes are multiples of ``edge``.
        """
        given = None if measured is None else mean_scan(measured, edge)
        return self.denoise(
            block_means(x, edge),
            sigma * noise_factor(edge),
            coordinates=block_means(coordinates[None].float(), edge)[0],
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
        if isinstance(measured, Stack) or sigma < self._least_sigma:
            return answer
        i, j, k = (slice(n) for n in answer.shape[2:])
        padding: Padding = [(0, -n % WIDEST) for n in answer.shape[2:]]
        scan = measured.padded(padding) if isinstance(measured, Voxels) else None
        image, place = mirrored(x, padding), mirrored(coordinates[None].float(), padding)[0]
        result = answer
        for edge in EDGES:
            hidden = None if scan is None else hidden_around(scan, edge)
            weight = self.weight(edge, sigma, hidden).to(answer)
            if float(weight.max()) < LEAST_WEIGHT:
                continue
            means = self.means(
                image, sigma, edge=edge, coordinates=place, contrast=contrast, measured=scan
            ).to(answer)
            change = weight * (means - block_means(mirrored(result, padding), edge))
            field = smooth_field(change, edge)
            if scan is not None:
                field = field * scan.hidden.to(field)
            result = result + field[:, :, i, j, k]
        return result


def weight_map(weights: Mapping[str, float], hidden: Tensor | None) -> Tensor:
    """The weight of each block.

    Parameters
    ----------
    weights : mapping
        ``FREE`` and the names of ``SHARES`` -> weight; 0 if absent.
    hidden : tensor, optional
        Of ``hidden_around``; the weight is 0 at 0. None: nothing is measured.
    """
    if hidden is None:
        return torch.tensor(weights.get(FREE, 0.0))
    values = [weights.get(kind, 0.0) for kind in SHARES]
    found = np.interp(hidden.numpy(), list(SHARES.values()), values)
    return torch.from_numpy(found).float() * (hidden > 0)


def hidden_around(scan: Voxels, edge: int) -> Tensor:
    """(1, 1, i/edge, j/edge, k/edge): share of the surroundings that is hidden, for blocks without
    measurements; 0 for the others.
    """
    unseen = _hidden_share(scan, edge)[0, 0].cpu().numpy() == 1
    share = ndimage.gaussian_filter(unseen.astype(np.float32), AROUND_MM / edge, mode="nearest")
    return torch.from_numpy(np.where(unseen, share, 0))[None, None]


def _hidden_share(scan: Voxels, edge: int) -> Tensor:
    """(1, 1, i/edge, j/edge, k/edge): share of each block's voxels that are hidden."""
    return block_means(scan.hidden.double()[None, None], edge)


def mean_scan(scan: Voxels, edge: int) -> Voxels:
    """The means of blocks of a scan; blocks of which less than half is measured are hidden."""
    measured = 1 - _hidden_share(scan, edge)[0, 0]
    sums = block_means((scan.y.double() * ~scan.hidden)[None, None], edge)[0, 0]
    y = (sums / measured.clamp_min(1e-6)).float()
    noise_sd = max(scan.noise_sd * noise_factor(edge), LEAST_NOISE)
    return Voxels(y, measured < 0.5, noise_sd)
