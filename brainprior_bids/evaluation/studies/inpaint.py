# SPDX-License-Identifier: Apache-2.0
"""Inpaint holes in healthy brains: error, seam, and influence of the hidden content.

One mask has separate spheres of 10, 20 and 30 mm and a ragged blob of some 20 mm, on a T1w at 1 mm
with 2 % noise and a bias field. Three BIDS data sets have the same scan and mask, but differ under
the mask: ``hole`` has 0, ``lesion`` 0.4 of the original intensity, and ``control`` the original.
``brainprior --task inpaint`` fills each. With a spacing above 1 the slices are thick and the
task is ``restore inpaint``; all images are then compared on the 1 mm grid, after one gain for the
rest of the brain.

In each hole, against the noise-free scan, in units of the brain's 99th percentile: MAE and SSIM of

* ``mean``, ``sample``: the images that the command wrote;
* ``nearest``: each voxel has the value of the nearest voxel outside the hole (in the truth);
* ``average``: an average head in MNI305 (``--average``), transformed by the true affine, with its
  intensity fitted around the hole.

``seam`` is the mean absolute step between neighbours across the border of the hole, divided by the
same in the truth: 1 if the border is invisible. ``off control`` is the mean absolute difference in
the hole from the result of the control, the same scan with neither hole nor lesion. A separate
line states whether every voxel outside the mask is the scan's, bit for bit (1 if so).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, add_noise, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, matching_gain
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
    rows_by_settings,
    sidecar,
)
from brainprior_bids.evaluation.summary import Record

AXIS = 2
BIAS_SD = 0.1
PLACES = {
    "10 mm": (0.30, 0.28, 0.58),
    "20 mm": (0.70, 0.45, 0.58),
    "30 mm": (0.30, 0.63, 0.58),
    "blob": (0.70, 0.75, 0.55),
}
"""Centre of each hole, as a fraction of the brain's bounding box, RAS."""
LESION = 0.4
OTHERS = ("lesion | ", "control | ")
"""Variants that the table leaves out: their images hardly differ from those of ``hole``."""
OUTSIDE = "every voxel outside the mask is the scan's, bit for bit"

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Settings(CommandSettings):
    """``average``: file of the average head; without it (None) the row is omitted."""

    average: str | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """A degraded scan and its holes."""

    clean: Image  # before noise
    data: Image
    grid: Grid
    holes: dict[str, Mask]  # 1 mm
    mask: Mask  # all holes, on the scan's grid

    @property
    def everywhere(self) -> Mask:
        """All holes, 1 mm."""
        union: Mask = np.any(list(self.holes.values()), axis=0)
        return union


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Settings]]:
    """Every spacing and noise for every T1w of the test set."""
    average = None if options.average is None else str(options.average.absolute())
    for spacing in options.spacing:
        for noise in options.noise:
            for source in of_test_set(sources, "T1w"):
                yield source, Settings(
                    spacing, noise, options.n_samples, options.random_seed, options.slab,
                    average=average,
                )  # fmt: skip


def measure(participant: Participant, settings: Settings, bench: Bench) -> Record:
    """``rows``: "scan | what | hole" -> metrics."""
    truth = padded(participant, settings.spacing_mm, settings.slab_mm)
    scan = make_scan(truth, settings, settings.rng(participant))
    command = Command(participant, settings, bench)
    filled, same = fill(scan, truth.grid, settings, command, f"_{participant.contrast}")
    reference = scan.clean if round(settings.spacing_mm) == 1 else truth.data
    if round(settings.spacing_mm) > 1:
        rest = truth.inside & ~scan.everywhere
        filled = {k: v * matching_gain(v, reference, rest) for k, v in filled.items()}
    simple = baselines(reference, truth, scan, settings.average)
    rows = compare_holes(filled, simple, reference, truth.inside, scan)
    rows |= {f"{variant}: {OUTSIDE}": {"value": equal} for variant, equal in same.items()}
    if bench.picture is not None:
        _draw(bench.picture, reference, truth.inside, scan, filled, simple, settings)
    return {"rows": rows}


def make_scan(truth: Truth, settings: Settings, rng: np.random.Generator) -> Scan:
    """Degrade the brain and put holes into it."""
    spacing = settings.spacing_mm
    recipe = Recipe(
        axis=AXIS, spacing_mm=spacing, thickness_mm=spacing, noise_sd=0.0, bias_sd=BIAS_SD
    )
    clean, grid = degrade(truth.data, truth.grid, recipe, rng, unit=1.0)
    data = add_noise(clean, rng, sd=settings.noise_sd, rician=False)
    masks = holes(truth.inside, rng)
    factors = (1, 1, round(spacing))
    shape = [n for m, f in zip(grid.shape, factors, strict=True) for n in (m, f)]
    mask = np.any(list(masks.values()), axis=0).reshape(shape).any((1, 3, 5))
    return Scan(clean, data, grid, masks, mask)


def holes(inside: Mask, rng: np.random.Generator) -> dict[str, Mask]:
    """Spheres, and a ragged blob of about 20 mm, each within the brain."""
    edges = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] for a in range(3)]
    low, high = np.transpose(edges)
    ragged = ndimage.gaussian_filter(rng.normal(size=inside.shape), 3)
    masks = {}
    for name, place in PLACES.items():
        centre = low + np.array(place) * (high - low)
        distance = np.linalg.norm(np.indices(inside.shape).T - centre, axis=-1).T
        if name == "blob":
            masks[name] = (distance + 5 * ragged / ragged.std() <= 10) & (distance < 25) & inside
        else:
            masks[name] = (distance <= float(name.split()[0]) / 2) & inside
    return masks


def fill(
    scan: Scan, fine: Grid, settings: Settings, command: Command, suffix: str
) -> tuple[dict[str, Image], dict[str, float]]:
    """Run the command on each variant.

    Returns
    -------
    filled : dict
        "variant | mean" and "variant | sample" -> image on the 1 mm grid; 99th percentile 1.
    same : dict
        Variant -> 1 if every voxel outside the mask is the scan's; for 1 mm scans.
    """
    thin = round(settings.spacing_mm) == 1
    image, task = ("inpainted", ["inpaint"]) if thin else (
        "restoredInpainted", ["restore", "inpaint"]
    )  # fmt: skip
    stem = command.subject + suffix
    variants = {
        "hole": np.where(scan.mask, 0, scan.data),
        "lesion": np.where(scan.mask, LESION * scan.data, scan.data),
        "control": scan.data,
    }
    filled, same = {}, {}
    for variant, data in variants.items():
        bids_dir = command.folder / variant
        scanned = Volume((data * SCANNER_UNIT).astype(np.float32), scan.grid)
        path = write_scan(
            bids_dir, stem, scanned, dataset=f"Inpainting, {variant}",
            metadata=sidecar(settings.spacing_mm),
        )  # fmt: skip
        mask = nib.Nifti1Image(scan.mask.astype(np.uint8), np.array(scan.grid.affine))
        nib.save(mask, path.with_name(f"{command.subject}_label-lesion_roi.nii.gz"))
        output = command.run(bids_dir, f"{variant}-out", "--task", *task, "--save-samples")
        for what, role in (("mean", "restored"), ("sample", "sample01")):
            result = read_output(output, stem, image, role)
            if thin and what == "mean":
                equal = np.array_equal(result.data[~scan.mask], scanned.data[~scan.mask])
                same[variant] = float(equal)
            values = result.data if thin else resample(result.data, result.grid, fine)
            filled[f"{variant} | {what}"] = values / SCANNER_UNIT
    return filled, same


def baselines(
    reference: Image, truth: Truth, scan: Scan, average: str | None
) -> dict[str, dict[str, Image]]:
    """Method -> hole -> image."""
    nearest = ndimage.distance_transform_edt(
        scan.everywhere | ~truth.inside, return_distances=False, return_indices=True
    )
    images = {"nearest": dict.fromkeys(scan.holes, reference[tuple(nearest)])}
    if average is not None:
        image: Any = nib.as_closest_canonical(nib.load(Path(average)))
        head = resample(
            np.asarray(image.dataobj, np.float32),
            Grid(image.shape, image.affine),
            truth.grid,
            matrix=np.linalg.inv(truth.to_mni305),
        )
        images["average"] = {}
        for kind, where in scan.holes.items():
            around = ndimage.binary_dilation(where, iterations=8) & truth.inside & ~scan.everywhere
            fit = np.polyfit(head[around], reference[around], 1)
            images["average"][kind] = np.polyval(fit, head)
    return images


def compare_holes(
    filled: Mapping[str, Image],
    simple: Mapping[str, Mapping[str, Image]],
    reference: Image,
    inside: Mask,
    scan: Scan,
) -> Rows:
    """Metrics of every image in every hole."""
    rows: Rows = {}
    for kind, where in scan.holes.items():
        images = {**filled, **{f"- | {method}": image[kind] for method, image in simple.items()}}
        for method, image in images.items():
            variant, _, what = method.partition(" | ")
            whole = np.where(where, image, reference)
            metrics = compare(whole, reference, where)
            row = {
                "MAE": metrics["mae"],
                "SSIM": metrics["ssim"],
                "seam": seam(whole, where, inside) / seam(reference, where, inside),
            }
            if variant in ("hole", "lesion"):
                off = np.abs(image - filled[f"control | {what}"])[where]
                row["off control"] = float(off.mean())
            rows[f"{method} | {kind}"] = row
    return rows


def seam(image: Image, where: Mask, inside: Mask) -> float:
    """Mean absolute step across the border of the hole, between neighbours in the brain."""
    steps = []
    for axis in range(3):
        low, high = range(where.shape[axis] - 1), range(1, where.shape[axis])
        a, b = np.take(where, low, axis), np.take(where, high, axis)
        c, d = np.take(inside, low, axis), np.take(inside, high, axis)
        steps.append(np.abs(np.diff(image, axis=axis))[(a != b) & c & d])
    return float(np.concatenate(steps).mean())


def _draw(
    path: Path,
    reference: Image,
    inside: Mask,
    scan: Scan,
    filled: Mapping[str, Image],
    simple: Mapping[str, Mapping[str, Image]],
    settings: Settings,
) -> None:
    """Draw the truth, the holes, and the control filled by nearest, mean and a sample."""
    where = scan.everywhere
    images = {"truth": reference, "hole": np.where(where, 0, reference)}
    images["nearest"] = np.where(where, simple["nearest"]["blob"], reference)
    for what in ("mean", "sample"):
        images[what] = np.where(where, filled[f"control | {what}"], reference)
    columns = [Column(k, np.where(inside, v, 0), 1.1) for k, v in images.items()]
    draw(path, columns, inside=scan.holes["30 mm"], spacing_mm=[1.0] * 3, caption=path.stem,
         dpi=60, planes=settings.planes())  # fmt: skip


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per image and hole, for the scan whose holes are 0; ``off control`` compares it with
    the control.
    """
    shown = [
        {**record, "rows": {k: v for k, v in record["rows"].items() if not k.startswith(OTHERS)}}
        for record in records
    ]
    return list(rows_by_settings(shown, ["scan", "what", "hole"]))


STUDY = Study(
    "inpaint",
    cases,
    measure,
    table,
    defaults={"spacing": (1.0,), "noise": (0.02,), "n_samples": 2, "slab": None},
    quick={"n_samples": 1, "slab": 50},
)
