# SPDX-License-Identifier: Apache-2.0
"""Another tool's image, too smooth or too sharp, refined with several values of ``--trust``.

The image of the "other tool" is the truth blurred by a Gaussian of SD 1 mm, or sharpened (the
truth plus the detail that this blur removes). They are derivative data sets of a raw data set with
the participant's scan (thick slices, 1 % noise). ``brainprior`` restores the scan alone, refines
each image alone (``--task refine``), and both together (``--task restore refine``), at each trust.
RMSE is computed in the intersection of the supplied mask and the program's own, in units of the
truth's 99th percentile, after one gain, and after a gain that may vary smoothly (``slow gain``: no
bias field is estimated for an image that is refined alone). ``residual`` is the samples' residual
with respect to their input, in units of its stated error.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, matching_field, matching_gain
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.scans import Volume, read_output, write_scan
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, of_test_set
from brainprior_bids.evaluation.studies.command import (
    SCANNER_UNIT,
    Command,
    CommandSettings,
    Image,
    Rows,
    padded,
    restore_record,
    rows_by_settings,
    sidecar,
)
from brainprior_bids.evaluation.summary import Record

HOWS = {
    "refined alone": ("refined", ("refine",)),
    "with the scan": ("restoredRefined", ("restore", "refine")),
}
"""Name in the table -> ``desc-`` of the image, tasks of the command."""
ALONE = "- | the scan alone | -"
STRIPPED = "share of the given mask that the program strips, excluded from the errors"


@dataclass(frozen=True)
class Settings(CommandSettings):
    """``tools``: kinds of ``other_tool``; ``trusts``: values of ``--trust``."""

    tools: tuple[str, ...] = ("smooth", "sharp")
    trusts: tuple[float, ...] = (0.03, 0.1, 0.3)


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Every spacing and noise for every T1w of the test set."""
    for spacing in options.spacing:
        for noise in options.noise:
            for source in of_test_set(sources, "T1w"):
                yield source, Settings(
                    spacing, noise, options.n_samples, options.random_seed, options.slab,
                    tools=tuple(options.tools), trusts=tuple(options.trusts),
                )  # fmt: skip


def other_tool(truth: Image, inside: NDArray[np.bool_], kind: str) -> Image:
    """The truth blurred by 1 mm, or sharpened by the detail that the blur removes; 0 outside."""
    blurred = ndimage.gaussian_filter(truth, 1.0)
    image = blurred if kind == "smooth" else 2 * truth - blurred
    return np.where(inside, np.maximum(image, 0), 0).astype(np.float32)


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``rows``: "other tool | what | trust" -> metrics."""
    truth = padded(participant, settings.spacing_mm, settings.slab_mm)
    grid, spacing = truth.grid, settings.spacing_mm
    recipe = Recipe(spacing_mm=spacing, thickness_mm=spacing, noise_sd=settings.noise_sd)
    data, own = degrade(truth.data, grid, recipe, settings.rng(participant), unit=1.0)
    command = Command(participant, settings, bench)
    stem, bids_dir = f"{command.subject}_{participant.contrast}", bench.folder / "bids"
    write_scan(
        bids_dir, stem, Volume(data * SCANNER_UNIT, own), dataset="A scan of thick slices",
        metadata=sidecar(spacing),
    )  # fmt: skip
    images: dict[str, Image] = {}
    residuals: dict[str, float] = {}

    def run(label: str, image: str, *options: str) -> Path:
        output = "-".join(word for word in label.replace("|", " ").split() if word != "-")
        output_dir = command.run(bids_dir, output, *options)
        volume = read_output(output_dir, stem, image)
        images[label] = resample(volume.data, volume.grid, grid)
        ratios = restore_record(output_dir, stem, image).residual_ratios
        residuals[label] = float(np.mean(ratios))
        return output_dir

    alone = run(ALONE, "restored", "--task", "restore")
    for tool in settings.tools:
        image = other_tool(truth.data, truth.inside, tool)
        images[f"{tool} | as it is | -"] = image
        other = bench.folder / tool
        write_scan(other, f"{command.subject}_desc-{tool}_{participant.contrast}",
                   Volume(image * SCANNER_UNIT, grid), dataset="Another tool's image",
                   metadata={})  # fmt: skip
        for trust in settings.trusts:
            options = ["-d", f"{tool}={other}", "--trust", f"{trust:g}"]
            for how, (result, words) in HOWS.items():
                run(f"{tool} | {how} | {trust:g}", result, "--task", *words, *options)
    mask = read_output(alone, stem, "restored", role="mask")
    kept = resample(mask.data.astype(np.float32), mask.grid, grid, order=1) > 0.5
    judged = truth.inside & kept  # some supplied masks contain vessels and fat
    rows: Rows = {STRIPPED: {"value": 1 - float(kept[truth.inside].mean())}}
    rows |= errors(images, residuals, truth.data, judged)
    if bench.picture is not None:
        _draw(bench.picture, truth.data, truth.inside, judged, images, settings)
    return {"rows": rows}


def errors(
    images: Mapping[str, Image],
    residuals: Mapping[str, float],
    truth: Image,
    judged: NDArray[np.bool_],
) -> Rows:
    """RMSE of every image, and the residual of those that the command wrote."""
    rows: Rows = {}
    for label, image in images.items():
        alike = matching_gain(image, truth, judged) * image
        flat = image * matching_field(image, truth, judged)
        rows[label] = {
            "RMSE": compare(alike, truth, judged)["rmse"],
            "slow gain": compare(flat, truth, judged)["rmse"],
        }
        if label in residuals:
            rows[label]["residual"] = residuals[label]
    return rows


def _draw(
    path: Path,
    truth: Image,
    inside: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    images: Mapping[str, Image],
    settings: Settings,
) -> None:
    """One picture per tool, at the middle trust."""
    trust = f"{settings.trusts[len(settings.trusts) // 2]:g}"
    for tool in settings.tools:
        shown = {
            "scan restored": ALONE,
            f"too {tool}": f"{tool} | as it is | -",
            "refined alone": f"{tool} | refined alone | {trust}",
            "with the scan": f"{tool} | with the scan | {trust}",
        }
        columns = [Column("truth", np.where(inside, truth, 0), 1.1)]
        for title, label in shown.items():
            alike = matching_gain(images[label], truth, judged) * images[label]
            columns.append(Column(title, np.where(inside, alike, 0), 1.1))
        draw(path.with_name(f"{path.stem}_{tool}.png"), columns, inside=inside,
             spacing_mm=[1.0] * 3, caption=f"{path.stem}, trust {trust}", dpi=60,
             planes=settings.planes())  # fmt: skip


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per image."""
    return list(rows_by_settings(records, ["other tool", "what", "trust"]))


STUDY = Study(
    "refine",
    cases,
    measure,
    table,
    defaults={
        "spacing": (4.0,),
        "noise": (0.01,),
        "n_samples": 1,
        "slab": 60,
        "tools": ("smooth", "sharp"),
        "trusts": (0.03, 0.1, 0.3),
    },
    quick={"slab": 40, "tools": ("smooth",), "trusts": (0.1,)},
)
