# SPDX-License-Identifier: Apache-2.0
"""Train the parcellation network on synthetic heads: ``brainprior train parcellation``.

Every step draws one head from a generator seeded by (seed, step), so a run resumed from its
checkpoint receives the same heads as an uninterrupted one. Inner convolutions are trained by Muon,
the rest by AdamW. The learning rate is constant after a warm-up and falls linearly to zero over
the last 30 % of the steps; the exported weights are an exponential moving average. Validation
draws a fixed set of heads from the validation maps. With several processes (``torchrun``), each
draws its own heads, and the gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from brainprior_bids.engine.denoiser import fast_dtype
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import write_weights
from brainprior_bids.training.muon import Muon
from brainprior_bids.training.processes import Processes, join, leave
from brainprior_bids.training.synthesis import (
    CLASSES,
    CONTRASTS,
    SKULL,
    HeadMap,
    HeadSettings,
    HeadSynthesiser,
    load_labels,
)

STRUCTURES = slice(1, CLASSES.index(SKULL))
"""Channels of the brain mask: structures and the fluid between the gyri."""


class SyntheticHeads(Dataset[tuple[Tensor, Tensor]]):
    """Head number ``step`` of a run, always the same for the same seed."""

    def __init__(self, synthesiser: HeadSynthesiser, *, seed: int, steps: int) -> None:
        self.synthesiser = synthesiser
        self.seed = seed
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self.synthesiser.draw(generator)


def segmentation_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus (1 - mean soft Dice of the classes present).

    Parameters
    ----------
    logits : (n, classes, i, j, k) tensor
    target : (n, i, j, k) int64 tensor

    Returns
    -------
    loss : scalar tensor
    dice : (classes,) tensor
        Soft Dice, without gradient; NaN for absent classes.
    """
    classes = logits.shape[1]
    log_p = torch.log_softmax(logits.float(), dim=1)
    log_hit = log_p.gather(1, target[:, None])
    flat = target.reshape(-1)
    hit = torch.zeros(classes, device=logits.device).index_add(0, flat, log_hit.exp().reshape(-1))
    count = torch.bincount(flat, minlength=classes).to(hit.dtype)
    predicted = log_p.exp().sum(dim=(0, 2, 3, 4))
    dice = (2 * hit + 1) / (predicted + count + 1)
    present = count > 0
    loss = -log_hit.mean() + 1 - dice[present].mean()
    return loss, torch.where(present, dice.detach(), torch.nan)


def hard_dice(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(classes,) Dice of two integer maps; NaN if ``target`` lacks the class."""
    count = torch.bincount(target.reshape(-1), minlength=classes)
    predicted_count = torch.bincount(predicted.reshape(-1), minlength=classes)
    both = torch.bincount(target[predicted == target].reshape(-1), minlength=classes)
    return torch.where(count > 0, 2 * both / (count + predicted_count), torch.nan)


@torch.no_grad()
def evaluate(
    network: nn.Module, synthesiser: HeadSynthesiser, *, seed: int = 7
) -> dict[str, float]:
    """Mean structure Dice and mask Dice by contrast and slice thickness.

    One head is drawn per map, contrast and thickness (2 and 5 mm), with a random pose and without
    damage; noise SD 0.02.
    """
    device = next(network.parameters()).device
    precision = fast_dtype(device)
    result: dict[str, float] = {}
    for contrast in CONTRASTS:
        for thickness in (2.0, 5.0):
            structure, mask = [], []
            for index in range(len(synthesiser.heads)):
                generator = torch.Generator().manual_seed(seed + index)
                settings = HeadSettings(contrast, thickness, damage=False, noise_sd=0.02)
                image, target = synthesiser.draw(generator, settings, index)
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    predicted = network(image[None].to(device)).argmax(1)[0].cpu()
                dice = hard_dice(predicted, target, len(CLASSES))
                structure.append(float(dice[1 : CLASSES.index(24)].nanmean()))
                inside = (
                    (t >= STRUCTURES.start) & (t < STRUCTURES.stop) for t in (predicted, target)
                )
                mask.append(float(hard_dice(*(m.long() for m in inside), 2)[1]))
            result[f"{contrast}_{thickness:g}mm"] = float(np.mean(structure))
            result[f"{contrast}_{thickness:g}mm_mask"] = float(np.mean(mask))
    return result


@dataclass
class TrainingState:
    """The content of a checkpoint."""

    network: ParcellationNetwork
    average: ParcellationNetwork
    optimisers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "config": self.network.config,
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "step": self.step,
                "seconds": self.seconds,
            },
            temporary,
        )
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same configuration.

        Raises
        ------
        UsageError
            If the checkpoint is from another network.
        """
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if saved["config"] != self.network.config:
            raise UsageError(
                f"{path}: made with {saved['config']['widths']} channels, the command asks for "
                f"{self.network.config['widths']}. Pass the same --widths or another --work-dir."
            )
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        for optimiser, old in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(old)
        self.step, self.seconds = saved["step"], saved["seconds"]

    @torch.no_grad()
    def average_step(self) -> None:
        """Update the moving average; short memory at first, 1000 steps later."""
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(new, 1 - keep)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, linear to zero over the last 30 %."""
    return peak * min((step + 1) / 200, 1.0, max((steps - step) / (0.3 * steps), 1e-3))


def make_optimisers(network: ParcellationNetwork, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for inner convolutions; AdamW for gains, biases, the first and the last layer."""
    inner = {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim == 5 and not name.startswith(("stem", "head", "up"))
    }
    named = dict(network.named_parameters())
    return [
        Muon([named[name] for name in sorted(inner)], lr=rate, weight_decay=0.01),
        torch.optim.AdamW(
            [named[name] for name in named if name not in inner],
            lr=rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
        ),
    ]


def prepare_heads(folder: Path, numbers: list[int]) -> list[HeadMap]:
    """Read ``training_seg_NN.nii.gz`` of the given numbers.

    Raises
    ------
    UsageError
        If one is missing.
    """
    heads = []
    for number in numbers:
        path = folder / f"training_seg_{number:02d}.nii.gz"
        if not path.is_file():
            raise UsageError(f"{path}: no such label map. Is {folder} the folder of label maps?")
        heads.append(HeadMap.from_labels(load_labels(path)[0]))
    return heads


def train(
    *,
    heads: list[HeadMap],
    held_out: list[HeadMap],
    work_dir: Path,
    steps: int,
    widths: tuple[int, ...],
    shape: tuple[int, int, int],
    peak_rate: float,
    seed: int,
    workers: int,
    device: torch.device | str,
    validate_every: int,
    save_every: int = 100,
    batch: int = 1,
    processes: Processes | None = None,
) -> TrainingState:
    """Run or continue a training; see the module's docstring.

    ``work_dir`` receives ``last.pt`` and ``log.jsonl`` (one line every 50 steps). ``batch`` heads
    per step are drawn in each of the ``processes``; the loss is averaged over them.
    """
    device = torch.device(device)
    processes = processes or Processes(0, 1, device)
    precision = fast_dtype(device)
    torch.manual_seed(seed)  # initial weights only
    network = ParcellationNetwork(CLASSES, widths).to(device)
    average = ParcellationNetwork(CLASSES, widths).to(device)
    processes.share(network)
    average.load_state_dict(network.state_dict())
    state = TrainingState(network, average, make_optimisers(network, peak_rate))
    checkpoint = work_dir / "last.pt"
    if checkpoint.is_file():
        state.load(checkpoint)
        if processes.first:
            print(f"continuing at step {state.step}", flush=True)
    together = batch * processes.size
    data = SyntheticHeads(HeadSynthesiser(heads, shape), seed=seed, steps=steps * together)
    start = processes.rank * batch
    loader = DataLoader(
        data,
        sampler=[
            step * together + start + n for step in range(state.step, steps) for n in range(batch)
        ],
        batch_size=batch,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    validation = HeadSynthesiser(held_out, shape)
    work_dir.mkdir(parents=True, exist_ok=True)
    started, losses, dices, waited = time.monotonic() - state.seconds, [], [], 0.0
    ready = time.monotonic()
    for image, target in loader:
        waited += time.monotonic() - ready
        rate = learning_rate(state.step, steps, peak_rate)
        for group in (g for optimiser in state.optimisers for g in optimiser.param_groups):
            group["lr"] = rate
        image, target = image.to(device), target.to(device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits = network(image)
        scores = [segmentation_loss(logits[n : n + 1], target[n : n + 1]) for n in range(batch)]
        loss = torch.stack([loss for loss, _ in scores]).mean()
        network.zero_grad()
        loss.backward()
        loss = processes.average(network.parameters(), loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimiser in state.optimisers:
            optimiser.step()
        state.step += 1
        state.average_step()
        losses.append(float(loss))
        dices += [float(dice[1 : CLASSES.index(24)].nanmean()) for _, dice in scores]
        state.seconds = time.monotonic() - started
        entry: dict[str, Any] = {}
        if state.step % 50 == 0 or state.step == steps:
            entry = {
                "step": state.step,
                "seconds": round(state.seconds, 1),
                "loss": round(float(np.mean(losses)), 4),
                "dice": round(float(np.nanmean(dices)), 4),
                "waited": round(waited, 1),
            }
            losses, dices, waited = [], [], 0.0
        if not processes.first:
            continue
        if state.step % validate_every == 0 or state.step == steps:
            validated = evaluate(state.average.eval(), validation)
            entry |= {key: round(value, 4) for key, value in validated.items()}
        if entry:
            with (work_dir / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)
        if state.step % save_every == 0 or state.step == steps:
            state.save(checkpoint)
        ready = time.monotonic()
    return state


def export(state: TrainingState, path: Path, *, maps: list[int], seed: int) -> None:
    """Write the averaged weights (float16) with their training data."""
    write_weights(
        path,
        {f"network.{name}": t.half() for name, t in state.average.state_dict().items()},
        {
            "kind": "parcellation",
            "name": "brainprior-parcellation",
            "licence": "Apache-2.0",
            "training_data": (
                f"synthetic heads of {len(maps)} label maps (training_seg "
                f"{', '.join(str(m) for m in maps)}; BBillot/SynthSeg, Apache-2.0) with the T1w "
                "and T2w intensity statistics published with SynthSeg and SynthSR; see "
                "docs/models/parcellation.md"
            ),
            "config": state.average.config,
            "steps": state.step,
            "seconds": round(state.seconds),
            "random_seed": seed,
        },
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``brainprior train parcellation``."""
    parser.add_argument("labels", type=Path, help="folder of training_seg_NN.nii.gz label maps")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoint and log")
    parser.add_argument("--output", type=Path, help="weights file to write (.safetensors)")
    parser.add_argument(
        "--maps", type=int, nargs="+", default=list(range(1, 15)), help="numbers NN to train on"
    )
    parser.add_argument(
        "--held-out", type=int, nargs="+", default=[15, 16, 17], help="numbers NN to validate on"
    )
    parser.add_argument("--steps", type=int, default=8000, help="total number")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[32, 64, 96, 96], help="channels at 2, 4 … mm"
    )
    parser.add_argument("--shape", type=int, nargs=3, default=[80, 96, 80], help="voxels of 2 mm")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument(
        "--random-seed",
        type=int,
        default=0,
        help="seed of the initial weights and the simulated heads",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that draw heads")
    parser.add_argument("--threads", type=int, default=2, help="of each process on the CPU")
    parser.add_argument("--batch", type=int, default=1, help="heads per step (in each process)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; torchrun: cpu, cuda")
    parser.add_argument("--validate-every", type=int, default=1000, help="steps")


def main(args: argparse.Namespace) -> int:
    """Train with the parsed options; returns the exit status."""
    torch.set_num_threads(args.threads)
    processes = join(args.device)
    try:
        return _train(args, processes)
    finally:
        leave()


def _train(args: argparse.Namespace, processes: Processes) -> int:
    state = train(
        heads=prepare_heads(args.labels, args.maps),
        held_out=prepare_heads(args.labels, args.held_out),
        work_dir=args.work_dir,
        steps=args.steps,
        widths=tuple(args.widths),
        shape=tuple(args.shape),
        peak_rate=args.learning_rate,
        seed=args.random_seed,
        workers=args.workers,
        device=processes.device,
        validate_every=args.validate_every,
        batch=args.batch,
        processes=processes,
    )
    if args.output and processes.first:
        export(state, args.output, maps=args.maps, seed=args.random_seed)
        print(f"wrote {args.output}", flush=True)
    return 0
