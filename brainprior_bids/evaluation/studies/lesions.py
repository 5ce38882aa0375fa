# SPDX-License-Identifier: Apache-2.0
"""How much of a lesion's contrast remains: ``check-lesion`` by slice thickness, size and contrast.

Each brain is degraded to slices of several thicknesses; spheres are added in the deepest white
matter, and a block around them is restored (``evaluation.lesions``). ``restored`` and
``interpolated`` are the shares of the contrast that remain in the restored image and in the
linearly interpolated scan.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.lesions import contrast_kept, prepare_case
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.scans import Volume, write_scan
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, number_of, of_test_set
from brainprior_bids.evaluation.studies.command import SCANNER_UNIT, padded, sidecar
from brainprior_bids.evaluation.summary import Record, counted

SIZES_MM = (4.0, 8.0)
CONTRASTS = (-0.3, -0.1, 0.1, 0.3)
NOISE_SD = 0.01


@dataclass(frozen=True)
class Settings:
    """A scan and the lesions in it.

    Attributes
    ----------
    spacing_mm : float
        Spacing and thickness of the slices.
    sizes_mm, contrasts : tuple of float
        Diameters; relative changes of the tissue's intensity.
    crop_mm : float
        Edge of the block that is restored.
    n_samples, seed : int
    """

    spacing_mm: float
    sizes_mm: tuple[float, ...] = SIZES_MM
    contrasts: tuple[float, ...] = CONTRASTS
    crop_mm: float = 64.0
    n_samples: int = 2
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the record's file."""
        return f"{self.spacing_mm:g}mm"


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Every spacing for every T1w of the test set."""
    for spacing in options.spacing:
        for source in of_test_set(sources, "T1w"):
            yield (
                source,
                Settings(
                    spacing,
                    tuple(options.lesion_sizes),
                    tuple(options.lesion_contrasts),
                    n_samples=options.n_samples,
                    seed=options.random_seed,
                ),
            )


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``kept``: one entry per size and contrast."""
    truth = padded(participant, settings.spacing_mm)
    rng = np.random.default_rng([settings.seed, number_of(participant.name)])
    spacing = settings.spacing_mm
    recipe = Recipe(spacing_mm=spacing, thickness_mm=spacing, noise_sd=NOISE_SD)
    data, grid = degrade(truth.data, truth.grid, recipe, rng, unit=1.0)
    path = write_scan(
        bench.folder,
        f"sub-{participant.name}_{participant.contrast}",
        Volume(data * SCANNER_UNIT, grid),
        dataset="A degraded scan for simulated lesions",
        metadata=sidecar(spacing),
    )
    case, warnings = prepare_case(path, contrast=participant.contrast, thickness_mm=None)
    centre = case.deepest_mm()
    kept = contrast_kept(
        case.crop(centre, settings.crop_mm),
        bench.load_prior(),
        centre_mm=centre,
        sizes_mm=settings.sizes_mm,
        contrasts=settings.contrasts,
        n_samples=settings.n_samples,
        seed=settings.seed,
        device=bench.device,
    )
    return {"kept": [asdict(row) for row in kept], "warnings": warnings}


def values_of(
    records: Sequence[Record], what: str, spacing: float, size: float, contrast: float
) -> list[float]:
    """Share of the contrast that remains, in each participant."""
    return [
        row[what]
        for record in records
        if record["spacing_mm"] == spacing
        for row in record["kept"]
        if (row["size_mm"], row["contrast"]) == (size, contrast)
    ]


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per slice thickness and diameter; mean and range over the participants."""
    first = records[0]
    sizes, contrasts = first["sizes_mm"], first["contrasts"]
    columns = ["slices", "diameter", *(f"{contrast:+g}" for contrast in contrasts)]
    columns += ["interpolated"]
    samplers = sorted({row["sampler"] for r in records for row in r["kept"]})
    text = [
        f"{first['contrast']}, {100 * NOISE_SD:g} % noise, blocks of {first['crop_mm']:g} mm; "
        f"samples per image: {first['n_samples']}, {', '.join(samplers)}. Share of the contrast "
        "that remains: mean over the participants (range).",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for spacing in sorted({r["spacing_mm"] for r in records}):
        for size in sizes:
            cells = [f"{spacing:g} mm", f"{size:g} mm"]
            cells += [
                _shown(values_of(records, "restored", spacing, size, contrast))
                for contrast in contrasts
            ]
            cells.append(_shown(values_of(records, "interpolated", spacing, size, contrasts[0])))
            text.append(f"| {' | '.join(cells)} |")
    return text


def _shown(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def measured(records: Sequence[Record], _: Sequence[Record]) -> dict[str, Any]:
    """Range over contrasts and participants, for reports."""
    first = records[0]
    who = counted(len({r["participant"] for r in records}), "participant")
    changes = sorted({abs(contrast) for contrast in first["contrasts"]})
    shares = " and ".join(f"{100 * change:g}" for change in changes)
    rows = []
    for spacing in sorted({r["spacing_mm"] for r in records}):
        for size in first["sizes_mm"]:
            kept = [
                round(value, 2)
                for contrast in first["contrasts"]
                for value in values_of(records, "restored", spacing, size, contrast)
            ]
            rows.append({
                "scans": f"{spacing:g} mm", "size": f"{size:g} mm across",
                "least": min(kept), "most": max(kept),
            })  # fmt: skip
    return {
        "how": f"{who}, {first['contrast']}, {100 * NOISE_SD:g} % noise, spheres in white matter, "
        f"{shares} % darker and brighter",
        "rows": rows,
    }


STUDY = Study(
    "lesions",
    cases,
    measure,
    table,
    defaults={
        "spacing": (1.0, 3.0, 5.0),
        "n_samples": 2,
        "lesion_sizes": SIZES_MM,
        "lesion_contrasts": CONTRASTS,
    },
    quick={"spacing": (5.0,), "lesion_sizes": (8.0,), "lesion_contrasts": (-0.3, 0.3)},
    measured=measured,
)
