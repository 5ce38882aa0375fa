# SPDX-License-Identifier: Apache-2.0
"""How much a coarse network knows: its errors in large holes, and its weights next to a prior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.coarse import (
    COARSE_MM,
    FREE,
    HOLE,
    MEAN_GRID,
    Coarse,
    MeanBrains,
    block_means,
    sample_linear,
)
from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.unet import CONTRASTS
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.training.crops import Crops, matrix_points
from brainprior_bids.training.preprocess import Brain
from brainprior_bids.training.spectra import examples

DRAWN = 1200
"""Whole brains from which the mean brains are made."""
HOLES_MM = (20, 30, 45)
"""Diameters."""
CENTRES_MM = ((-28, 30, 22), (34, -60, 20), (-46, -20, -14), (20, -10, 8), (34, 14, 48))
"""MNI305 mm: frontal, parietal, temporal, central, precentral."""
NOISE_SD = 0.01
FREE_SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0)
HOLE_SIGMAS = (0.5, 1.0, 2.0, 4.0, 10.0, 100.0)
"""Noise levels at which the weights are measured."""


def mean_brains(crops: Crops, count: int = DRAWN) -> MeanBrains:
    """The mean of the first whole brains of a training, by contrast."""
    sums = {name: torch.zeros(2, *MEAN_GRID.shape) for name in CONTRASTS}
    points = torch.from_numpy(MEAN_GRID.points_mm()).float()
    for number in range(count):
        crop = crops[number]
        parts = sums[CONTRASTS[int(crop["contrast"])]]
        for total, volume in zip(
            parts, (crop["image"][0], torch.ones_like(crop["image"][0])), strict=True
        ):
            total += sample_linear(volume, points, crop["matrix"].double().numpy())
    sums["unknown"] = torch.stack(list(sums.values())).sum(0)  # any contrast
    return MeanBrains(
        {name: total / seen.clamp_min(1) for name, (total, seen) in sums.items() if seen.any()}
    )


@dataclass(frozen=True, eq=False)
class Example:
    """A validation brain: image (i, j, k), and MNI305 mm (3, i, j, k) of its voxels. Sizes are
    multiples of ``COARSE_MM``."""

    image: Tensor
    place: Tensor

    def holes(self, diameter_mm: float) -> Tensor:
        """(i, j, k) bool: spheres about ``CENTRES_MM``."""
        far = [(self.place - torch.tensor(c)[:, None, None, None]).norm(dim=0) for c in CENTRES_MM]
        return torch.stack(far).amin(0) < diameter_mm / 2


def whole_examples(brains: Sequence[Brain], contrast: str, limit: int) -> Iterator[Example]:
    """Brains with voxels of 1 mm."""
    for image, matrix in examples(brains, contrast, limit):
        padding = [n for size in reversed(image.shape) for n in (0, -size % COARSE_MM)]
        padded = F.pad(torch.from_numpy(image), padding)
        yield Example(
            padded, matrix_points(torch.from_numpy(matrix).float()[None], padded.shape)[0]
        )


def averaged(example: Example) -> Example:
    """The same with voxels of ``COARSE_MM``."""
    return Example(
        block_means(example.image[None, None])[0, 0], block_means(example.place[None])[0]
    )


def hole_errors(
    network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 4
) -> dict[str, float]:
    """RMS error of a coarse network's E[x | y] in spherical holes, by their diameter in mm."""
    squares: dict[int, list[float]] = {mm: [] for mm in HOLES_MM}
    generator = torch.Generator().manual_seed(11)
    for whole in whole_examples(brains, contrast, limit):
        example = averaged(whole)
        noise = torch.randn(2, *example.image.shape, generator=generator)
        for mm in HOLES_MM:
            hidden = example.holes(mm)
            answer = network.denoise(
                (example.image + 100 * noise[0])[None, None],
                100.0,
                coordinates=example.place,
                contrast=contrast,
                measured=Voxels(example.image + NOISE_SD * noise[1], hidden, NOISE_SD),
            )[0, 0]
            inside = hidden & (example.image > 0)
            squares[mm].append(float((answer - example.image)[inside].square().mean()))
    return {str(mm): round(float(np.mean(values)) ** 0.5, 4) for mm, values in squares.items()}


class Fit:
    """The weight of the coarse network's means that minimises their squared error.

    Attributes
    ----------
    errors : list of float
        Sums of the squared errors of the fine and of the coarse network, their product, count.
    """

    def __init__(self) -> None:
        self.errors = [0.0, 0.0, 0.0, 0.0]

    def add(self, fine: Tensor, coarse: Tensor) -> None:
        """Errors of the same means."""
        pairs = ((fine, fine), (coarse, coarse), (fine, coarse))
        sums = [float((a.double() * b.double()).sum()) for a, b in pairs]
        self.errors = [e + s for e, s in zip(self.errors, [*sums, fine.numel()], strict=True)]

    @property
    def weight(self) -> float:
        """Between 0 and 1."""
        fine, coarse, both, _ = self.errors
        apart = fine + coarse - 2 * both
        return min(max((fine - both) / apart, 0.0), 1.0) if apart > 0 else 0.0

    @property
    def rms(self) -> tuple[float, float]:
        """RMS errors of the fine and of the coarse network."""
        fine, coarse, _, count = self.errors
        return (fine / max(count, 1)) ** 0.5, (coarse / max(count, 1)) ** 0.5


def next_to(prior: Prior, network: Coarse, brains: Sequence[Brain]) -> dict[str, Any]:
    """Facts for the file of a coarse network: its ``weights`` (sigma, w), the RMS errors of both
    networks at which they were measured, and its errors in holes."""
    rows = measure_weights(prior, network, brains)
    return {
        "weights": {kind: [row[:2] for row in measured] for kind, measured in rows.items()},
        "rms_errors": {kind: [row[2:] for row in measured] for kind, measured in rows.items()},
        "next_to": prior.metadata.get("sha256"),
        "hole_errors": hole_errors(network, brains),
    }


def measure_weights(
    prior: Prior, network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 2
) -> dict[str, list[tuple[float, float, float, float]]]:
    """For ``FREE`` and ``HOLE``: (sigma, weight, RMS error of the fine and the coarse network).

    Parameters
    ----------
    prior : Prior
        The fine one, without a coarse network.
    network : Coarse
    """
    free = {sigma: Fit() for sigma in FREE_SIGMAS}
    hole = {sigma: Fit() for sigma in HOLE_SIGMAS}
    generator = torch.Generator().manual_seed(11)
    for example in whole_examples(brains, contrast, limit):
        noise = torch.randn(2, *example.image.shape, generator=generator)
        brain = block_means((example.image > 0).float()[None, None])[0, 0] > 0.5
        for sigma, fit in free.items():
            fit.add(
                *_errors(prior, network, example, sigma * noise[0], sigma, contrast, None, brain)
            )
        for mm in HOLES_MM:
            hidden = example.holes(mm)
            scan = Voxels(example.image + NOISE_SD * noise[1], hidden, NOISE_SD)
            open_blocks = block_means(hidden.float()[None, None])[0, 0] == 1
            for sigma, fit in hole.items():
                parts = (sigma * noise[0], sigma, contrast, scan, brain & open_blocks)
                fit.add(*_errors(prior, network, example, *parts))
    return {
        kind: [
            (sigma, round(fit.weight, 3), *(round(e, 4) for e in fit.rms)) for sigma, fit in fits
        ]
        for kind, fits in ((FREE, free.items()), (HOLE, hole.items()))
    }


def _errors(
    prior: Prior,
    network: Coarse,
    example: Example,
    noise: Tensor,
    sigma: float,
    contrast: str,
    scan: Voxels | None,
    where: Tensor,
) -> tuple[Tensor, Tensor]:
    """(n,) errors of the two networks' means of the blocks ``where``."""
    x = (example.image + noise)[None, None]
    place = example.place
    truth = block_means(example.image[None, None])[0, 0]
    fine = prior.denoise(x, sigma, coordinates=place, contrast=contrast, measured=scan)
    coarse = network.means(x, sigma, coordinates=place, contrast=contrast, measured=scan)
    return (block_means(fine)[0, 0] - truth)[where], (coarse[0, 0] - truth)[where]
