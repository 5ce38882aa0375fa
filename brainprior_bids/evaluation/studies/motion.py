# SPDX-License-Identifier: Apache-2.0
"""Motion between the interleaves of a 2-D scan: is it found, and what does its correction gain?

Whole heads are averaged to axial slices. Each interleave after the first shows the head after a
random rigid motion of its own (mm and degrees), and noise is added. The command's estimate is
compared with the true motion: ``error_mm`` is the RMS distance in the brain, the largest of all
interleaves. For some numbers of interleaves, twelve slices through the middle of the brain are
restored with ``exact``: as if the participant had not moved, and with the estimated motion, also
where the command would not correct it. Without motion: as one scan, and (first participant) as
``PARTS`` observations, each with the slices of the others hidden, which must be as good.

PSNR is computed against the head, 2 mm inside the brain, after one gain. An image that ignores the
motion shows a position between those of the interleaves; so each image is compared with the head
in all of them and in their mean, and the best one counts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.interleave_fit import rms
from brainprior_bids.anatomy.interleaves import InterleaveMotion, find_interleave_motion
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.anatomy.prepare import align_to_mni305
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation, mean_position
from brainprior_bids.engine.restore import restore
from brainprior_bids.evaluation.degrade import thick_slices
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, matching_gain
from brainprior_bids.evaluation.protocol import Participant
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    number_of,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.summary import Record, counted, groups_of, mean

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

AXIS = 2
SLICES = 12
"""Slices that are restored."""
PARTS = 3
"""Observations of a scan without motion."""
RIM_MM, EROSION_MM = 1.5, 2
STILL, SPLIT = "without motion", f"without motion, {PARTS} observations"
IGNORED, CORRECTED = "ignored", "corrected"


@dataclass(frozen=True)
class Settings:
    """One scan.

    Attributes
    ----------
    spacing_mm : float
        Rounded to a whole number of the head's slices, at least two.
    noise_sd : float
        As a share of the head's 99th percentile.
    interleaves : int
        1 for a scan without motion.
    move : float
        Shift in mm and rotation in degrees of each interleave after the first.
    restored, split : bool
        Whether the scan is restored, and without motion also as ``PARTS`` observations.
    n_samples, n_steps, seed : int
        Of the restored images.
    """

    spacing_mm: float
    noise_sd: float
    interleaves: int
    move: float
    restored: bool
    split: bool
    n_samples: int
    n_steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the record's file."""
        return f"{self.spacing_mm:g}mm-{self.interleaves}-moved{self.move:g}"


@dataclass(frozen=True, eq=False)
class Head:
    """A head without its bias field, and its brain on the same grid."""

    image: Image
    brain: Image
    grid: Grid
    to_mni305: Matrix

    def moved(self, matrix: Matrix) -> Head:
        """After the rigid motion of which ``matrix`` is the inverse (mm to mm)."""
        back = np.linalg.inv(matrix)
        image = resample(self.image, self.grid, self.grid, matrix=back, order=3)
        brain = resample(self.brain, self.grid, self.grid, matrix=back, order=1)
        return replace(self, image=image, brain=np.clip(brain, 0, 1))


@dataclass(frozen=True, eq=False)
class Places:
    """A head in the position of each interleave, and the motions to the first, (n, 4, 4)."""

    heads: Sequence[Head]
    to_first: Matrix


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Each head without motion, and with each number of interleaves, at every spacing."""
    n_steps = options.n_steps or options.calls
    for number, source in enumerate(of_test_set(sources, "T1w")):
        for interleaves in options.interleaves:
            for move in options.moves if interleaves > 1 else (0.0,):
                for spacing in options.spacing:
                    for noise in options.noise:
                        yield source, Settings(
                            spacing, noise, interleaves, move, interleaves in options.restored,
                            number == 0, options.n_samples, n_steps, options.random_seed,
                        )  # fmt: skip


@lru_cache(maxsize=1)
def load(path: Path) -> Head:
    """Read a head and preprocess it as brainprior does."""
    image = conform(path, metadata={}).image
    grid = Grid(image.shape, image.affine)
    parcels = parcellate(image, network=parcellation(), restored_grid=grid.one_millimetre())
    brain = resample(parcels.mask.astype(np.float32), grid.one_millimetre(), grid, order=1)
    affine = align_to_mni305(image, parcels.mask, parcels.table)
    values = image.get_fdata(dtype=np.float32) / np.exp(n4(image, brain, threads=1))
    return Head(values, brain, grid, np.array(affine.matrix))


@lru_cache(maxsize=1)
def placed(path: Path, name: str, interleaves: int, move: float, seed: int) -> Places:
    """The head after the random motions of a participant; they are the same at every spacing."""
    head = load(path)
    rng = np.random.default_rng([seed, number_of(name), interleaves])
    centre = head.grid.points_mm()[:, head.brain > 0.5].mean(1)
    to_first = np.stack([np.eye(4)] * interleaves)
    for matrix in to_first[1:]:
        shift, turn = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
        matrix[:3, :3] = Rotation.from_rotvec(np.radians(move) * turn).as_matrix()
        matrix[:3, 3] = centre - matrix[:3, :3] @ centre + move * shift
    return Places([head, *(head.moved(matrix) for matrix in to_first[1:])], to_first)


def scanned(places: Places, settings: Settings) -> Observation:
    """Noisy thick slices, each interleave of the head in its position."""
    first, count = places.heads[0].grid, len(places.heads)
    thin = float(first.spacing_mm[AXIS])
    spacing = thin * max(2, round(settings.spacing_mm / thin))
    images: list[Image] = []
    for kind in ("image", "brain"):
        thick, grid = zip(
            *(
                thick_slices(
                    getattr(head, kind), first, axis=AXIS, spacing_mm=spacing, profile="boxcar"
                )
                for head in places.heads
            ),
            strict=True,
        )
        images.append(thick[0])
        for p in range(1, count):
            images[-1][..., p::count] = thick[p][..., p::count]
    values, share = images
    rng = np.random.default_rng(settings.seed)
    noise = settings.noise_sd * np.percentile(values, 99) * rng.standard_normal(values.shape)
    noisy = np.abs(values + noise).astype(np.float32)
    return Observation(noisy, grid[0], Acquisition(AXIS, spacing, spacing), share)


def slab(whole: Observation, interleaves: int) -> Observation:
    """``SLICES`` slices in the middle of the brain, from one of the first interleave."""
    share = np.asarray(whole.mask)
    middle = int(np.flatnonzero(share.max((0, 1)) > 0.9).mean())
    first = max(middle - SLICES // 2, 0) // interleaves * interleaves
    i, j, _ = whole.grid.shape
    part = np.s_[..., first : first + SLICES]
    grid = whole.grid.crop((0, 0, first), (i, j, first + SLICES))
    return Observation(whole.scan[part], grid, whole.acquisition, share[part])


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """The estimate and its error; ``psnr``: way of restoring the scan -> dB."""
    count = settings.interleaves
    places = placed(bench.source, participant.name, count, settings.move, settings.seed)
    scan = scanned(places, settings)
    estimate = find_interleave_motion(
        scan.scan, scan.log_bias, scan.mask, scan.grid, scan.acquisition
    )
    assert estimate is not None
    record = {
        "slices_mm": estimate.spacing_mm,
        **_judged(estimate, places),
        "reported": estimate.moved,
        "psnr": {},
    }
    if settings.restored:
        record["psnr"] = _restored(scan, estimate, places, settings, bench)
    return record


def _judged(estimate: InterleaveMotion, places: Places) -> Record:
    """The number of interleaves that was found, and the distance from the true motion in mm; None
    if the number is wrong. Without motion, any number is right.
    """
    head, found = places.heads[0], len(estimate.to_reference)
    points = head.grid.points_mm()[:, head.brain > 0.5].astype(np.float64)
    true = places.to_first if len(places.heads) > 1 else np.stack([np.eye(4)] * found)
    true_mm = max(rms(a, b, points) for a in true for b in true)
    error = None
    if found == len(true):
        pairs = zip(estimate.to_reference, true, strict=True)
        error = max(rms(one, other, points) for one, other in pairs)
    return {"found": found, "true_mm": true_mm, "error_mm": error}


def _restored(
    scan: Observation,
    estimate: InterleaveMotion,
    places: Places,
    settings: Settings,
    bench: Bench,
) -> dict[str, float]:
    """PSNR of every way of restoring the slab."""
    part, head = slab(scan, settings.interleaves), places.heads[0]
    ways = {STILL: part}
    if settings.interleaves > 1:
        ways = {IGNORED: part, CORRECTED: replace(part, interleave_motion=estimate.to_reference)}
    elif settings.split:
        ways[SPLIT] = replace(part, interleave_motion=np.stack([np.eye(4)] * PARTS))
    fine = part.grid.one_millimetre()
    shown = np.concatenate([mean_position(places.to_first)[None], places.to_first])
    masks, truths = [], []
    for back in np.linalg.inv(shown[: 1 if settings.interleaves == 1 else None]):
        brain = resample(head.brain, head.grid, fine, matrix=back, order=1)
        masks.append(brain > 0.5)
        truths.append(resample(head.image, head.grid, fine, matrix=back, order=3))
    insides = [ndimage.binary_erosion(mask, iterations=EROSION_MM) for mask in masks]
    images: dict[str, Image] = {}
    for way, observation in ways.items():
        result = restore(
            observation, mask_1mm=masks[0], rim_mm=RIM_MM, to_mni305=head.to_mni305,
            contrast="T1w", prior=bench.load_prior(), sampler="exact",
            n_samples=settings.n_samples, n_steps=settings.n_steps, seed=settings.seed,
            device=bench.device,
        )  # fmt: skip
        images[way] = torch.as_tensor(result.mean).cpu().numpy()
    if bench.picture is not None:
        _draw(bench.picture, images, truths[0], insides[0])
    pairs = list(zip(truths, insides, strict=True))
    return {way: max(_psnr(image, *pair) for pair in pairs) for way, image in images.items()}


def _psnr(image: Image, truth: Image, inside: NDArray[np.bool_]) -> float:
    """After one gain, in dB."""
    gain = matching_gain(image, truth, inside)
    return float(compare(gain * image, truth, inside)["psnr_db"])


def _draw(
    path: Path, images: Mapping[str, Image], truth: Image, inside: NDArray[np.bool_]
) -> None:
    top = 1.05 * float(np.percentile(truth[inside], 99))
    columns = [Column("head", np.where(inside, truth, 0), top)]
    for way, image in images.items():
        gain = matching_gain(image, truth, inside)
        columns.append(Column(way, np.where(inside, gain * image, 0), top))
    draw(path, columns, inside=inside, spacing_mm=[1.0] * 3, caption=path.stem, planes=(0, 1))


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """Two tables, one row per kind of scan: the estimate, and the gain of the correction."""
    first = records[0]
    groups = groups_of(records, lambda r: (r["spacing_mm"], r["interleaves"], r["move"]))
    lines = [
        f"T1w heads averaged to axial slices, noise {first['noise_sd']:g}. Motion and error are "
        "the largest RMS displacement in the brain between two interleaves and the RMS distance "
        "from the true motion, mm: mean (largest). Reported: the command would warn.",
        "",
        "| slices, mm | interleaves | motion | heads | number found | error | reported |",
        "|---" * 7 + "|",
        *(_estimate_row(group) for group in groups),
    ]
    groups = [[r for r in group if r["psnr"]] for group in groups]
    if not any(groups):
        return lines
    still = {g[0]["spacing_mm"]: g for g in groups if g and g[0]["interleaves"] == 1}
    lines += [
        "",
        f"{SLICES} slices, `exact`, {counted(first['n_samples'], 'sample')} of "
        f"{counted(first['n_steps'], 'call')}; PSNR in dB, mean (smallest, largest).",
        "",
        f"| slices, mm | interleaves | motion | heads | {STILL} | motion ignored | gain of the "
        "correction |",
        "|---" * 7 + "|",
    ]
    lines += [_gain_row(g, still.get(g[0]["spacing_mm"], [])) for g in groups if _moved(g)]
    differences = [
        abs(r["psnr"][SPLIT] - r["psnr"][STILL])
        for group in still.values()
        for r in group
        if SPLIT in r["psnr"]
    ]
    if differences:
        lines += [
            "",
            f"- Without motion, {PARTS} observations instead of one scan change the PSNR by at "
            f"most {max(differences):.2f} dB (first head, every spacing).",
        ]
    return lines


def _moved(group: Sequence[Record]) -> bool:
    return bool(group) and group[0]["interleaves"] > 1


def _estimate_row(group: Sequence[Record]) -> str:
    first, n = group[0], len(group)
    errors = [r["error_mm"] for r in group if r["error_mm"] is not None]
    largest = f"{mean(errors, 2)} ({max(errors):.2f})" if errors else "n/a"
    moved = _moved(group)
    right = sum(r["found"] == r["interleaves"] for r in group)
    motion = f"{np.mean([r['true_mm'] for r in group]):.1f}" if moved else "none"
    reported = sum(r["reported"] for r in group)
    return (
        f"| {first['slices_mm']:.1f} | {first['interleaves'] if moved else '-'} | {motion} | {n} "
        f"| {f'{right} of {n}' if moved else '-'} | {largest} | {reported} of {n} |"
    )


def _gain_row(group: Sequence[Record], still: Sequence[Record]) -> str:
    first = group[0]
    ignored = [r["psnr"][IGNORED] for r in group]
    gains = [r["psnr"][CORRECTED] - r["psnr"][IGNORED] for r in group]
    cells = [
        f"{first['slices_mm']:.1f}",
        f"{first['interleaves']}",
        f"{np.mean([r['true_mm'] for r in group]):.1f}",
        f"{len(group)}",
        mean([r["psnr"][STILL] for r in still], 1),
        mean(ignored, 1),
        f"{np.mean(gains):+.1f} ({min(gains):+.1f}, {max(gains):+.1f})",
    ]
    return f"| {' | '.join(cells)} |"


STUDY = Study(
    "motion",
    cases,
    measure,
    table,
    defaults={
        "spacing": (2.7, 4.0, 5.3),
        "noise": (0.01,),
        "interleaves": (1, 2, 3, 4),
        "moves": (2.0,),
        "restored": (1, 2, 3, 4),
        "n_samples": 1,
        "calls": 4,
    },
    quick={"spacing": (4.0,), "interleaves": (3,), "restored": ()},
)
