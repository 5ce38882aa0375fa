# SPDX-License-Identifier: Apache-2.0
"""Whole heads through the whole command, compared with themselves.

The thin slices of a head are averaged along the bottom-top axis to thick ones (the plain mean of
neighbours), and ``brainprior`` restores the result in a separate process. Everything is compared
on the original's own voxels:

* the reference is the original divided by its N4 field;
* linear and cubic interpolation, Tikhonov and TV of the thick slices are divided by the
  *reference's* field, the best estimate that they could be given;
* the restored image has the bias field estimate of the program, and is interpolated by a cubic
  spline.

Every image is multiplied by the one factor that brings it closest to the reference in least
squares (``slow gain``: by a factor that may vary smoothly over the brain, so that a disagreement
of the two bias fields does not count). The region is the brain mask of the *original*; the mask
that the program found in the thick slices; or what both contain. The noise of the original remains
in the reference, so that no method can reach an error of 0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.brain import find_brain
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.samplers import registry
from brainprior_bids.evaluation import plots
from brainprior_bids.evaluation.baselines import interpolate, tikhonov, total_variation
from brainprior_bids.evaluation.degrade import averaging_weights, thick_slices
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import DEPTHS, compare, matching_gain, metrics_of
from brainprior_bids.evaluation.protocol import UNTUNED, Participant
from brainprior_bids.evaluation.scans import Volume, read_output, write_scan
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.studies.command import (
    Command,
    CommandSettings,
    Image,
    restore_record,
    sidecar,
)
from brainprior_bids.evaluation.summary import NAMES, Record, counted, mean, mean_sd

AXIS = 2
"""The axis that is averaged: bottom to top, as in most clinical scans."""
METHODS = ("linear", "cubic", "tikhonov", "tv", "restored")
COLUMNS = {
    "psnr_db": ("PSNR, dB", 2), "psnr_field_db": ("slow gain", 2),
    "found_mask_db": ("found mask", 2), "both_masks_db": ("both masks", 2), "mae": ("MAE", 4),
    "ssim": ("SSIM", 3), DEPTHS[0]: ("RMSE 0-1 mm", 4), DEPTHS[1]: ("1-2", 4),
    DEPTHS[2]: ("2-3", 4), DEPTHS[3]: ("3-5", 4), DEPTHS[4]: ("deeper", 4),
}  # fmt: skip
"""Metric -> heading and digits."""


@dataclass(frozen=True)
class Settings(CommandSettings):
    """``sampler``: of the command. No noise is added: the heads have their own."""

    sampler: str = "auto"

    @property
    def name(self) -> str:
        """Name of the record's file."""
        return f"{self.spacing_mm:g}mm-{self.sampler}"


@dataclass(frozen=True, eq=False)
class Head:
    """A head on its own voxels, RAS.

    Attributes
    ----------
    scan, reference : (i, j, k) arrays
        As stored, and divided by the field.
    field : (i, j, k) array
    inside : (i, j, k) bool array
        The brain.
    grid : Grid
        A whole number of thick slices.
    spacing_mm : float
        Of the thick slices, a whole number of thin ones.
    """

    scan: Image
    reference: Image
    field: Image
    inside: NDArray[np.bool_]
    grid: Grid
    spacing_mm: float


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Every spacing for every T1w of the test set."""
    sampler = options.sampler
    n_samples = options.n_samples if registry.find(sampler).yields_samples else 1
    for spacing in options.spacing:
        for source in of_test_set(sources, "T1w"):
            seed = options.random_seed
            yield source, Settings(spacing, 0.0, n_samples, seed, sampler=sampler)


def load(path: Path, spacing_mm: float) -> Head:
    """Read a head and find its brain and bias field.

    Parameters
    ----------
    path : Path
        Near-isotropic scan.
    spacing_mm : float
        Of the thick slices; rounded to two thin slices or more.
    """
    image = conform(path, metadata={}).image
    grid = Grid(image.shape, image.affine)
    thin = float(grid.spacing_mm[AXIS])
    step = max(2, round(spacing_mm / thin))
    stop = list(grid.shape)
    stop[AXIS] -= stop[AXIS] % step
    grid = grid.crop((0, 0, 0), (stop[0], stop[1], stop[2]))
    data = image.get_fdata(dtype=np.float32)[: stop[0], : stop[1], : stop[2]]
    scan = nib.Nifti1Image(data, np.array(grid.affine))
    mask = find_brain(scan, network=parcellation()).mask_scan
    field = np.exp(n4(scan, mask)).astype(np.float32)
    return Head(data, data / field, field, mask > 0.5, grid, step * thin)


def classical(head: Head, thick: Volume) -> dict[str, Image]:
    """The classical methods on the head's voxels, divided by its field.

    Tikhonov and TV are given the slice weights.
    """
    n, thin = head.grid.shape[AXIS], float(head.grid.spacing_mm[AXIS])
    weights = averaging_weights(n, thin, head.spacing_mm, head.spacing_mm, "boxcar")
    unit = float(np.percentile(head.reference[head.inside], 99))
    images = {
        "linear": interpolate(thick.data, thick.grid, head.grid, order=1),
        "cubic": interpolate(thick.data, thick.grid, head.grid, order=3),
        "tikhonov": tikhonov(thick.data, weights, axis=AXIS, penalty=UNTUNED["tikhonov"]),
        "tv": total_variation(thick.data, weights, axis=AXIS, penalty=UNTUNED["tv"] * unit),
    }
    return {method: image / head.field for method, image in images.items()}


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``methods``: method -> metric -> value."""
    head = load(bench.source, settings.spacing_mm)
    thick = Volume(
        *thick_slices(
            head.scan, head.grid, axis=AXIS, spacing_mm=head.spacing_mm, profile="boxcar"
        )
    )
    command = Command(participant, settings, bench)
    stem, bids_dir = f"{command.subject}_{participant.contrast}", bench.folder / "bids"
    dataset = f"{stem} averaged to slices of {head.spacing_mm:.3g} mm"
    metadata = sidecar(head.spacing_mm)
    write_scan(bids_dir, stem, thick, dataset=dataset, metadata=metadata)
    output_dir = command.run(bids_dir, "out", "--sampler", settings.sampler)
    restored, mask = (
        read_output(output_dir, stem, "restored", role) for role in ("restored", "mask")
    )
    found = resample(mask.data, mask.grid, head.grid, order=1) > 0.5
    images = classical(head, thick)
    images["restored"] = resample(restored.data, restored.grid, head.grid)
    if bench.picture is not None:
        _draw(bench.picture, head, thick, images)
    record = restore_record(output_dir, stem, "restored")
    return {
        "methods": errors(images, head, found),
        "slices_mm": head.spacing_mm,
        "mask_dice": 2 * float((found & head.inside).sum() / (found.sum() + head.inside.sum())),
        "sampler_used": record.sampler,
    }


def errors(
    images: Mapping[str, Image], head: Head, found: NDArray[np.bool_]
) -> dict[str, dict[str, float]]:
    """The metrics of every image, ``COLUMNS``; ``found`` is the mask of the thick slices."""
    rows = metrics_of(images, head.reference, head.inside, list(head.grid.spacing_mm))
    for name, region in (("found_mask_db", found), ("both_masks_db", found & head.inside)):
        for method, image in images.items():
            gain = matching_gain(image, head.reference, region)
            rows[method][name] = compare(gain * image, head.reference, region)["psnr_db"]
    return rows


def _draw(path: Path, head: Head, thick: Volume, images: Mapping[str, Image]) -> None:
    top = 1.05 * float(np.percentile(head.reference[head.inside], 99))
    blocks = interpolate(thick.data, thick.grid, head.grid, order=0)
    shown = {"original, N4": head.reference, "thick slices": blocks}
    for method in ("cubic", "tv", "restored"):
        gain = matching_gain(images[method], head.reference, head.inside)
        shown[method] = gain * images[method]
    columns = [Column(name, np.where(head.inside, x, 0), top) for name, x in shown.items()]
    spacing = [float(s) for s in head.grid.spacing_mm]
    draw(path, columns, inside=head.inside, spacing_mm=spacing, caption=path.stem)


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """For each spacing, one row per method, and the differences from cubic and TV."""
    text = []
    for spacing in sorted({r["spacing_mm"] for r in records}):
        text += [*_table([r for r in records if r["spacing_mm"] == spacing]), ""]
    return text[:-1]


def _table(group: Sequence[Record]) -> list[str]:
    first = group[0]
    values = {
        (method, key): [r["methods"][method][key] for r in group]
        for method in METHODS
        for key in COLUMNS
    }
    samplers = ", ".join(sorted({r["sampler_used"] for r in group}))
    slices = ", ".join(sorted({f"{r['slices_mm']:.2g}" for r in group}))
    lines = [
        f"{counted(len(group), 'head')}, {first['contrast']}, slices of {slices} mm, sampler "
        f"{samplers}. PSNR after one gain inside the original's brain mask, after a slow gain, "
        "and after one gain in the mask found in the thick slices and in what both masks contain; "
        "RMSE by depth below the border of the original's mask.",
        "",
        f"| | {' | '.join(heading for heading, _ in COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for method in METHODS:
        cells = [mean(values[method, key], digits) for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    lines.append("")
    for other in ("cubic", "tv"):
        gain = np.subtract(values["restored", "psnr_db"], values[other, "psnr_db"])
        border = np.divide(values["restored", DEPTHS[0]], values[other, DEPTHS[0]]) - 1
        lines.append(
            f"- Restored over {NAMES[other]}: {mean_sd(list(gain), 2, sign=True)} dB, better in "
            f"{int((gain > 0).sum())} of {len(gain)}; RMSE within 1 mm of the border "
            f"{100 * border.mean():+.1f} %, lower in {int((border < 0).sum())}."
        )
    dice = [r["mask_dice"] for r in group]
    lines.append(f"- Dice of the two masks: {np.mean(dice):.3f} (lowest {min(dice):.3f}).")
    return lines


STUDY = Study(
    "heads",
    cases,
    measure,
    table,
    defaults={"spacing": (5.0,), "n_samples": 4},
    quick={"n_samples": 1},
    plot=plots.depth,
)
