# SPDX-License-Identifier: Apache-2.0
"""Three crossed stacks of thick slices of one moving participant: each alone, averaged, and fused.

A skull-stripped T1w is rotated and shifted at random for each stack except the first (normal, SD 4
degrees about each axis and 4 mm along it), and averaged to slices along k, j and i, each with its
own bias field and noise. The three are runs of a BIDS data set, on which ``brainprior`` runs
twice: with ``--task restore``, separately for each run, and with ``--fuse runs``, which estimates
the motion. For the comparison, the single restorations and the cubic interpolations (divided by
N4's field) are moved back by the *true* motion and averaged. Metrics are computed after one gain,
in the intersection of the truth's mask and that of the fused run: the masks supplied with some
brains are wide and include vessels and fat, which ``brainprior`` removes (a separate line reports
their share). One PSNR is computed after a gain that may vary smoothly.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.evaluation.degrade import Recipe, degrade, thick_slices
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import metrics_of
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.scans import Volume, read_output, write_scan
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, of_test_set
from brainprior_bids.evaluation.studies.command import (
    SCANNER_UNIT,
    Command,
    CommandSettings,
    Image,
    Rows,
    Truth,
    padded,
    restore_record,
    rows_by_settings,
    sidecar,
)
from brainprior_bids.evaluation.summary import Record
from brainprior_bids.records import RunRecord

STACKS = {"axi": 2, "cor": 1, "sag": 0}
"""Acquisition -> slice axis; the first is the reference, as chosen by the command."""
BIAS_SD = 0.1
DEGREES, MM = 4.0, 4.0
"""SD of the rotations about each axis, and of the shifts."""
KEPT = {
    "mae": "MAE",
    "psnr_db": "PSNR, dB",
    "psnr_field_db": "PSNR after a smooth gain, dB",
    "ssim": "SSIM",
}
GAIN = "fused, PSNR above the best of the others, dB"

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stack:
    """One run: its name, its motion (mm of the truth to mm of the run), its interpolated image."""

    stem: str
    motion: Matrix
    cubic: Image  # on the truth's grid, moved back


def cases(
    options: Namespace, sources: Sequence[Source]
) -> Iterator[tuple[Source, CommandSettings]]:
    """Every spacing and noise for every T1w of the test set."""
    for spacing in options.spacing:
        for noise in options.noise:
            for source in of_test_set(sources, "T1w"):
                yield (
                    source,
                    CommandSettings(
                        spacing, noise, options.n_samples, options.random_seed, options.slab
                    ),
                )


def measure(participant: Participant, settings: CommandSettings, bench: Bench) -> Record:
    """``rows``: image -> metrics."""
    truth = padded(participant, settings.spacing_mm, settings.slab_mm)
    truth = replace(truth, inside=ndimage.binary_fill_holes(truth.inside))
    command = Command(participant, settings, bench)
    bids_dir = bench.folder / "bids"
    rng = settings.rng(participant)
    suffix = participant.contrast
    stacks = [
        make_stack(truth, settings, rng, bids_dir, f"{command.subject}_acq-{name}_{suffix}", axis)
        for name, axis in STACKS.items()
    ]
    images = {f"cubic, {name}": s.cubic for name, s in zip(STACKS, stacks, strict=True)}
    alone = command.run(bids_dir, "alone")
    fused = command.run(bids_dir, "fused", "--fuse", "runs")
    for name, stack in zip(STACKS, stacks, strict=True):
        single = read_output(alone, stack.stem, "restored")
        back = np.linalg.inv(stack.motion)
        images[f"restored, {name}"] = resample(single.data, single.grid, truth.grid, matrix=back)
    for kind in ("cubic", "restored"):
        parts = [images[f"{kind}, {name}"] for name in STACKS]
        images[f"{kind}, average of three"] = np.mean(parts, axis=0)
    stem = f"{command.subject}_{suffix}"
    result = read_output(fused, stem, "restored")
    images["fused"] = resample(result.data, result.grid, truth.grid)
    own = read_output(fused, stem, "restored", role="mask")
    kept = resample(own.data.astype(np.float32), own.grid, truth.grid, order=1) > 0.5
    stripped = 1 - float(kept[truth.inside].mean())
    runs = restore_record(fused, stem, "restored").runs or ()
    inside = truth.inside & kept
    rows = compare_images(images, truth, inside, stripped, stacks, runs)
    if bench.picture is not None:
        _draw(bench.picture, truth.data, inside, images, settings)
    return {"rows": rows}


def make_stack(
    truth: Truth,
    settings: CommandSettings,
    rng: np.random.Generator,
    bids_dir: Path,
    stem: str,
    axis: int,
) -> Stack:
    """Move the brain (not for the first axis), degrade it, and write it as a run."""
    grid, spacing = truth.grid, settings.spacing_mm
    motion = np.eye(4)
    if axis != next(iter(STACKS.values())):
        motion = rigid(rng, np.array(grid.shape) / 2)
    brain = resample(truth.inside, grid, grid, matrix=motion, order=1) > 0.5
    moved = np.where(brain, resample(truth.data, grid, grid, matrix=motion), 0)
    recipe = Recipe(
        axis=axis, spacing_mm=spacing, thickness_mm=spacing,
        noise_sd=settings.noise_sd, bias_sd=BIAS_SD,
    )  # fmt: skip
    data, own = degrade(moved, grid, recipe, rng, unit=1.0)
    write_scan(
        bids_dir, stem, Volume(data * SCANNER_UNIT, own),
        dataset="Crossed thick-slice stacks of one participant", metadata=sidecar(spacing),
    )  # fmt: skip
    share, _ = thick_slices(brain.astype(np.float32), grid, axis=axis, spacing_mm=spacing)
    flat = data / np.exp(n4(nib.Nifti1Image(data, np.array(own.affine)), share, threads=1))
    cubic = resample(resample(flat, own, grid), grid, grid, matrix=np.linalg.inv(motion))
    return Stack(stem, motion, cubic)


def rigid(rng: np.random.Generator, centre: Matrix) -> Matrix:
    """A random motion about ``centre``."""
    turn = Rotation.from_rotvec(np.radians(rng.normal(0, DEGREES, 3))).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre + rng.normal(0, MM, 3)
    return matrix


def compare_images(
    images: Mapping[str, Image],
    truth: Truth,
    inside: NDArray[np.bool_],
    stripped: float,
    stacks: Sequence[Stack],
    runs: Sequence[RunRecord],
) -> Rows:
    """Metrics of every image; for the fused one also the motion's error, residual and gain."""
    table = metrics_of(images, truth.data, inside, truth.grid.spacing_mm)
    points = np.argwhere(inside)[:: max(1, inside.sum() // 1000)]
    worst = []
    for stack in stacks:
        (to_reference,) = (run.to_reference for run in runs if run.name == stack.stem)
        off = np.array(to_reference) @ stack.motion - np.eye(4)
        worst.append(np.linalg.norm(points @ off[:3, :3].T + off[:3, 3], axis=1).max())
    best = max(row["psnr_db"] for method, row in table.items() if method != "fused")
    ratios = [ratio for run in runs for ratio in run.residual_ratios]
    single = {
        "fused, motion found to mm at the worst voxel": float(max(worst)),
        "fused, share of the given mask that it strips": stripped,
        "fused, residual in noise SDs, mean": float(np.mean(ratios)),
        GAIN: table["fused"]["psnr_db"] - best,
    }
    rows = {
        method: {name: row[key] for key, name in KEPT.items()} for method, row in table.items()
    }
    return rows | {label: {"value": value} for label, value in single.items()}


def _draw(
    path: Path,
    truth: Image,
    inside: NDArray[np.bool_],
    images: Mapping[str, Image],
    settings: CommandSettings,
) -> None:
    shown = {
        "truth": truth,
        "one stack, cubic": images["cubic, axi"],
        "one stack, restored": images["restored, axi"],
        "average of three": images["restored, average of three"],
        "fused": images["fused"],
    }
    columns = [
        Column(key, np.where(inside, image, 0), 1.1 * float(np.percentile(image[inside], 99)))
        for key, image in shown.items()
    ]
    draw(path, columns, inside=inside, spacing_mm=[1.0] * 3, caption=path.stem, dpi=60,
         planes=settings.planes())  # fmt: skip


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per image."""
    return list(rows_by_settings(records, ["what"]))


STUDY = Study(
    "fuse",
    cases,
    measure,
    table,
    defaults={"spacing": (5.0,), "noise": (0.01,), "n_samples": 2, "slab": None},
    quick={"n_samples": 1, "slab": 40},
)
