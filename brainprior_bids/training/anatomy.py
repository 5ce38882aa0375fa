# SPDX-License-Identifier: Apache-2.0
"""How much a coarse network knows: its errors, and its weights next to a prior."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.coarse import (
    EDGES,
    FREE,
    MEAN_GRID,
    WIDEST,
    Coarse,
    MeanBrains,
    block_means,
    hidden_around,
    noise_factor,
    sample_linear,
    weight_map,
)
from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.unet import CONTRASTS
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.training.crops import Crops, matrix_points
from brainprior_bids.training.preprocess import Brain
from brainprior_bids.training.spectra import examples

DRAWN = 1200
"""Whole brains from which the mean brains are made."""
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
    """The mean of the first whole brains of a training, by contrast."""
    sums = {name: torch.zeros(2, *MEAN_GRID.shape) for name in CONTRASTS}
    points = torch.from_numpy(MEAN_GRID.points_mm()).float()
    whole = (number for number in itertools.count() if crops.edge(number) == WIDEST)
    for number in itertools.islice(whole, count):
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
    multiples of ``WIDEST``."""

    image: Tensor
    place: Tensor

    def holes(self, diameter_mm: float) -> Tensor:
        """(i, j, k) bool: spheres about ``CENTRES_MM``."""
        far = [(self.place - torch.tensor(c)[:, None, None, None]).norm(dim=0) for c in CENTRES_MM]
        return torch.stack(far).amin(0) < diameter_mm / 2


def whole_examples(brains: Sequence[Brain], contrast: str, limit: int) -> Iterator[Example]:
    """Brains with voxels of 1 mm."""
    for image, matrix in examples(brains, contrast, limit):
        padding = [n for size in reversed(image.shape) for n in (0, -size % WIDEST)]
        padded = F.pad(torch.from_numpy(image), padding)
        yield Example(
            padded, matrix_points(torch.from_numpy(matrix).float()[None], padded.shape)[0]
        )


def averaged(example: Example, edge: int) -> Example:
    """The same with voxels of ``edge`` mm."""
    return Example(
        block_means(example.image[None, None], edge)[0, 0],
        block_means(example.place[None], edge)[0],
    )


def errors(
    network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 4
) -> dict[str, float]:
    """RMS error of a coarse network's means: in spherical holes by their diameter, given the rest
    of the scan, and without data at ``SMOOTH`` noise of the image.

    Returns
    -------
    dict
        "2 mm hole 20", "4 mm noise 1", … -> error.
    """
    squares: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(11)
    for whole in whole_examples(brains, contrast, limit):
        for edge in EDGES:
            example = averaged(whole, edge)
            noise = torch.randn(2, *example.image.shape, generator=generator)
            asked = [(f"hole {mm}", ALL, example.holes(mm)) for mm in HOLES_MM]
            asked += [(f"noise {sigma:g}", sigma * noise_factor(edge), None) for sigma in SMOOTH]
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
                squares.setdefault(f"{edge} mm {name}", []).append(square)
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


SHARES_FROM = {"20 %": 0.0, "40 %": 0.3, "60 %": 0.5, "80 %": 0.7}
"""Hidden share of the surroundings from which each kind of weights is measured, to the next."""


class Fits:
    """Weights of all edges at one noise level, each next to the answer with those before it."""

    def __init__(self) -> None:
        self._cases: list[tuple[Tensor, Mapping[int, Tensor], Tensor, Voxels | None]] = []

    def add(
        self, fine: Tensor, means: Mapping[int, Tensor], image: Tensor, scan: Voxels | None
    ) -> None:
        """Answers for one example.

        Parameters
        ----------
        fine : (1, 1, i, j, k)
            The fine network's.
        means : mapping
            Edge -> the coarse network's means of blocks.
        image : (1, 1, i, j, k)
            The truth; the brain counts, where nothing is measured.
        scan : Voxels, optional
            What both were given.
        """
        self._cases.append((block_means(fine, EDGES[0]), means, image, scan))

    def fit(self) -> dict[int, dict[str, Fit]]:
        """Edge -> kind -> fit. The means of wide blocks are those of the corrected means of narrow
        ones: U preserves them.
        """
        found: dict[int, dict[str, Fit]] = {}
        answers, before = [fine for fine, *_ in self._cases], EDGES[0]
        for edge in EDGES:
            fits = {kind: Fit() for kind in (FREE, *SHARES_FROM)}
            answers, before = [block_means(a, edge // before) for a in answers], edge
            around = [None if s is None else hidden_around(s, edge) for *_, s in self._cases]
            for answer, hidden, (_, means, image, _) in zip(
                answers, around, self._cases, strict=True
            ):
                truth = block_means(image, edge)
                brain = block_means((image > 0).float(), edge) > 0.5
                for kind, where in blocks_by_kind(hidden, brain).items():
                    fits[kind].add((answer - truth)[where], (means[edge] - truth)[where])
            weights = {kind: fit.weight for kind, fit in fits.items()}
            answers = [
                answer + weight_map(weights, hidden) * (means[edge] - answer)
                for answer, hidden, (_, means, *_) in zip(
                    answers, around, self._cases, strict=True
                )
            ]
            found[edge] = fits
        return found


def blocks_by_kind(hidden: Tensor | None, brain: Tensor) -> dict[str, Tensor]:
    """Kind of weights -> the blocks of the brain on which it is measured."""
    if hidden is None:
        return {FREE: brain}
    upper = [*list(SHARES_FROM.values())[1:], math.inf]
    return {
        kind: brain & (hidden > low) & (hidden <= high)
        for (kind, low), high in zip(SHARES_FROM.items(), upper, strict=True)
    }


def next_to(prior: Prior, network: Coarse, brains: Sequence[Brain]) -> dict[str, Any]:
    """Facts for the file of a coarse network: edge -> its ``weights`` (sigma, w), and the RMS
    errors of the answer before and of the coarse network with which they were measured; and its
    errors.
    """
    fits = measure_weights(prior, network, brains)

    def table(row: Callable[[float, Fit], list[float]]) -> dict[str, dict[str, list[list[float]]]]:
        return {
            str(edge): {kind: [row(*pair) for pair in by.items()] for kind, by in kinds.items()}
            for edge, kinds in fits.items()
        }

    return {
        "weights": table(lambda sigma, fit: [sigma, round(fit.weight, 3)]),
        "rms_errors": table(lambda _, fit: [round(e, 4) for e in fit.rms]),
        "next_to": prior.metadata.get("sha256"),
        "errors": errors(network, brains),
    }


def measure_weights(
    prior: Prior, network: Coarse, brains: Sequence[Brain], contrast: str = "T1w", limit: int = 2
) -> dict[int, dict[str, dict[float, Fit]]]:
    """Edge -> kind of weights -> noise level -> fit.

    Parameters
    ----------
    prior : Prior
        The fine one, without a coarse network.
    network : Coarse
    """
    free, holes = ({sigma: Fits() for sigma in sigmas} for sigmas in (FREE_SIGMAS, HOLE_SIGMAS))
    generator = torch.Generator().manual_seed(11)
    for example in whole_examples(brains, contrast, limit):
        noise = torch.randn(2, *example.image.shape, generator=generator)
        scans: list[Voxels | None] = [None]
        for mm in HOLES_MM:
            hidden = example.holes(mm)
            scans.append(Voxels(example.image + NOISE_SD * noise[1], hidden, NOISE_SD))
        for scan in scans:
            for sigma, found in (free if scan is None else holes).items():
                x = (example.image + sigma * noise[0])[None, None]
                known = {"coordinates": example.place, "contrast": contrast, "measured": scan}
                fine = prior.denoise(x, sigma, **known)
                means = {edge: network.means(x, sigma, edge=edge, **known) for edge in EDGES}
                found.add(fine, means, example.image[None, None], scan)
    result: dict[int, dict[str, dict[float, Fit]]] = {edge: {} for edge in EDGES}
    for levels, kinds in ((free, (FREE,)), (holes, tuple(SHARES_FROM))):
        for sigma, found in levels.items():
            for edge, fits in found.fit().items():
                for kind in kinds:
                    result[edge].setdefault(kind, {})[sigma] = fits[kind]
    return result
