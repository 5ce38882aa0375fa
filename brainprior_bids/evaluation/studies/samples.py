# SPDX-License-Identifier: Apache-2.0
"""Are unconditional samples brains? Structures of samples, and their distance from real brains.

Samples of a whole T1w brain are drawn from the prior without any data (``training.samples``), and
labelled by the embedded parcellation like a scan. Two comparisons:

* *volumes*: z-scores against the participants of ``data/volumes.json``, as in the reports
  (``bids.qc``); of each sample, and of each real brain of the test set;
* *Fréchet distance* on the bottleneck of the parcellation network: one vector per block of
  32 mm, its voxel, of which more than half is brain. The real brains are those of the test set,
  followed by those of the validation set. The last n of them are the floor: their distance from
  the others is what real brains reach. The distance of n samples from the same others is next to
  it. Samples without a brain have no features; the distance is then that of the others alone, and
  favourable.

A sample in which the parcellation finds no brain is a result, not a failure.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from brainprior_bids.anatomy.parcellation import NETWORK_MM, parcellate
from brainprior_bids.bids.qc import UNCERTAIN, reference, z_score
from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork, normalise_intensity
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import frechet_distance
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.summary import Record, counted
from brainprior_bids.training.samples import unconditional

USUAL = 3.0
"""SDs within which a volume counts as usual."""
MARGIN_MM = 16
"""Of nothing around a real brain."""


@dataclass(frozen=True)
class Settings:
    """One brain: the participant itself, or a sample.

    Attributes
    ----------
    number : int
        Of the sample, from 1; 0 is the participant.
    n_steps, seed : int
        Network calls and the seed of the sample; 0 for a participant.
    """

    number: int = 0
    n_steps: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the record's file."""
        return f"sample{self.number}" if self.number else "real"


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Every real T1w, and the samples, whose records are those of the first participant."""
    test_set = of_test_set(sources, "T1w")
    choosing = [s for s in sources if s.choosing and not s.synthetic and s.contrast == "T1w"]
    if not test_set:
        return
    for number in range(1, options.n_samples + 1):
        seed = options.random_seed + number - 1
        yield test_set[0], Settings(number, options.n_steps, seed)
    for source in [*test_set, *choosing]:
        yield source, Settings()


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``z`` and ``features`` of the brain, or ``problem`` if it is none."""
    facts: Record = {}
    if settings.number:
        began = time.perf_counter()
        image = unconditional(
            bench.load_prior(), participant.contrast, seed=settings.seed, n_steps=settings.n_steps
        ).numpy()
        facts["sampling_seconds"] = round(time.perf_counter() - began, 1)
    else:
        image = np.pad(participant.data, MARGIN_MM)
    try:
        structures, volumes = labelled(image, parcellation())
    except AnatomyError as error:
        if bench.picture is not None:
            _draw(bench.picture, image, np.zeros(image.shape, np.int16))
        return {**facts, "problem": str(error)}
    if bench.picture is not None:
        _draw(bench.picture, image, structures)
    inside = structures > 0
    features = block_features(np.where(inside, image, 0), inside, parcellation())
    return {
        **facts,
        "brain_ml": volumes["Brain"] / 1000,
        "z": z_scores(volumes),
        "block_mm": block_mm(parcellation()),
        "features": [[round(float(v), 4) for v in row] for row in features],
    }


def labelled(
    image: NDArray[np.float32], network: ParcellationNetwork
) -> tuple[NDArray[np.int16], dict[str, float]]:
    """Structures of an image with voxels of 1 mm, and their volumes in mm³; ``Brain`` is all.

    Raises
    ------
    AnatomyError
        If no plausible brain is found.
    """
    scan = nib.Nifti1Image(image.astype(np.float32), np.eye(4))
    found = parcellate(scan, network=network, restored_grid=Grid(image.shape, np.eye(4)))
    volumes = {row["name"]: float(row["volume_mm3"]) for row in found.table}
    return found.structures, {**volumes, "Brain": sum(volumes.values())}


def z_scores(volumes: Mapping[str, float]) -> dict[str, float | None]:
    """Structure -> z of its volume; None if it is absent. Without thin parts, as in the reports.

    ``Brain`` is first.
    """
    names = ["Brain", *(name for name in reference() if name not in (*UNCERTAIN, "Brain"))]
    return {name: z_score(name, volumes.get(name, 0.0)) for name in names}


def block_mm(network: ParcellationNetwork) -> int:
    """Edge of a voxel of the bottleneck."""
    return round(network.multiple * NETWORK_MM)


@torch.no_grad()
def block_features(
    image: NDArray[np.float32], inside: NDArray[np.bool_], network: ParcellationNetwork
) -> NDArray[np.float32]:
    """(blocks, channels) of the bottleneck, for blocks of which more than half is inside.

    Parameters
    ----------
    image : (i, j, k) float32 array
        Voxels of 1 mm; 0 outside the brain.
    inside : (i, j, k) bool array
    """
    edge = block_mm(network)
    padding = [size for n in reversed(image.shape) for size in (0, -n % edge)]

    def padded(values: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return functional.pad(tensor, padding)[None, None]

    x = functional.avg_pool3d(padded(image), round(NETWORK_MM))
    bottleneck = network.encode(normalise_intensity(x))[0][0]
    share = functional.avg_pool3d(padded(inside), edge)[0, 0]
    rows: NDArray[np.float32] = bottleneck[:, share > 0.5].T.float().numpy()
    return rows


def _draw(path: Path, image: NDArray[np.float32], structures: NDArray[np.int16]) -> None:
    """The sample, and where structures were found in it."""
    labels = np.where(structures > 0, 1 + structures % 19, 0).astype(np.float32)
    columns = [Column("sample", image, 1.1), Column("structures", labels, 20.0, "nipy_spectral")]
    everywhere = np.ones(image.shape, bool)
    inside = structures > 0 if (structures > 0).any() else everywhere
    draw(path, columns, inside=inside, spacing_mm=[1.0] * 3, caption=path.stem)


def table(records: Sequence[Record], choosing: Sequence[Record]) -> list[str]:
    """One row per sample and one for the real brains; the Fréchet distances below."""
    drawn = sorted((r for r in records if r["number"]), key=lambda r: r["number"])
    real = [r for r in records if not r["number"]]
    text = []
    if drawn:
        seconds = np.mean([r["sampling_seconds"] for r in drawn])
        text += [f"T1w; samples of {drawn[0]['n_steps']} calls, {seconds:.0f} s each.", ""]
    columns = ["brain", "volume, ml", "z of the volume", f"structures within {USUAL:g} SD"]
    columns += ["mean absolute z", "structures beyond"]
    text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in drawn:
        text.append(f"| sample {r['number']} | {' | '.join(sample_cells(r))} |")
    whole = [r for r in real if "problem" not in r]
    if whole:
        who = counted(len(whole), "participant")
        text.append(f"| {who} of the test set, mean | {' | '.join(real_cells(whole))} |")
    return [*text, "", *distances(drawn, [*real, *choosing])]


def sample_cells(r: Record) -> list[str]:
    """Volume, z-scores, and the names of the structures that are absent or unusual."""
    if "problem" in r:
        reason = r["problem"].removeprefix("parcellate: ").partition(". ")[0]
        return [f"no brain found: {reason}", "", "", "", ""]
    scores = {name: z for name, z in r["z"].items() if name != "Brain"}
    present = [abs(z) for z in scores.values() if z is not None]
    odd = [
        f"{name} {'absent' if z is None else f'{z:+.1f}'}"
        for name, z in scores.items()
        if z is None or abs(z) > USUAL
    ]
    return [
        f"{r['brain_ml']:.0f}",
        f"{r['z']['Brain']:+.1f}",
        f"{within(r)} of {len(scores)}",
        f"{np.mean(present):.2f}" if present else "n/a",
        ", ".join(odd) or "none",
    ]


def real_cells(group: Sequence[Record]) -> list[str]:
    """The same, as means over real brains."""
    count = len(group[0]["z"]) - 1
    sizes = [
        abs(z) for r in group for name, z in r["z"].items() if z is not None and name != "Brain"
    ]
    return [
        f"{np.mean([r['brain_ml'] for r in group]):.0f}",
        f"{np.mean([r['z']['Brain'] for r in group]):+.1f}",
        f"{np.mean([within(r) for r in group]):.1f} of {count}",
        f"{np.mean(sizes):.2f}",
        "",
    ]


def within(r: Record) -> int:
    """Number of structures whose volume is within ``USUAL`` SDs."""
    scores = [z for name, z in r["z"].items() if name != "Brain"]
    return sum(z is not None and math.fabs(z) <= USUAL for z in scores)


def distances(drawn: Sequence[Record], real: Sequence[Record]) -> list[str]:
    """Fréchet distance of samples and of other real brains from the same real brains."""
    samples = [r for r in drawn if "features" in r]
    brains = [r for r in real if "features" in r]
    count = min(len(samples), len(brains) // 2)
    if count == 0:
        return [
            "Fréchet distance: not computed. It needs two real brains and a sample in which the "
            "parcellation finds a brain."
        ]
    floor, others = brains[-count:], brains[:-count]
    sets = [np.concatenate([r["features"] for r in g]) for g in (samples[:count], floor, others)]
    drawn_blocks, floor_blocks, blocks = (len(rows) for rows in sets)
    far, near = (frechet_distance(rows, sets[2]) for rows in sets[:2])
    names = ", ".join(r["participant"] for r in floor)
    return [
        f"Fréchet distance from {counted(len(others), 'real brain')} ({blocks} blocks of "
        f"{floor[0]['block_mm']} mm, {sets[2].shape[1]} features):",
        "",
        f"- {counted(count, 'sample')} ({drawn_blocks} blocks): {far:.3g}",
        f"- {counted(count, 'other real brain')} ({names}; {floor_blocks} blocks): {near:.3g}",
    ]


STUDY = Study(
    "samples",
    cases,
    measure,
    table,
    defaults={"n_samples": 10, "n_steps": 40},
    quick={"n_samples": 1, "n_steps": 20},
)
