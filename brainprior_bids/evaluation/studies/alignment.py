# SPDX-License-Identifier: Apache-2.0
"""Are structures where they should be? Contrasts of a session, and brains in a standard space.

*Contrasts*: where a T2w is next to the T1w, the centroids of structures that the embedded network
finds in each scan separately are compared: in scanner mm by the headers, after the rigid
registration of the contrasts, and in MNI305 after each scan's own affine. The distance contains
the error of each centroid; in the length of the mean displacement, such errors average out. The
images are the scans themselves, interpolated linearly to 1 mm, not restored.

*Template*: the T1w, divided by its bias field, is aligned with nilearn's ICBM152 2009a by its
affine to MNI305 alone, and for the first participants by SyN as with ``--output-spaces``. Brain
and template are labelled by the embedded network, each in its own space, and the brain's labels
are resampled to the template.

The prior is not used: the records and the table have the weights of the parcellation.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.brain import find_brain
from brainprior_bids.anatomy.contrasts import RestoredContrast, align_contrast
from brainprior_bids.anatomy.normalise import agreement, register, resample_through
from brainprior_bids.anatomy.prepare import Prepared, prepare
from brainprior_bids.anatomy.spaces import Kind, move, resample
from brainprior_bids.anatomy.templates import MNI152_FROM_MNI305, Template
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
    processor_seconds,
)
from brainprior_bids.evaluation.summary import Record, label_table

LOWEST_CONFIDENCE, LARGEST_CUT = 0.6, 0.05
"""A landmark is a structure of this confidence, of which the field of view cuts off no more."""
CONTRASTS, TEMPLATE = "contrasts", "template"

Matrix = NDArray[np.float64]
Landmarks = Mapping[str, Matrix]
"""Structure -> centroid, scanner RAS mm."""
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """``syn``: whether the brain is registered to the template nonlinearly too."""

    syn: bool

    @property
    def name(self) -> str:
        """Name of the record's file."""
        return "syn" if self.syn else "affine"


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """One case for every T1w of the test set."""
    available = find_spec("ants") is not None
    for n, source in enumerate(of_test_set(sources, "T1w")):
        yield source, Settings(available and n < options.syn_participants)


def lacking(options: Namespace) -> list[str]:
    """A message if SyN cannot be done."""
    if options.syn_participants == 0 or find_spec("ants") is not None:
        return []
    return ["alignment: no SyN, because antspyx is not installed."]


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``contrasts`` and ``template``: alignment -> metrics."""
    other = bench.source.with_name(bench.source.name.replace("_T1w", "_T2w"))
    record: Record = {TEMPLATE: in_template(participant, settings, bench.folder)}
    if other != bench.source and other.is_file():
        record[CONTRASTS] = between_contrasts(bench.source, other)
    return record


def between_contrasts(t1w: Path, t2w: Path) -> Rows:
    """Distances between the landmarks of two scans, by each alignment."""
    one, other = (
        prepare(path, network=parcellation(), unbias=False) for path in (t1w, t2w)
    )  # fmt: skip
    first, second = landmarks(one), landmarks(other)
    assert one.affine is not None
    assert other.affine is not None
    motion = align_contrast(on_one_millimetre(one, "T1w"), on_one_millimetre(other, "T2w"))
    return {
        "headers alone": apart(first, second, np.eye(4)),
        "rigid registration": apart(first, second, motion.to_reference),
        "each by its own affine to MNI305": apart(
            moved(first, one.affine.matrix), second, other.affine.matrix
        ),
    }


def on_one_millimetre(scan: Prepared, name: str) -> RestoredContrast:
    """A scan with mask and structures on its 1 mm grid."""
    grid = scan.grid.one_millimetre()
    values = resample(scan.values, scan.grid, grid, order=1)
    arrays = (values, scan.brain.mask, scan.brain.structures)
    return RestoredContrast(name, *(nib.Nifti1Image(a, np.array(grid.affine)) for a in arrays))


def landmarks(scan: Prepared) -> Landmarks:
    """The centroids of the structures that were found with confidence."""
    return {
        row["name"]: np.array(row["centroid_mm"])
        for row in scan.brain.table
        if row["confidence"] >= LOWEST_CONFIDENCE and row["cut_share"] <= LARGEST_CUT
    }


def moved(points: Landmarks, matrix: Matrix) -> Landmarks:
    """Landmarks after an affine."""
    return {name: (matrix @ np.append(point, 1.0))[:3] for name, point in points.items()}


def apart(one: Landmarks, other: Landmarks, matrix: Matrix) -> dict[str, float]:
    """Distances between the landmarks that both have; ``matrix`` moves the other's."""
    there = moved(other, matrix)
    shifts = np.array([there[name] - one[name] for name in sorted(one.keys() & other.keys())])
    return {
        "median distance, mm": float(np.median(np.linalg.norm(shifts, axis=1))),
        "mean displacement, mm": float(np.linalg.norm(shifts.mean(0))),
        "landmarks": float(len(shifts)),
    }


@cache
def template() -> tuple[TemporaryDirectory[str], Template, NDArray[np.int16]]:
    """nilearn's ICBM152 in a folder that is removed with this process, and its structures."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    scratch = TemporaryDirectory()
    folder = Path(scratch.name)
    result = Template("MNI152ICBM2009a", folder / "template.nii.gz", folder / "mask.nii.gz")
    nib.save(load_mni152_template(resolution=1), result.image)
    mask = load_mni152_brain_mask(resolution=1)
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj).astype(np.uint8), mask.affine), result.mask)
    brain = nib.Nifti1Image(result.brain(), np.array(result.grid.affine))
    return scratch, result, find_brain(brain, network=parcellation()).structures


def in_template(participant: Participant, settings: Settings, folder: Path) -> Rows:
    """Agreement of one brain with the template, by the affine and by SyN."""
    _, target, truth = template()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (participant.data, participant.inside.astype(np.uint8), participant.structures)
    image, mask, structures = (nib.Nifti1Image(array, np.eye(4)) for array in arrays)
    affine = MNI152_FROM_MNI305 @ participant.to_mni305
    ways: dict[str, Callable[[nib.Nifti1Image, Kind], nib.Nifti1Image]] = {
        "affine to MNI305, and from there to MNI152": lambda labels, kind: move(
            labels, target.grid, affine, kind=kind
        )
    }
    seconds = {}
    if settings.syn:
        began = processor_seconds()
        warp = register(
            image, mask, target, to_mni305=participant.to_mni305,
            contrast=participant.contrast, folder=folder,
        )  # fmt: skip
        seconds["affine and SyN"] = processor_seconds() - began
        ways["affine and SyN"] = lambda labels, kind: resample_through(
            labels, target, [warp.to_template], kind=kind
        )
    rows = {}
    for name, way in ways.items():
        inside = np.asarray(way(mask, Kind.MASK).dataobj) > 0
        rows[name] = {
            "Dice of the structures": mean_dice(way(structures, Kind.LABELS).dataobj, truth),
            "Dice of the brain masks": agreement(inside, target),
        }
        if name in seconds:
            rows[name]["processor time, s"] = seconds[name]
    return rows


def mean_dice(labels: Any, truth: NDArray[np.integer]) -> float:
    """Mean Dice over the structures of the truth."""
    labels = np.asarray(labels)
    values = []
    for label in np.unique(truth)[1:]:
        one, other = labels == label, truth == label
        values.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean(values))


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One table for the contrasts, where there are two, and one for the template."""
    text = []
    for part, title in (
        (CONTRASTS, "Structures found in T1w and T2w separately."),
        (TEMPLATE, "T1w in MNI152, labels of brain and template."),
    ):
        rows = [r[part] for r in records if part in r]
        if rows:
            text += [title, "", *label_table(rows, ["aligned by"]), ""]
    return text[:-1]


STUDY = Study(
    "alignment",
    cases,
    measure,
    table,
    defaults={"syn_participants": 2},
    quick={"syn_participants": 0},
    lacking=lacking,
    weights=("parcellation",),
)
