# SPDX-License-Identifier: Apache-2.0
"""Studies of the whole command: write degraded scans as BIDS data sets, and read the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.bids.names import BIDSName, result_name
from brainprior_bids.bids.status import read_summary
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.scans import run_command
from brainprior_bids.evaluation.studies.base import Bench, number_of
from brainprior_bids.evaluation.summary import Record, label_table
from brainprior_bids.records import RestoreRecord

SCANNER_UNIT = 500.0
"""Scanner value of the brain's 99th percentile in the simulated scans."""
MARGIN = 14
"""Smallest number of empty voxels around a brain."""

Image = NDArray[np.float32]
Rows = dict[str, dict[str, float]]
"""Label -> metric -> value."""


@dataclass(frozen=True)
class CommandSettings:
    """Settings shared by all studies of the whole command.

    Attributes
    ----------
    spacing_mm, noise_sd : float
        Slice spacing and noise of the scan; the brain's 99th percentile is 1.
    n_samples, seed : int
        Options of the command.
    slab_mm : int or None
        Height of a slab in the middle of the brain, along k; None: the whole brain.
    sloppy : bool
        Three network calls per sample, to test a study.
    """

    spacing_mm: float
    noise_sd: float
    n_samples: int
    seed: int = 0
    slab_mm: int | None = None
    sloppy: bool = False

    @property
    def name(self) -> str:
        """Name of the record's file."""
        slab = "" if self.slab_mm is None else f"-slab{self.slab_mm}"
        return f"{self.spacing_mm:g}mm-noise{self.noise_sd:g}{slab}"

    def rng(self, participant: Participant) -> np.random.Generator:
        """Random numbers of the degradation."""
        return np.random.default_rng([self.seed, number_of(participant.name)])

    def planes(self) -> Sequence[int]:
        """Planes to draw; for a slab, only the axial one."""
        return (0, 1, 2) if self.slab_mm is None else (2,)


@dataclass(frozen=True, eq=False)
class Truth:
    """A brain with a margin, on a grid that holds a whole number of slices along each axis."""

    data: Image
    inside: NDArray[np.bool_]
    grid: Grid
    to_mni305: NDArray[np.float64]


def padded(participant: Participant, spacing_mm: float, slab_mm: int | None = None) -> Truth:
    """The participant with at least ``MARGIN`` empty voxels around."""
    part = participant if slab_mm is None else _slab(participant, slab_mm)
    thick = round(spacing_mm)
    sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in part.data.shape]
    data, inside = np.pad(part.data, sides), np.pad(part.inside, sides)
    to_mni305 = part.to_mni305.copy()
    to_mni305[:3, 3] -= to_mni305[:3, :3] @ np.full(3, MARGIN)
    return Truth(data, inside, Grid(data.shape, np.eye(4)), to_mni305)


def _slab(participant: Participant, slab_mm: int) -> Participant:
    start = max((participant.data.shape[2] - slab_mm) // 2, 0)
    part = np.s_[:, :, start : start + slab_mm]
    to_mni305 = participant.to_mni305.copy()
    to_mni305[:3, 3] += start * to_mni305[:3, 2]
    return replace(
        participant,
        data=participant.data[part],
        inside=participant.inside[part],
        structures=participant.structures[part],
        to_mni305=to_mni305,
    )


def sidecar(spacing_mm: float) -> dict[str, Any]:
    """Metadata of a scan with contiguous slices."""
    return {
        "SliceThickness": spacing_mm,
        "SpacingBetweenSlices": spacing_mm,
        "MRAcquisitionType": "3D" if round(spacing_mm) == 1 else "2D",
    }


class Command:
    """The ``brainprior`` command on data sets of one participant."""

    def __init__(self, participant: Participant, settings: CommandSettings, bench: Bench) -> None:
        self.folder = bench.folder
        self.subject = f"sub-{participant.name}"
        self.options = [
            "--skip-bids-validation", "--no-viewer", "--clean-workdir",
            "--nprocs", "1", "--omp-nthreads", "1", "--device", bench.device,
            "--n-samples", str(settings.n_samples), "--random-seed", str(settings.seed),
            "--prior", str(bench.prior.absolute()), "-m", participant.contrast,
        ]  # fmt: skip
        if settings.sloppy:
            self.options.append("--sloppy")

    def run(self, bids_dir: Path, output: str, *options: str) -> Path:
        """Run the command; finished scans are not processed again. Returns the output folder."""
        output_dir = self.folder / output
        run_command(bids_dir, output_dir, [*self.options, *options])
        return output_dir


def restore_record(output_dir: Path, stem: str, image: str) -> RestoreRecord:
    """The record of a result's restoration, from its summary in ``logs/scans``.

    Raises
    ------
    UsageError
        If there is no summary.
    """
    source = BIDSName.parse(f"{stem}.nii.gz")
    summary = read_summary(output_dir, result_name(source, image))
    if summary is None:
        raise UsageError(f"{output_dir}: no summary of {stem}.")
    return summary.facts.restore


def rows_by_settings(records: Sequence[Record], header: Sequence[str]) -> Iterator[str]:
    """A caption and a table of labels for each spacing, noise and slab among the records."""

    def key(r: Record) -> tuple[float, float, int | None, int]:
        return (r["spacing_mm"], r["noise_sd"], r["slab_mm"], r["n_samples"])

    for settings in dict.fromkeys(key(r) for r in records):
        group = [r for r in records if key(r) == settings]
        spacing, noise, slab, n_samples = settings
        part = "whole brains" if slab is None else f"the middle {slab} mm"
        yield from (
            f"{group[0]['contrast']}, {part}, slices of {spacing:g} mm, noise {noise:g}; samples "
            f"per image: {n_samples}.",
            "",
            *label_table([r["rows"] for r in group], header),
            "",
        )
