# SPDX-License-Identifier: Apache-2.0
"""Does restoration change what a study measures? Tissue classes, volumes, cortical thickness.

Whole T1w brains are degraded and restored as in ``segmentation``. Every image is measured
in the same way as the truth:

* *tissue classes* by ANTs Atropos in the truth's mask (three classes, k-means start); thick slices
  are repeated to 1 mm;
* *structures* by the embedded parcellation;
* *cortical thickness* by ANTs' KellyKapowski from the classes, of the truth, cubic, the restored
  image and one sample, with voxels of 1 mm and ``DIRECT_ITERATIONS`` iterations. An image's
  mean is taken over its own cortex: voxels that its parcellation calls cerebral cortex and that
  have a thickness. Voxels and cubes are compared inside the truth's cortex, where the image has a
  thickness too; the table states the share of the voxels where it has none.

Bland-Altman: mean of the differences from the truth over the participants, and that mean ± 1.96
SD (n - 1).
"""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.engine.errors import InputError
from brainprior_bids.evaluation.baselines import interpolate
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.protocol import (
    GREY,
    Case,
    Condition,
    Participant,
    all_images,
    label_agreement,
    make_case,
    parcellations,
)
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.studies.restoration import REFERENCE, base_condition, width_of
from brainprior_bids.evaluation.summary import (
    NAMES,
    Record,
    condition_key,
    counted,
    groups_of,
    mean,
    mean_sd,
    settings,
    title,
)
from brainprior_bids.evaluation.tissue_classes import (
    CLASSES,
    DIRECT_ITERATIONS,
    Tissues,
    cortical_thickness,
    tissue_classes,
)
from brainprior_bids.training.synthesis import bounding_box

STRUCTURES = {
    "hippocampus": (17, 53),
    "lateral ventricles": (4, 5, 43, 44),
    "third ventricle": (14,),
    "fourth ventricle": (15,),
}
"""Name -> FreeSurfer values, both sides together."""
METHODS = ("degraded", "cubic", "tv", "sample", "restored")
THICK_METHODS = ("cubic", "sample", "restored")
FEWEST_CORTEX = 1000
"""Voxels of cortex with a thickness in the truth."""
CUBE_MM = 20
"""Edge of the cubes whose mean thickness is compared."""
FEWEST_IN_CUBE = 200
"""Voxels of cortex."""

Labels = NDArray[np.integer[Any]]
Image = NDArray[np.float32]


@dataclass(frozen=True)
class Settings(Condition):
    """``thickness``: whether cortical thickness is measured, in minutes per image."""

    thickness: bool = True


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """One scan of each of the first participants."""
    base = base_condition(options, "downstream")
    changed = {**asdict(base), **REFERENCE, "crop_mm": None, "thickness": options.thickness}
    first = of_test_set(sources, "T1w")[: options.downstream_participants]
    for n, source in enumerate(first):
        yield source, replace(Settings(**changed), width=width_of(options, n))


def measure(participant: Participant, condition: Settings, bench: Bench) -> Record:
    """``tissues`` and ``structures`` of every image, ``cortex`` (thickness) of some."""
    case = make_case(participant, condition)
    images, sampler = restored_once(case, participant.contrast, condition, bench)
    found = parcellations(case, images, parcellation())
    cortex = {method: np.isin(labels, GREY) & case.inside for method, labels in found.items()}
    images = {
        "true": case.truth.data,
        "degraded": interpolate(case.flat.data, case.scan.grid, case.truth.grid, order=0),
        **{method: images[method] for method in METHODS if method in images},
    }
    tissues = {method: tissue_classes(image, case.inside) for method, image in images.items()}
    grouped = {method: in_groups(labels) for method, labels in found.items()}
    record = {
        "sampler_used": sampler,
        "tissues": compared({m: t.labels for m, t in tissues.items()}, CLASSES, case.inside),
        "structures": compared(grouped, group_labels(), case.inside),
    }
    shown = {method: tissue.labels.astype(np.float32) for method, tissue in tissues.items()}
    top = float(len(CLASSES))
    if condition.thickness:
        maps, seconds = thickness_maps(tissues, case, bench.folder)
        record["cortex"] = compare_thickness(maps, cortex, participant.name)
        record["thickness_seconds"] = seconds
        shown, top = maps, 5.0
    if bench.picture is not None:
        _draw(bench.picture, case, shown, top)
    return record


def restored_once(
    case: Case, contrast: str, condition: Condition, bench: Bench
) -> tuple[dict[str, Image], str]:
    """The image of every method, and the sampler; those of an interrupted call are used again."""
    path = bench.folder / "images.npz"
    if not path.is_file():
        images, result = all_images(
            case,
            condition,
            contrast,
            prior=bench.load_prior(),
            penalties=bench.penalties,
            device=bench.device,
        )
        facts = {"sampler": result.sampler, "asked_coarse": bench.asked_coarse()}
        save_arrays(path, {**images, **{key: np.array(value) for key, value in facts.items()}})
    with np.load(path, allow_pickle=False) as held:
        arrays = dict(held)
    if arrays.pop("asked_coarse"):
        bench.load_prior().asked_coarse = True
    return arrays, str(arrays.pop("sampler"))


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write; in place only once complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def group_labels() -> dict[str, int]:
    """Name of each of ``STRUCTURES`` -> its label in ``in_groups``."""
    return {name: number for number, name in enumerate(STRUCTURES, 1)}


def in_groups(structures: Labels) -> Labels:
    """Labels of ``group_labels`` from a parcellation."""
    groups = np.zeros(structures.shape, np.uint8)
    for name, number in group_labels().items():
        groups[np.isin(structures, STRUCTURES[name])] = number
    return groups


def compared(
    labels: Mapping[str, Labels], names: Mapping[str, int], inside: NDArray[np.bool_]
) -> dict[str, Any]:
    """Volumes of the truth in ml, and Dice and relative error of the volume of every image.

    Parameters
    ----------
    labels : Mapping
        Method -> label image; ``true`` is the reference.
    names : Mapping
        Name -> label. A label of hardly any voxels in the truth is left out.
    inside : (i, j, k) bool array
        Voxels of 1 mm.
    """
    truth = labels["true"]
    rows = {}
    for method in METHODS:
        if method in labels:
            row = label_agreement(labels[method], truth, inside, list(names.values()))
            rows[method] = {
                key: {name: values[n] for name, n in names.items() if n in values}
                for key, values in row.items()
            }
    ml = {name: float((inside & (truth == n)).sum() / 1000) for name, n in names.items()}
    return {"true_ml": ml, "methods": rows}


def thickness_maps(
    tissues: Mapping[str, Tissues], case: Case, folder: Path
) -> tuple[dict[str, Image], dict[str, float]]:
    """Thickness of the truth and of ``THICK_METHODS``, and the seconds of a core for each.

    Maps of an interrupted call, in ``folder``, are used again.
    """
    box = bounding_box(case.inside, 2)
    maps, seconds = {}, {}
    for method in ("true", *THICK_METHODS):
        if method not in tissues:
            continue
        path = folder / f"thickness_{method}.npz"
        if not path.is_file():
            began = time.process_time()
            full = tissues[method]
            part = Tissues(full.labels[box], full.grey[box], full.white[box])
            image = np.zeros(case.inside.shape, np.float32)
            image[box] = cortical_thickness(part)
            spent = np.array(time.process_time() - began)
            save_arrays(path, {"image": image, "seconds": spent})
        with np.load(path, allow_pickle=False) as held:
            maps[method], seconds[method] = held["image"], round(float(held["seconds"]), 1)
    return maps, seconds


def compare_thickness(
    maps: Mapping[str, Image], cortex: Mapping[str, NDArray[np.bool_]], name: str
) -> dict[str, Any]:
    """Mean thickness of every image, and its agreement with the truth inside the truth's cortex.

    Parameters
    ----------
    maps : Mapping
        Method -> (i, j, k) thickness in mm, 0 where there is none; ``true`` is the reference.
    cortex : Mapping
        Method -> (i, j, k) bool array, the cortex of that image.
    name : str
        Of the participant, for the message.

    Returns
    -------
    dict
        ``true_mm``, the truth's mean, its ``voxels``, and ``methods``: ``mean_mm`` of the image's
        own cortex; in the truth's cortex the ``missing`` share of the voxels and, over the
        others, the ``sd_mm`` of the difference and the ``correlation`` of the voxels, and the
        same of the means of cubes (``cube_sd_mm``, ``cube_correlation``).

    Raises
    ------
    InputError
        If the truth has fewer than ``FEWEST_CORTEX`` voxels of cortex with a thickness.
    """
    truth = maps["true"]
    reference = cortex["true"] & (truth > 0)
    voxels = int(reference.sum())
    if voxels < FEWEST_CORTEX:
        raise InputError(
            f"downstream: expected at least {FEWEST_CORTEX} voxels of cortex with a thickness in "
            f"the truth of {name}, found {voxels}. Leave thickness out with --no-thickness."
        )
    rows = {}
    for method, image in maps.items():
        both = reference & (image > 0)
        if method == "true" or both.sum() < FEWEST_CORTEX:
            continue
        cubes = cube_means(image, truth, both)
        rows[method] = {
            "mean_mm": float(image[cortex[method] & (image > 0)].mean()),
            "missing": 1 - float(both.sum() / voxels),
            "sd_mm": float((image - truth)[both].std(ddof=1)),
            "correlation": correlation(image[both], truth[both]),
            "cube_sd_mm": float((cubes[:, 0] - cubes[:, 1]).std()) if len(cubes) else None,
            "cube_correlation": correlation(cubes[:, 0], cubes[:, 1]),
            "cubes": len(cubes),
        }
    return {"true_mm": float(truth[reference].mean()), "voxels": voxels, "methods": rows}


def cube_means(image: Image, truth: Image, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(cubes, 2) means of image and truth over the voxels of each cube."""
    rows = []
    for corner in itertools.product(*(range(0, n, CUBE_MM) for n in where.shape)):
        part = tuple(slice(c, c + CUBE_MM) for c in corner)
        own = where[part]
        if own.sum() >= FEWEST_IN_CUBE:
            rows.append((image[part][own].mean(), truth[part][own].mean()))
    return np.array(rows, np.float64).reshape(-1, 2)


def correlation(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float | None:
    """Pearson's; None for fewer than three values, or if one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _draw(path: Path, case: Case, shown: Mapping[str, Image], top: float) -> None:
    """Thickness (0-5 mm), or the classes, of every image that has them."""
    titles = {method: NAMES[method].strip("`").partition(" (")[0] for method in shown}
    colours = "viridis" if top > len(CLASSES) else "gray"
    columns = [Column(titles[method], image, top, colours) for method, image in shown.items()]
    draw(path, columns, inside=case.inside, spacing_mm=[1.0] * 3, caption=path.stem)


@dataclass(frozen=True)
class BlandAltman:
    """Bias, and the limits between which 95 % of the differences are expected.

    Attributes
    ----------
    bias : float
    limits : (float, float) or None
        None for a single difference.
    """

    bias: float
    limits: tuple[float, float] | None

    def shown(self, digits: int) -> str:
        """``-1.2 [-3.4, 1.0]``"""
        text = f"{self.bias:+.{digits}f}"
        if self.limits is None:
            return text
        low, high = self.limits
        return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def bland_altman(differences: Sequence[float]) -> BlandAltman:
    """Mean of the differences ± 1.96 SD (n - 1). Bland and Altman, Lancet 327 (1986)."""
    bias = float(np.mean(differences))
    if len(differences) < 2:
        return BlandAltman(bias, None)
    half = 1.96 * float(np.std(differences, ddof=1))
    return BlandAltman(bias, (bias - half, bias + half))


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """Classes, structures and thickness, one row per image."""
    text = [settings(records)]
    for group in groups_of(records, condition_key):
        text += ["", f"{title(group[0], len(group))}.", ""]
        text += ["Tissue classes by Atropos:", "", *volume_table(group, "tissues", CLASSES)]
        text += ["", "Structures by the embedded parcellation:", ""]
        text += volume_table(group, "structures", STRUCTURES)
        measured = [r for r in group if "cortex" in r]
        if measured:
            text += ["", *thickness_table(measured)]
    return text


def volume_table(group: Sequence[Record], kind: str, names: Mapping[str, Any]) -> list[str]:
    """One row per image: Dice and Bland-Altman of the volume, for each name."""
    cells = []
    for name in names:
        volumes = [r[kind]["true_ml"][name] for r in group]
        cells += [f"{name}: Dice", f"volume, % (truth {mean(volumes, 1)} ml)"]
    text = [f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for method in METHODS:
        held = [r[kind]["methods"][method] for r in group if method in r[kind]["methods"]]
        if not held:
            continue
        cells = [NAMES[method]]
        for name in names:
            cells.append(mean_sd([row["dice"][name] for row in held if name in row["dice"]], 3))
            errors = [100 * row["volume_error"][name] for row in held if name in row["dice"]]
            cells.append(bland_altman(errors).shown(1) if errors else "n/a")
        text.append(f"| {' | '.join(cells)} |")
    return text


def thickness_table(group: Sequence[Record]) -> list[str]:
    """One row per image, with a caption of the truth's thickness and the time."""
    truth = mean_sd([r["cortex"]["true_mm"] for r in group], 2)
    seconds = [s for r in group for s in r["thickness_seconds"].values()]
    cubes = [row["cubes"] for r in group for row in r["cortex"]["methods"].values()]
    text = [
        f"Cortical thickness by KellyKapowski ({DIRECT_ITERATIONS} iterations, 1 mm, "
        f"{mean(seconds, 0)} s of a core per image), {counted(len(group), 'participant')}. "
        f"Mean of the truth: {truth} mm. Cubes of {CUBE_MM} mm: {mean(cubes, 0)} per participant.",
        "",
    ]
    columns = ["mean, mm", "mean minus truth, mm", "SD over voxels, mm", "correlation of voxels"]
    columns += ["SD over cubes, mm", "correlation of cubes", "voxels without thickness, %"]
    text += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in THICK_METHODS:
        held = [r["cortex"] for r in group if method in r["cortex"]["methods"]]
        if not held:
            continue
        rows = [thickness["methods"][method] for thickness in held]
        cells = [NAMES[method], mean_sd([row["mean_mm"] for row in rows], 2)]
        away = [row["mean_mm"] - t["true_mm"] for row, t in zip(rows, held, strict=True)]
        cells.append(bland_altman(away).shown(2))
        for key in ("sd_mm", "correlation", "cube_sd_mm", "cube_correlation"):
            cells.append(mean_sd([row[key] for row in rows if row[key] is not None], 2))
        cells.append(mean_sd([100 * row["missing"] for row in rows], 1))
        text.append(f"| {' | '.join(cells)} |")
    return text


STUDY = Study(
    "downstream",
    cases,
    measure,
    table,
    defaults={"n_samples": 2, "thickness": True},
    quick={"n_samples": 1, "thickness": False},
    tuned=True,
    needs=("ants", "antspyx"),
)
