# SPDX-License-Identifier: Apache-2.0
"""How much a coarse network knows: its errors, and its weights next to a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.coarse import (
    EDGE,
    MEAN_GRID,
    NOISE_FACTOR,
    SHARES,
    Coarse,
    MeanBrains,
    block_means,
    hidden_around,
    sample_linear,
)
from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.unet import CONTRASTS
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.training.crops import Crops, matrix_points
from brainprior_bids.training.preprocess import Brain
from brainprior_bids.training.spectra import examples

DRAWN = 1200
"""Crops from which the mean brains are made."""
MEAN_EDGE = 4
"""Of their voxels, mm: a crop shows most of a brain."""
HOLES_MM = (12, 20, 30, 45)
"""Diameters."""
CENTRES_MM = ((-28, 30, 22), (34, -60, 20), (-46, -20, -14), (20, -10, 8), (34, 14, 48))
"""MNI305 mm: frontal, parietal, temporal, central, precentral."""
NOISE_SD = 0.01
FREE_SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0)
HOLE_SIGMAS = (0.5, 1.0, 2.0, 4.0, 10.0, 100.0)
"""Noise levels at which the weights are measured."""
ALL, SMOOTH = 100.0, (1.0, 4.0)
"""Noise levels of the quick check: E[x | y] in holes, and without data."""


def mean_brains(crops: Crops, count: int = DRAWN) -> MeanBrains:
    """The mean of the first crops of a training, by contrast; see ``MEAN_EDGE``."""
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
    """A validation brain: image (i, j, k), and MNI305 mm (3, i, j, k) of its voxels."""

    image: Tensor
    place: Tensor

    def holes(self, diameter_mm: float) -> Tensor:
        """(i, j, k) bool: spheres about ``CENTRES_MM``."""
        far = [(self.place - torch.tensor(c)[:, None, None, None]).norm(dim=0) for c in CENTRES_MM]
        return torch.stack(far).amin(0) < diameter_mm / 2


def whole_examples(brains: Sequence[Brain], contrast: str, limit: int) -> Iterator[Example]:
    """Brains with voxels of 1 mm and sizes that are multiples of ``EDGE``."""
    for image, matrix in examples(brains, contrast, limit):
        padding = [n for size in reversed(image.shape) for n in (0, -size % EDGE)]
        padded = F.pad(torch.from_numpy(image), padding)
        yield Example(
            padded, matrix_points(torch.from_numpy(matrix).float()[None], padded.shape)[0]
        )


def averaged(example: Example) -> Example:
    """The same with blocks for voxels."""
    return Example(
        block_means(example.image[None, None])[0, 0], block_means(example.place[None])[0]
    )


def errors(
    network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 4
) -> dict[str, float]:
    """RMS error of a coarse network's means: in spherical holes by their diameter, given the rest
    of the scan, and without data at ``SMOOTH`` noise of the image.

    Returns
    -------
    dict
        "hole 20", "noise 1", … -> error.
    """
    squares: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(11)
    for whole in whole_examples(brains, contrast, limit):
        example = averaged(whole)
        noise = torch.randn(2, *example.image.shape, generator=generator)
        asked = [(f"hole {mm}", ALL, example.holes(mm)) for mm in HOLES_MM]
        asked += [(f"noise {sigma:g}", sigma * NOISE_FACTOR, None) for sigma in SMOOTH]
        for name, sigma, hidden in asked:
            scan = None
            if hidden is not None:
                scan = Voxels(example.image + NOISE_SD * noise[1], hidden, NOISE_SD)
            answer = network.denoise(
                (example.image + sigma * noise[0])[None, None],
                sigma,
                coordinates=example.place,
                contrast=contrast,
                measured=scan,
            )[0, 0]
            inside = example.image > 0 if hidden is None else hidden & (example.image > 0)
            square = float((answer - example.image)[inside].square().mean())
            squares.setdefault(name, []).append(square)
    return {name: round(float(np.mean(values)) ** 0.5, 4) for name, values in squares.items()}


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


def blocks_by_share(hidden: Tensor | None, brain: Tensor) -> list[Tensor]:
    """The blocks of the brain on which each weight is measured: all if nothing is measured,
    otherwise one part for each of ``SHARES``, divided in the middle between them.
    """
    if hidden is None:
        return [brain]
    middles = [(low + high) / 2 for low, high in pairwise(SHARES)]
    bounds = [0.0, *middles, math.inf]
    return [brain & (hidden > low) & (hidden <= high) for low, high in pairwise(bounds)]


def next_to(prior: Prior, network: Coarse, brains: Sequence[Brain]) -> dict[str, Any]:
    """Facts for the file of a coarse network: its ``weights`` (see ``BlockWeights``); in the same
    form, the RMS errors of the prior and of the coarse network from which they follow; and its
    ``errors``.
    """
    found = measure_weights(prior, network, brains)

    def rows(value: Callable[[Fit], Any]) -> dict[str, list[list[Any]]]:
        return {
            kind: [[sigma, *map(value, fits)] for sigma, fits in by_sigma.items()]
            for kind, by_sigma in found.items()
        }

    return {
        "weights": rows(lambda fit: round(fit.weight, 3)),
        "rms_errors": rows(lambda fit: [round(error, 4) for error in fit.rms]),
        "next_to": prior.metadata.get("sha256"),
        "errors": errors(network, brains),
    }


def measure_weights(
    prior: Prior, network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 2
) -> dict[str, dict[float, list[Fit]]]:
    """Kind of weights ("free", "holes") -> noise level -> fits, as in ``BlockWeights``.

    Parameters
    ----------
    prior : Prior
        The fine one, without a coarse network.
    network : Coarse
    """
    free = {sigma: [Fit()] for sigma in FREE_SIGMAS}
    holes = {sigma: [Fit() for _ in SHARES] for sigma in HOLE_SIGMAS}
    generator = torch.Generator().manual_seed(11)
    for example in whole_examples(brains, contrast, limit):
        noise = torch.randn(2, *example.image.shape, generator=generator)
        image = example.image[None, None]
        truth, brain = block_means(image), block_means((image > 0).float()) > 0.5
        scans: list[Voxels | None] = [None]
        for mm in HOLES_MM:
            hidden = example.holes(mm)
            scans.append(Voxels(example.image + NOISE_SD * noise[1], hidden, NOISE_SD))
        for scan in scans:
            where = blocks_by_share(None if scan is None else hidden_around(scan), brain)
            for sigma, fits in (free if scan is None else holes).items():
                x = image + sigma * noise[0]
                fine = block_means(
                    prior.denoise(
                        x, sigma, coordinates=example.place, contrast=contrast, measured=scan
                    )
                )
                coarse = network.means(
                    x, sigma, coordinates=example.place, contrast=contrast, measured=scan
                )
                for fit, part in zip(fits, where, strict=True):
                    fit.add((fine - truth)[part], (coarse - truth)[part])
    return {"free": free, "holes": holes}
