# SPDX-License-Identifier: Apache-2.0
"""``brainprior train prior``: from brains to a denoiser, its error spectra, and a weights file.

EDM training (arXiv 2206.00364): ``F`` of the denoiser learns a target of unit variance at every
noise level, here in every Haar band, so fine detail counts as much as the local mean. Noise levels
are log-uniform in pieces; four of five are in 0.02-3, which determines the image between the
slices (the coarse network: in 0.15-40, where it is asked). Some crops come with a stack of slices
(``stacks``). The learning rate is constant after a warm-up and falls to 0 over the last steps, so
a training can be continued: increase ``--steps`` and rerun the command. All random numbers of a
crop are a function of the seed and the crop's number, so several processes (``torchrun``) with a
batch of B each take the same steps as one process with the sum of their batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from brainprior_bids.engine.coarse import EDGE, BlockWeights, Coarse, MeanBrains
from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior, fast_dtype
from brainprior_bids.engine.errors import UsageError, WeightsError
from brainprior_bids.engine.measured import BandPosterior
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.unet import CONTRASTS, UNet, coordinate_features, from_bands, to_bands
from brainprior_bids.engine.voxels import Voxels
from brainprior_bids.engine.weights import (
    FOLDER,
    MEAN,
    load_coarse,
    load_prior,
    prior_state,
    write_weights,
)
from brainprior_bids.training.anatomy import MEAN_EDGE, errors, mean_brains, next_to
from brainprior_bids.training.crops import Crops, matrix_points
from brainprior_bids.training.muon import Muon
from brainprior_bids.training.preprocess import (
    Brain,
    build_pack,
    build_synthetic_pack,
    read_pack,
)
from brainprior_bids.training.processes import Processes, join, leave
from brainprior_bids.training.samples import draw_samples
from brainprior_bids.training.spectra import gains, measure_spectra, spread_errors, stack_errors
from brainprior_bids.training.stacks import draw_voxels, log_uniform, slices_last
from brainprior_bids.training.surroundings import draw_stack_of_head

log = logging.getLogger(__name__)

CHECKPOINT, SPREAD_CHECKPOINT = "checkpoint.pt", "checkpoint-spread.pt"
"""Checkpoints in the work folder: of a training, and of the SD alone."""
LEVELS = 16
"""Noise levels at which the recent error is kept."""
BAND_WEIGHT = 0.3
ADDED = ("stack_hidden", "spread")
"""Parts of a ``UNet`` that start at 0, so that they can be added to a trained one."""
OUTSIDE = 0.05
"""Weight of a voxel outside of the restored region in the loss."""
PACED = 30
"""Steps after which a training with ``--minutes`` estimates the number of steps."""


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the result of a training.

    Parameters
    ----------
    steps, warmup, decay : int
        All steps; the first ones, with a rising learning rate; the last ones, with a falling one.
    batch, size : int
        Crops per step in each process, and their edge in voxels.
    learning_rate, weight_decay : float
        Shared by Muon and AdamW.
    ema : float
        Decay of the averaged weights per step, after a ramp.
    seed : int
    stacks, holes : float
        Share of the crops that come with a stack of slices, or with a scan that has a hole.
    conditioned_sigma : (float, float)
        Lowest and highest noise of those crops; at 100 the target is E[x | y].
    blind : float
        Share of those crops whose noise is the highest: the network learns E[x | y].
    slices_last : bool
        Slices are along the last axis of the network's input, irrespective of the axis of the
        brain, so that it distinguishes only through-plane and in-plane. (Not so in earlier
        weights.)
    channels, blocks : tuple of int
        Of the ``UNet``.
    stack_hidden : int
        Of the ``UNet``.
    spread : bool
        Train only the output for the SD of the error of E[x | y], of a network that is otherwise
        finished.
    surroundings : bool
        Stacks show the brain with its surroundings; see ``surroundings``. (Not so in earlier
        weights.)
    coarse : bool
        The coarse network: means of blocks of ``EDGE``; see ``engine.coarse``.
    """

    steps: int = 6000
    warmup: int = 100
    decay: int = 1500
    batch: int = 4
    size: int = 48
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-3
    ema: float = 0.999
    seed: int = 1
    stacks: float = 0.8
    holes: float = 0.1
    conditioned_sigma: tuple[float, float] = (0.02, 100.0)
    blind: float = 0.0
    slices_last: bool = True
    channels: tuple[int, ...] = (48, 96, 128)
    blocks: tuple[int, ...] = (2, 2, 2)
    stack_hidden: int = 128
    spread: bool = False
    surroundings: bool = True
    coarse: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = min(1.0, (self.steps - step) / max(self.decay, 1))
        return self.learning_rate * rise * max(fall, 0.0)


class Numbers(Sampler[int]):
    """The numbers of this process's crops in the steps first, first + 1, …, last - 1."""

    def __init__(self, first: int, last: int, batch: int, processes: Processes) -> None:
        self.steps, self.batch, self.processes = range(first, last), batch, processes

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = (step * self.processes.size + self.processes.rank) * self.batch
            yield from range(start, start + self.batch)

    def __len__(self) -> int:
        return len(self.steps) * self.batch


SIGMA_PIECES = ((0.005, 0.02, 0.1), (0.02, 3.0, 0.8), (3.0, 40.0, 0.1))
"""Lowest and highest noise level, share of the crops."""
COARSE_PIECES = ((0.15, 3.0, 0.75), (3.0, 40.0, 0.25))
"""The same for the coarse network, which is not asked at lower noise."""


def draw_sigmas(
    n: int,
    generator: torch.Generator,
    pieces: Sequence[tuple[float, float, float]] = SIGMA_PIECES,
) -> Tensor:
    """(n,) noise levels, stratified: log-uniform in each of ``pieces``."""
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    edges = [pieces[0][0], *(high for _, high, _ in pieces)]
    shares = np.cumsum([0.0, *(share for *_, share in pieces)])
    return torch.from_numpy(np.exp(np.interp(u.numpy(), shares, np.log(edges)))).float()


def measure_band_sd(crops: Crops, brains: MeanBrains | None = None, count: int = 48) -> Tensor:
    """(8,) root mean square of each Haar band over the first crops, or over their difference from
    the mean brain.
    """
    squares = []
    for n in range(count):
        crop = crops[n]
        image = crop["image"][None]
        if brains is not None:
            image = image - mean_of(brains, crop["matrix"], crop["contrast"], image.shape[2:])
        squares.append(to_bands(image).square().mean((0, 2, 3, 4)))
    return torch.stack(squares).mean(0).sqrt()


def mean_of(brains: MeanBrains, matrix: Tensor, contrast: Tensor, shape: Sequence[int]) -> Tensor:
    """(i, j, k) the mean brain at the place of a crop: its matrix (4, 4) and contrast ()."""
    return brains.at(matrix_points(matrix[None], shape)[0], CONTRASTS[int(contrast)])


class Pace:
    """Times the steps of a training, and smooths its loss.

    Attributes
    ----------
    steps : int
        Steps so far.
    """

    def __init__(self) -> None:
        self.steps, self._smooth, self._waited, self._spent, self._since = 0, 0.0, 0.0, 0.0, 0
        self._asked = time.monotonic()

    def next(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The next batch; measures the waiting time."""
        self._asked = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - self._asked
        return batch

    def end(self, loss: float) -> float:
        """End a step with this loss; returns its seconds."""
        took = time.monotonic() - self._asked
        self._smooth = loss if self.steps == 0 else 0.98 * self._smooth + 0.02 * loss
        self._spent, self.steps, self._since = self._spent + took, self.steps + 1, self._since + 1
        return took

    @property
    def seconds_a_step(self) -> float:
        """Mean since the last call of ``facts``."""
        return self._spent / max(self._since, 1)

    def facts(self) -> dict[str, float]:
        """Loss, time and wait of a step, the latter two since the last call."""
        facts = {
            "loss": round(self._smooth, 4),
            "seconds_a_step": round(self.seconds_a_step, 3),
            "waited": round(self._waited / max(self._since, 1), 3),
        }
        self._waited, self._spent, self._since = 0.0, 0.0, 0
        return facts


class Trainer:
    """A training that can be stopped and resumed.

    Parameters
    ----------
    brains : sequence of Brain
        Brains of the training split.
    recipe : Recipe
    work : Path
        Folder of the checkpoint and ``log.jsonl``.
    device : torch.device
    processes : Processes, optional
        The processes of this training; default: only this one.
    """

    def __init__(
        self,
        brains: Sequence[Brain],
        recipe: Recipe,
        work: Path,
        *,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.recipe, self.work, self.device = recipe, work, device
        self.checkpoint = work / (SPREAD_CHECKPOINT if recipe.spread else CHECKPOINT)
        self.processes = processes or Processes(0, 1, device)
        self.crops = Crops(
            brains,
            size=recipe.size,
            seed=recipe.seed,
            surroundings=recipe.surroundings,
            edge=EDGE if recipe.coarse else 1,
        )
        self.step, self.seconds = 0, 0.0
        self.begun_with: dict[str, Any] = {}
        self.recent = torch.zeros(3, LEVELS, 9)
        torch.manual_seed(recipe.seed)  # initial weights only
        conditioned = recipe.stacks + recipe.holes > 0
        network = UNet(
            recipe.channels,
            recipe.blocks,
            stacks=conditioned,
            stack_hidden=recipe.stack_hidden * conditioned,
            spread=recipe.spread,
        )
        if recipe.size < 6 * network.multiple or recipe.size % (2 * network.multiple):
            # below three voxels per axis, oneDNN's bfloat16 gradient of a convolution is wrong
            raise UsageError(
                f"a crop of {recipe.size} voxels does not fit {len(recipe.channels)} resolutions: "
                f"take a multiple of {2 * network.multiple} of at least {6 * network.multiple}."
            )
        self.brains = self._mean_brains() if recipe.coarse else None
        self.model = Precondition(network, measure_band_sd(self.crops, self.brains))
        self.average = Precondition(UNet(**network.config), self.model.band_sd)
        self.average.load_state_dict(self.model.state_dict())
        for model in (self.model, self.average):
            model.to(device, memory_format=torch.channels_last_3d)
            self.processes.share(model)
        self.optimisers = self._optimisers()
        self.dtype = fast_dtype(device)

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for inner convolutions; AdamW for everything else."""
        inner, rest = [], []
        rate, decay = self.recipe.learning_rate, self.recipe.weight_decay
        if self.recipe.spread:
            self.model.requires_grad_(False)
            head = self.model.network.spread_out.requires_grad_(True)
            return [torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)]
        for name, parameter in self.model.network.named_parameters():
            edge = name.startswith(("image_in.", "place_in.", "unknown_in.", "out."))
            (inner if parameter.ndim == 5 and not edge else rest).append(parameter)
        return [
            Muon(inner, lr=rate, weight_decay=decay),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=decay),
        ]

    def _mean_brains(self) -> MeanBrains:
        """The mean brains of this training, made once."""
        path = self.work / "means.pt"
        if self.processes.first and not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            recipe = self.recipe
            wide = Crops(self.crops.brains, size=recipe.size, seed=recipe.seed, edge=MEAN_EDGE)
            torch.save(mean_brains(wide).volumes, path)
        self.processes.wait()
        return MeanBrains(torch.load(path, weights_only=True))

    def resume(self) -> bool:
        """Resume from the checkpoint in the work folder; False if there is none.

        Raises
        ------
        UsageError
            If it was trained with slices along other axes than the engine uses.
        """
        path = self.checkpoint
        if not path.exists():
            return False
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["recipe"].get("slices_last", False) != self.recipe.slices_last:
            raise UsageError(
                f"{path}: this training did not see slices along the last axis; it cannot go on. "
                "Begin a new one in another folder: --begin-with and the weights it wrote."
            )
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.recent = saved["recent"].cpu()
        self.begun_with = saved.get("begun_with", {})
        return True

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a file instead of random ones.

        Parts of ``ADDED`` that its network lacks start at 0, which does not change the function.
        Its output for the SD is dropped if the rest is trained further, because it would no longer
        be correct.

        Raises
        ------
        WeightsError
            If it is not a prior, or its network is another one.
        """
        own = self.average.network.config
        theirs = load_coarse(path).prior if self.recipe.coarse else load_prior(path, coarse=False)
        inherited = theirs.model.network.config
        comparable = {k: v for k, v in inherited.items() if k in own or k != "spread"}
        if comparable != {k: v for k, v in own.items() if k in inherited or k not in ADDED}:
            raise WeightsError(f"{path}: its network is {inherited}, not {own}.")
        for model in (self.model, self.average):
            model.load_state_dict(theirs.model.state_dict(), strict=False)
        origin = {key: theirs.metadata.get(key) for key in ("sha256", "steps", "begun_with")}
        self.begun_with = {key: value for key, value in origin.items() if value is not None}

    def save(self) -> None:
        """Write the checkpoint, replacing the last one only when complete."""
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "step": self.step,
                "seconds": self.seconds,
                "recent": self.recent,
                "recipe": asdict(self.recipe),
                "begun_with": self.begun_with,
            },
            partial,
        )
        os.replace(partial, path)

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The squared error relative to its recent average at that noise level, in two forms: over
        voxels (dominated by the local mean) and over bands (with equal weights). Division by the
        recent error lets every noise level improve by the same fraction: relative to a linear
        filter, the levels that determine the image between the slices would have a tenth of the
        weight of the lowest ones. ``step`` determines the random numbers.
        """
        image = batch["image"].to(self.device, copy=True)
        count, seed = len(image), self.recipe.seed * 1_000_003
        first = self.processes.rank * count
        own = torch.Generator().manual_seed(seed + step)
        pieces = COARSE_PIECES if self.recipe.coarse else SIGMA_PIECES
        sigma = draw_sigmas(count * self.processes.size, own, pieces)[first : first + count]
        noise, place = torch.empty(image.shape), batch["matrix"].clone()
        region = batch["region"].to(self.device, copy=True)
        posteriors: list[BandPosterior | None] = [None] * count
        kinds = [0] * count  # nothing, a stack, a hole
        means = torch.zeros(count, *image.shape[2:])
        if self.brains is not None:
            for n, crop in enumerate(zip(batch["matrix"], batch["contrast"], strict=True)):
                means[n] = mean_of(self.brains, *crop, image.shape[2:])
            image -= means[:, None].to(image)
        for n, crop in enumerate(batch["image"]):
            number = step * count * self.processes.size + first + n
            generator = torch.Generator().manual_seed(2**40 + seed + number)
            noise[n] = torch.randn(crop.shape, generator=generator)
            u = float(torch.rand((), generator=generator))
            if u < self.recipe.stacks + self.recipe.holes:
                kinds[n] = 1 if u < self.recipe.stacks else 2
                if kinds[n] == 1:
                    near = batch["near"][n]
                    stack = draw_stack_of_head(batch["head"][n, 0], near[0], generator)
                    image[n] = batch["head"][n] * near
                    measurements: Stack | Voxels = stack
                    if self.recipe.slices_last:
                        last = slices_last(image[n], place[n], stack)
                        image[n], place[n], measurements = last
                        region[n] = region[n].movedim(1 + stack.axis, -1).clone()
                else:
                    measurements = draw_voxels(crop[0], generator, edge=self.crops.edge)
                    measurements = replace(measurements, y=measurements.y - means[n])
                sigma[n] = log_uniform(*self.recipe.conditioned_sigma, generator)
                if float(torch.rand((), generator=generator)) < self.recipe.blind:
                    sigma[n] = self.recipe.conditioned_sigma[1]
                posteriors[n] = measurements.posterior(
                    self.model.band_sd, float(sigma[n]), self.device
                )
        sigma, noise = sigma.to(self.device), noise.to(self.device)
        place = coordinate_features(matrix_points(place.to(self.device), image.shape[2:]))
        clean = to_bands(image)
        noisy = clean + sigma[:, None, None, None, None] * to_bands(noise)
        precision = (
            torch.autocast(self.device.type, self.dtype)
            if self.dtype
            else contextlib.nullcontext()
        )
        with precision:
            estimate, sd = self.model.estimate(
                noisy,
                sigma,
                place,
                batch["contrast"].to(self.device),
                posteriors,
                spread=self.recipe.spread,
            )
        if sd is not None:
            return spread_loss(from_bands(estimate - clean), sd, inside=region)
        linear = self.model.left_open(sigma, posteriors)  # error of the linear filter, (n, 8)
        weight = OUTSIDE + (1 - OUTSIDE) * F.avg_pool3d(region.float(), 2)
        square = (weight * (estimate - clean).square()).mean((2, 3, 4))
        read = torch.cat(
            [square.sum(1, keepdim=True) / linear.sum(1, keepdim=True), square / linear], 1
        )  # (n, 9)
        recent = self._recent(sigma, kinds, read.detach())
        share = read / recent
        return share[:, 0].mean() + BAND_WEIGHT * share[:, 1:].mean()

    def _recent(self, sigma: Tensor, kinds: Sequence[int], read: Tensor) -> Tensor:
        """(n, 9) recent averages of ``read`` near these levels, after an update.

        The crops of all processes count, in the order of their numbers.
        """
        conditioned = torch.tensor(kinds, device=self.device, dtype=read.dtype)
        own = torch.cat([sigma[:, None], conditioned[:, None], read], 1)
        everyone = self.processes.gather(own).cpu()
        place = (everyone[:, 0].log() - math.log(0.005)) / math.log(100 / 0.005) * (LEVELS - 1)
        rows = []
        for n, at in enumerate(place.round().long().clamp(0, LEVELS - 1).tolist()):
            row = self.recent[int(everyone[n, 1]), at]
            new = everyone[n, 2:]
            row.copy_(new if float(row[0]) == 0 else torch.lerp(row, new, 0.05))
            rows.append(row.clone())
        first = self.processes.rank * len(read)
        return torch.stack(rows[first : first + len(read)]).to(self.device) + 1e-3

    def run(
        self,
        *,
        workers: int,
        checkpoint_every: int,
        validate_every: int,
        validation: Sequence[Brain],
        minutes: float | None = None,
    ) -> None:
        """Train up to ``recipe.steps``, or as many steps as fit into ``minutes``.

        Raises
        ------
        UsageError
            If the loss is not finite.
        """
        batches = self._batches(workers)
        began, pace = time.monotonic(), Pace()
        while self.step < self.recipe.steps:
            value = self._take_step(pace.next(batches))
            self.seconds += pace.end(value)
            if minutes is not None and pace.steps == PACED:
                self.fit_into(60 * minutes - (time.monotonic() - began), pace.seconds_a_step)
            if self.step % 50 == 0:
                rate = round(self.recipe.rate(self.step - 1), 6)
                self._note(step=self.step, rate=rate, **pace.facts())
            if not self.processes.first:
                continue
            if self.step % checkpoint_every == 0 or self.step == self.recipe.steps:
                self.save()
            if validation and self.step % validate_every == 0:
                self._note(step=self.step, **self._quality(validation))

    def _batches(self, workers: int) -> Iterator[dict[str, Tensor]]:
        """The crops of the following steps."""
        recipe = self.recipe
        loader = DataLoader(
            self.crops,
            recipe.batch,
            sampler=Numbers(self.step, recipe.steps, recipe.batch, self.processes),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=_single_thread,
        )
        return iter(loader)

    def _take_step(self, batch: Mapping[str, Tensor]) -> float:
        """One step of the optimisers and of the average; returns the loss."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.rate(self.step)
        loss = self.loss(batch, self.step)
        loss.backward()
        loss = self.processes.average(self.model.parameters(), loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        self._average()
        value = float(loss)
        if not math.isfinite(value):
            raise UsageError(
                f"training diverged at step {self.step}: loss {value}. Lower --learning-rate."
            )
        return value

    def fit_into(self, seconds: float, seconds_a_step: float) -> None:
        """End after this many more seconds; the rate falls over the same share of the steps."""
        recipe = self.recipe
        count = self.processes.least(max(int(seconds / seconds_a_step), 1))
        steps = min(self.step + count, recipe.steps)
        decay = round((steps - self.step) * recipe.decay / max(recipe.steps - self.step, 1))
        self.recipe = replace(recipe, steps=steps, decay=max(decay, 1))
        log.info("%.2f s a step: the training ends at step %d", seconds_a_step, steps)

    def _quality(self, validation: Sequence[Brain]) -> dict[str, Any]:
        """Gain on white noise, and PSNR of E[x | y] of slices, for the averaged weights."""
        own = self.prior()
        if self.brains is not None:
            return {"errors": errors(Coarse(own, BlockWeights([], []), self.brains), validation)}
        stacks = stack_errors(own, validation, (5.0,), limit=1) if own.takes_stacks else {}
        return {"gain": gains(own, validation), "stacks": stacks}

    def _average(self) -> None:
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            own = list(self.model.parameters())
            torch._foreach_lerp_(list(self.average.parameters()), own, 1 - decay)

    def prior(self) -> Prior:
        """The averaged weights as a ``Prior``, without a measured spectrum."""
        copy = Precondition(UNet(**self.average.network.config), self.average.band_sd)
        copy.load_state_dict(self.average.state_dict())
        facts = {"recipe": asdict(self.recipe)}
        flat = ErrorSpectrum.isotropic(float(copy.band_sd.square().mean().sqrt()))
        return Prior(copy, spectra={"unknown": flat}, metadata=facts, device=self.device)

    def _note(self, **facts: Any) -> None:
        if not self.processes.first:
            return
        log.info("%s", facts)
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": round(self.seconds), **facts}) + "\n")


def spread_loss(error: Tensor, sd: Tensor, *, inside: Tensor) -> Tensor:
    """Negative log likelihood of errors under N(0, sd²), minimal at sd² = E[error²]. The
    background has the weight ``OUTSIDE``: its errors are a thousandth of those in the brain.
    """
    weight = torch.where(inside, 1.0, OUTSIDE)
    each = 0.5 * (error / sd).square() + sd.log()
    return (weight * each).sum() / weight.sum()


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)


def export(
    trainer: Trainer,
    brains: Sequence[Brain],
    path: Path,
    *,
    name: str,
    limit: int,
    inflation: float,
    finished: Path | None = None,
    regional_error: float | None = None,
) -> dict[str, Any]:
    """Measure the error spectra on the validation brains and write the weights.

    ``limit`` brains per contrast are measured; ``inflation`` is that of ``sample_conditional``. If
    only the SD was trained, ``finished`` are the weights with which it was trained; their spectra
    are kept. A coarse network has no spectra, but its weights next to the embedded prior. Returns
    the metadata.
    """
    prior, coarse = trainer.prior(), trainer.recipe.coarse
    held_out = [brain for brain in brains if brain.split == "validation"]
    if coarse:
        spectra = prior.spectra
    elif trainer.recipe.spread and finished is not None:
        spectra = load_prior(finished, coarse=False).spectra
    else:
        spectra = measure_spectra(prior, held_out, limit=limit)
    scans = [b for b in brains if b.split == "train" and not b.synthetic]
    maps = {b.name for b in brains if b.split == "train" and b.synthetic}
    metadata = {
        "kind": "coarse" if coarse else "prior",
        "name": name,
        "licence": "Apache-2.0",
        "training_data": (
            f"{len(scans)} skull-stripped scans "
            f"({', '.join(sorted({b.contrast for b in scans}))}) and synthetic T1w, T2w, FLAIR "
            f"and random contrasts of {len(maps)} label maps; see docs/models/prior.md"
        ),
        "config": trainer.average.network.config,
        "contrasts": list(CONTRASTS),
        "recipe": asdict(trainer.recipe),
        "steps": trainer.step,
        "processes": trainer.processes.size,
        "hours": round(trainer.seconds / 3600, 2),
        "device": trainer.device.type,
    }
    if trainer.brains is not None:
        network = Coarse(prior, BlockWeights([], []), trainer.brains)
        metadata |= next_to(load_prior(coarse=False, device=trainer.device), network, held_out)
    else:
        metadata |= {"gain": gains(prior, held_out), "inflation": inflation}
    factors = {contrast: ratio for contrast, (ratio, _) in spread_errors(prior, held_out).items()}
    if factors:
        metadata["spread_factors"] = {key: round(value, 4) for key, value in factors.items()}
    if regional_error is not None:
        metadata["regional_error"] = regional_error
    if trainer.begun_with:
        metadata["begun_with"] = trainer.begun_with
    state = prior_state(prior.model, spectra)
    if trainer.brains is not None:
        state |= {f"{MEAN}{name}": v.half() for name, v in trainer.brains.volumes.items()}
    write_weights(path, state, metadata)
    return metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``brainprior train prior``."""
    recipe = Recipe()
    parser.add_argument("work", type=Path, help="folder of the packs, checkpoint and log")
    data = parser.add_argument_group("data (needed once; the packs in the work folder are kept)")
    data.add_argument("--data", type=Path, help="skull-stripped 1 mm brains with BIDS names")
    data.add_argument(
        "--heads",
        type=Path,
        help="BIDS data set of whole heads of about 1 mm, instead of --data: stripped, "
        "corrected and aligned by brainprior itself",
    )
    data.add_argument("--labels", type=Path, help="label maps with FreeSurfer values")
    data.add_argument("--average", type=Path, help="the MNI305 average head (avg305T1.nii)")
    data.add_argument(
        "--validation",
        nargs="*",
        default=[],
        help="participants and label maps of the validation set",
    )
    data.add_argument(
        "--exclude", nargs="*", default=[], help="participants and label maps to exclude"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, default=recipe.steps, help="total number")
    train.add_argument(
        "--decay", type=int, default=recipe.decay, help="last steps, over which the rate falls"
    )
    train.add_argument(
        "--minutes",
        type=float,
        help="end after this time: --steps are the maximum, and --decay keeps its share of them",
    )
    train.add_argument(
        "--batch", type=int, default=recipe.batch, help="crops per step (in each process)"
    )
    train.add_argument(
        "--coarse",
        action="store_true",
        help="train the coarse network, on brains averaged to 2 mm, with --stacks 0",
    )
    train.add_argument("--size", type=int, default=recipe.size, help="edge of a crop in voxels")
    train.add_argument(
        "--learning-rate", type=float, default=recipe.learning_rate, help="highest learning rate"
    )
    train.add_argument(
        "--channels", type=int, nargs="+", default=recipe.channels, help="at each resolution"
    )
    train.add_argument(
        "--blocks", type=int, nargs="+", default=recipe.blocks, help="at each resolution"
    )
    train.add_argument(
        "--stacks", type=float, default=recipe.stacks, help="share of crops with known slices"
    )
    train.add_argument(
        "--holes",
        type=float,
        default=recipe.holes,
        help="share of crops with a scan that has a hole",
    )
    train.add_argument(
        "--conditioned-sigma",
        type=float,
        nargs=2,
        default=recipe.conditioned_sigma,
        metavar=("LOW", "HIGH"),
        help="lowest and highest noise of the crops that come with measurements",
    )
    train.add_argument(
        "--blind",
        type=float,
        default=recipe.blind,
        help="share of those crops that have the highest noise: the network learns E[x | y]",
    )
    train.add_argument(
        "--spread",
        action="store_true",
        help="train only the output for the SD of the error of E[x | y]; the weights of "
        "--begin-with do not change",
    )
    train.add_argument(
        "--begin-with",
        type=Path,
        metavar="WEIGHTS",
        help="start from these weights instead of random ones",
    )
    train.add_argument(
        "--seed",
        type=int,
        default=recipe.seed,
        help="seed of the initial weights, the crops and the noise",
    )
    train.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; torchrun: cpu, cuda")
    train.add_argument("--threads", type=int, default=2, help="of each process on the CPU")
    train.add_argument("--workers", type=int, default=1, help="processes that make crops")
    train.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    train.add_argument("--validate-every", type=int, default=500, help="steps")
    out = parser.add_argument_group("result")
    out.add_argument("--out", type=Path, help="weights file to write at the end")
    out.add_argument("--name", default="brainprior-small", help="name stored in the weights file")
    out.add_argument(
        "--spectrum-brains", type=int, default=3, help="validation brains per contrast for V_sigma"
    )
    out.add_argument(
        "--inflation",
        type=float,
        default=1.0,
        help="factor on the noise of the sampler conditional, calibrated on validation scans",
    )
    out.add_argument(
        "--regional-error",
        type=float,
        help="SD of the error common to all samples in the mean of a structure, relative to the "
        "brain's 99th percentile (brainprior evaluate --study coverage); stored with the weights",
    )
    out.add_argument(
        "--export-only",
        action="store_true",
        help="write --out from the checkpoint, without training",
    )
    out.add_argument(
        "--picture",
        type=Path,
        help="write a PNG of samples of --out, or of the embedded weights",
    )
    out.add_argument(
        "--evaluate",
        action="store_true",
        help="print the accuracy of --out, or of the embedded weights, on the validation brains",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    torch.set_num_threads(args.threads)
    processes = join(args.device)
    try:
        if processes.first:
            _build_packs(args)
        processes.wait()
        return _train(args, processes)
    finally:
        leave()


def _build_packs(args: argparse.Namespace) -> None:
    """Build the requested packs that do not exist yet.

    Raises
    ------
    UsageError
        If ``--validation`` or ``--exclude`` names no participant: a misspelt label must not put a
        participant of the test set into the training.
    """
    if args.data is not None and args.heads is not None:
        raise UsageError("train prior: give --data or --heads, not both.")
    there = [stem for stem in ("pack", "synthetic") if list(args.work.glob(f"{stem}-*.npz"))]
    labels: dict[str, set[str]] = {}
    for option in ("data", "heads", "labels"):
        source = getattr(args, option)
        if source is None or ("synthetic" if option == "labels" else "pack") in there:
            continue
        if args.average is None and option != "heads":
            raise UsageError(f"--{option} needs --average, the MNI305 average head.")
        stems = {path.name.split(".")[0] for path in source.rglob("*.nii*")}
        labels[option] = stems | {stem.split("_")[0].removeprefix("sub-") for stem in stems}
    requested = {
        what: [name.removeprefix("sub-") for name in getattr(args, what)]
        for what in ("validation", "exclude")
    }
    unknown = sorted(set().union(*requested.values()) - set().union(*labels.values()))
    if labels and unknown:
        problem = f"train prior: no participant and no label map {', '.join(unknown)}"
        if not there:
            raise UsageError(f"{problem} in the data. Correct --validation or --exclude.")
        log.warning("%s in the data prepared now; are they in the existing packs?", problem)
    for option, names in labels.items():
        build = build_synthetic_pack if option == "labels" else build_pack
        build(
            getattr(args, option),
            None if option == "heads" else args.average,
            args.work,
            processes=max(args.workers, 1),
            **{
                what: [name for name in given if name in names]
                for what, given in requested.items()
            },
        )


def _print_quality(prior: Prior, held_out: Sequence[Brain]) -> None:
    """The two tables of the model card: two brains per contrast, then four."""
    print("RMS error inside the brain / sigma, by contrast and sigma")
    for contrast, row in gains(prior, held_out).items():
        print(contrast, "  ".join(f"{sigma}: {value:.3f}" for sigma, value in row.items()))
    if prior.takes_stacks:
        print("PSNR in dB of E[x | y] in one call, by contrast and slice spacing in mm")
        for contrast, row in stack_errors(prior, held_out, limit=4).items():
            print(contrast, "  ".join(f"{mm}: {value:.2f}" for mm, value in row.items()))
    if prior.predicts_spread:
        print("RMS error over the predicted SD, by contrast: all voxels, and by decile of the SD")
        for contrast, (ratio, parts) in spread_errors(prior, held_out).items():
            print(contrast, f"{ratio:.3f}", " ".join(f"{part:.2f}" for part in parts))


def _train(args: argparse.Namespace, processes: Processes) -> int:
    """Everything after the packs."""
    if args.picture is not None:
        drawn = load_prior(args.out, device=args.device)
        draw_samples(drawn, args.picture, CONTRASTS[:3], n_steps=40)
        return 0
    brains = read_pack(args.work)
    if args.evaluate:
        held_out = [brain for brain in brains if brain.split == "validation"]
        _print_quality(load_prior(args.out, device=args.device), held_out)
        return 0
    recipe = Recipe(
        steps=args.steps,
        decay=args.decay,
        batch=args.batch,
        size=args.size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        stacks=args.stacks,
        holes=args.holes,
        conditioned_sigma=tuple(args.conditioned_sigma),
        blind=1.0 if args.spread else args.blind,
        channels=tuple(args.channels),
        blocks=tuple(args.blocks),
        spread=args.spread,
        coarse=args.coarse,
    )
    trainer = Trainer(
        [b for b in brains if b.split == "train"],
        recipe,
        args.work,
        device=processes.device,
        processes=processes,
    )
    resumed = trainer.resume()
    if args.begin_with is not None and not resumed:
        trainer.start_from(args.begin_with)
    if args.spread and args.begin_with is None and not resumed:
        raise UsageError("--spread needs --begin-with: the weights whose error is to be learned.")
    if args.export_only and not resumed:
        raise UsageError(f"{args.work}: no {trainer.checkpoint.name} to export.")
    if not args.export_only:
        trainer.run(
            workers=args.workers,
            checkpoint_every=args.checkpoint_every,
            validate_every=args.validate_every,
            validation=[b for b in brains if b.split == "validation"],
            minutes=args.minutes,
        )
    if (args.out is not None or args.export_only) and processes.first:
        path = args.out or FOLDER / "prior.safetensors"
        metadata = export(
            trainer,
            brains,
            path,
            name=args.name,
            limit=args.spectrum_brains,
            inflation=args.inflation,
            finished=args.begin_with,
            regional_error=args.regional_error,
        )
        log.info("%s", json.dumps(metadata, indent=1))
    processes.wait()
    return 0
