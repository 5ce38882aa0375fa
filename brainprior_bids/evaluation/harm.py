# SPDX-License-Identifier: Apache-2.0
"""Corrupt real heads and measure how much their brain mask and affine change.

``python -m brainprior_bids.evaluation.harm BIDS_DIR TABLE.json`` conforms every T1w and T2w of a
data set, labels it, corrupts the scan in the ways of :data:`KINDS`, labels it again, and compares:
Dice of the two masks inside the remaining field of view, the mean distance between the two affines
at the corners of the brain's box, and the verdict from mask, structures, affine and the noise as
estimated before sampling (nothing is restored, so metrics of the restoration do not enter). The
table is in the parcellation's model card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.affine import corner_distance
from brainprior_bids.anatomy.brain import find_brain
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.external import dice
from brainprior_bids.anatomy.prepare import align_to_mni305
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.bids.qc import VERDICTS, metrics, reasons, verdict
from brainprior_bids.engine import weights
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.noise import estimate_noise_sd
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.records import ScanRecord

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]

VIEW_MM = 240.0


def _extent(brain: Mask, axis: int) -> tuple[int, int]:
    planes = np.flatnonzero(brain.any(tuple(a for a in range(3) if a != axis)))
    return int(planes[0]), int(planes[-1])


def _head(image: nib.Nifti1Image, data: Volume) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.asarray(data, np.float32), image.affine)


def crop(image: nib.Nifti1Image, brain: Mask, *, top_mm: float, bottom_mm: float) -> Any:
    """Crop the field of view: this much of the brain is lost (negative: margin beyond it)."""
    low, high = _extent(brain, 2)
    spacing = Grid(image.shape, image.affine).spacing_mm[2]
    start = max(low + round(bottom_mm / spacing), 0)
    stop = min(high + 1 - round(top_mm / spacing), image.shape[2])
    return image.slicer[:, :, start:stop]


def deface(image: nib.Nifti1Image, brain: Mask) -> nib.Nifti1Image:
    """Set to 0 what is in front of and below a plane that touches the brain's lower front."""
    where = np.argwhere(brain) @ image.affine[:3, :3].T + image.affine[:3, 3]
    normal = np.array([0.0, 1.0, -1.0]) / np.sqrt(2)
    points = np.indices(image.shape).reshape(3, -1).T
    points = points @ image.affine[:3, :3].T + image.affine[:3, 3]
    beyond = (points @ normal > (where @ normal).max()).reshape(image.shape)
    return _head(image, np.where(beyond, 0, image.get_fdata(dtype=np.float32)))


def low_contrast(image: nib.Nifti1Image, brain: Mask) -> nib.Nifti1Image:
    """Reduce the contrast in the head to a fifth, and add 2 % noise."""
    data = image.get_fdata(dtype=np.float32)
    mean = float(np.median(data[brain]))
    head = data > 0.2 * mean
    flat = np.where(head, mean + 0.2 * (data - mean), 0.2 * data)
    return noise(_head(image, flat), brain, share=0.02)


def noise(image: nib.Nifti1Image, brain: Mask, *, share: float) -> nib.Nifti1Image:
    """Rician noise whose SD is ``share`` times the brain's 99th percentile."""
    data = image.get_fdata(dtype=np.float32)
    rng = np.random.default_rng(0)
    sd = share * float(np.percentile(data[brain], 99))
    real, imaginary = rng.normal(0, sd, (2, *data.shape))
    return _head(image, np.hypot(data + real, imaginary))


def coil(image: nib.Nifti1Image, brain: Mask, *, times: float) -> nib.Nifti1Image:
    """One surface coil at the back of the head: ``times`` brighter there than in front."""
    grid = np.indices(image.shape)
    low, high = _extent(brain, 1)
    place = (grid[1] - low) / (high - low)
    return _head(image, image.get_fdata(dtype=np.float32) * times**-place)


def thick(image: nib.Nifti1Image, brain: Mask, *, axis: int, mm: float) -> nib.Nifti1Image:
    """Average slices along one axis into slices of about ``mm``."""
    n = max(round(mm / float(Grid(image.shape, image.affine).spacing_mm[axis])), 1)
    data = np.moveaxis(image.get_fdata(dtype=np.float32), axis, 0)
    whole = data.shape[0] // n * n
    averaged = data[:whole].reshape(-1, n, *data.shape[1:]).mean(1)
    step = np.eye(4)
    step[axis, axis] = n
    step[axis, 3] = (n - 1) / 2
    return nib.Nifti1Image(np.moveaxis(averaged, 0, axis), image.affine @ step)


def turned(image: nib.Nifti1Image, brain: Mask, *, axis: int, degrees: float) -> nib.Nifti1Image:
    """Rotate the head in its field of view about the brain's middle, with a correct header."""
    grid = Grid(image.shape, image.affine)
    middle = image.affine[:3, :3] @ np.argwhere(brain).mean(0) + image.affine[:3, 3]
    shape = tuple(int(n) for n in np.ceil(VIEW_MM / grid.spacing_mm))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz"[axis], degrees, degrees=True).as_matrix() @ np.diag(
        grid.spacing_mm
    )
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    data = image.get_fdata(dtype=np.float32)
    return nib.Nifti1Image(resample(data, grid, Grid(shape, affine), order=1), affine)


def between(
    image: nib.Nifti1Image, brain: Mask, *, gain: float = 1.0, moved_mm: float = 0.0
) -> nib.Nifti1Image:
    """Multiply every second slice along the last axis by ``gain``, or shift it anteriorly."""
    data = image.get_fdata(dtype=np.float32).copy()
    moved = moved_mm / float(Grid(image.shape, image.affine).spacing_mm[1])
    data[:, :, ::2] = gain * ndimage.shift(data[:, :, ::2], (0, moved, 0), order=1)
    return _head(image, data)


def faint(image: nib.Nifti1Image, brain: Mask, *, share: float) -> nib.Nifti1Image:
    """Multiply the brain's middle slice along the last axis by ``share``."""
    data = image.get_fdata(dtype=np.float32).copy()
    data[:, :, sum(_extent(brain, 2)) // 2] *= share
    return _head(image, data)


def mislabelled(image: nib.Nifti1Image, brain: Mask, *, axes: str) -> nib.Nifti1Image:
    """Store RAS data with a header of the wrong orientation ``axes`` (such as "LPS")."""
    data = apply_orientation(image.get_fdata(dtype=np.float32), axcodes2ornt(tuple(axes)))
    spacing = Grid(image.shape, image.affine).spacing_mm
    order = axcodes2ornt(tuple(axes))[:, 0].astype(int)
    return nib.Nifti1Image(np.ascontiguousarray(data), np.diag([*spacing[np.argsort(order)], 1.0]))


HARMS: dict[str, Callable[[nib.Nifti1Image, Mask], nib.Nifti1Image]] = {
    "neck cut off": lambda i, b: crop(i, b, top_mm=-300, bottom_mm=-3),
    "vertex cut, 10 mm of brain lost": lambda i, b: crop(i, b, top_mm=10, bottom_mm=-300),
    "vertex cut, 30 mm of brain lost": lambda i, b: crop(i, b, top_mm=30, bottom_mm=-300),
    "bottom cut, 30 mm of brain lost": lambda i, b: crop(i, b, top_mm=-300, bottom_mm=30),
    "only the middle 50 mm": lambda i, b: crop(i, b, top_mm=40, bottom_mm=45),
    "face cut off to the brain": deface,
    "skull-stripped": lambda i, b: _head(i, i.get_fdata(dtype=np.float32) * b),
    "a fifth of the contrast": low_contrast,
    "one coil, 8 : 1": lambda i, b: coil(i, b, times=8),
    "one coil, 30 : 1": lambda i, b: coil(i, b, times=30),
    "noise 10 %": lambda i, b: noise(i, b, share=0.1),
    "noise 20 %": lambda i, b: noise(i, b, share=0.2),
    "noise 40 %": lambda i, b: noise(i, b, share=0.4),
    "noise 80 %": lambda i, b: noise(i, b, share=0.8),
    "noise 160 %": lambda i, b: noise(i, b, share=1.6),
    "values × 0.01": lambda i, b: _head(i, i.get_fdata(dtype=np.float32) * 0.01),
    "values × 1000": lambda i, b: _head(i, i.get_fdata(dtype=np.float32) * 1000),
}
THICK = {
    f"{mm} mm {plane}": (lambda i, b, axis=axis, mm=mm: thick(i, b, axis=axis, mm=mm))
    for mm in (3, 5, 7)
    for axis, plane in enumerate(("sagittal", "coronal", "axial"))
}
"""For T1w of near-isotropic voxels."""
TURNED = {
    f"{how} by {degrees}°": (
        lambda i, b, axis=axis, degrees=degrees: turned(i, b, axis=axis, degrees=degrees)
    )
    for axis, how in enumerate(("nodding", "tilted", "turned"))
    for degrees in (20, 30, 40)
}
"""For T1w of near-isotropic voxels."""
HEADERS = {
    f"header says {axes}": (lambda i, b, axes=axes: mislabelled(i, b, axes=axes))
    for axes in ("LPS", "RPI", "LAI", "RAI", "RSA", "RSP", "SAL", "PRS", "ASR", "SRA", "LAS")
}
"""The uncorrupted scan is no reference in the space of such a header: no Dice, no corners."""
SLICES = {
    **{f"a slice with {100 * s:g} % signal": partial(faint, share=s) for s in (0.0, 0.5, 0.7)},
    **{f"every second slice × {g:g}": partial(between, gain=g) for g in (1.05, 1.1, 1.2)},
    **{f"every second slice moved {m} mm": partial(between, moved_mm=m) for m in (1, 2, 4, 6)},
}
"""For scans in thick axial slices."""
KINDS = {
    "harms": HARMS,
    "thick": THICK,
    "turned": TURNED,
    "headers": HEADERS,
    "slices": SLICES,
}


def _on(grid: Grid, image: nib.Nifti1Image, mask: Mask) -> Mask:
    """Resample a mask to this grid (nearest neighbour); all grids here share their axes."""
    index = np.linalg.inv(image.affine) @ grid.affine
    moved: Mask = ndimage.affine_transform(
        mask.astype(np.uint8), index[:3, :3], index[:3, 3], grid.shape, order=0
    ).astype(bool)
    return moved


def _noise(image: nib.Nifti1Image, mask_scan: Volume) -> float | None:
    """SD of the noise before sampling, in units of the brain's 99th percentile."""
    data = image.get_fdata(dtype=np.float32)
    axis = int(np.argmax(Grid(image.shape, image.affine).spacing_mm))
    inside = mask_scan > 0.5
    sd = estimate_noise_sd(torch.from_numpy(data), torch.from_numpy(inside), axis)
    return None if sd is None else sd / float(np.percentile(data[inside], 99))


def compare(
    image: nib.Nifti1Image,
    network: ParcellationNetwork,
    reference: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Label one scan, and compare it with the uncorrupted one if that is given.

    Returns
    -------
    facts : dict
        ``error``, or ``volume_ml``, ``residual_mm``, ``dof``, ``warnings``, ``verdict``,
        ``reasons``, the metrics behind it and, with a reference, ``dice`` and ``corner_mm``.
    result : dict
        ``parcellation``, ``fit``, ``grid``, to be used as a reference; empty after an error.
    """
    scan_grid = Grid(image.shape, image.affine)
    grid, axis = scan_grid.one_millimetre(), int(np.argmax(scan_grid.spacing_mm))
    facts: dict[str, Any] = {}
    try:
        brain = find_brain(image, network=network, slice_axis=axis)
        facts["volume_ml"] = round(float(brain.mask.sum() * np.prod(grid.spacing_mm)) / 1000, 1)
        facts["warnings"] = list(brain.warnings)
        if reference:
            same = nib.Nifti1Image(np.zeros(1), reference["grid"].affine)
            before = _on(grid, same, reference["parcellation"].mask > 0)
            facts["dice"] = round(dice(before, brain.mask > 0), 4)
        fit = align_to_mni305(image, brain.mask, brain.table)
    except BrainpriorError as error:
        return {**facts, "error": str(error), "verdict": "fail"}, {}
    steps = {
        "parcellation": {"table": brain.table, **brain.facts},
        "affine": {
            "median_residual_mm": fit.median_residual_mm,
            "dof": fit.dof,
            "method": fit.method,
        },
        "restore": {"noise_sd": _noise(image, brain.mask_scan)},
    }
    values = metrics(ScanRecord.from_json({"scan": "", "facts": steps}))
    facts |= {"verdict": verdict(values), "reasons": reasons(values)}
    keys = (
        "brain_z", "structure_z", "noise_percent", "confidence", "lowest_confidence",
        "slice_mismatch", "faintest_slice",
    )  # fmt: skip
    facts |= {key: values[key] for key in keys}
    facts |= {"residual_mm": fit.median_residual_mm, "dof": fit.dof}
    facts["warnings"] += fit.warnings
    if reference:
        facts["corner_mm"] = round(corner_distance(fit.matrix, reference["fit"].matrix), 2)
    return facts, {"parcellation": brain, "fit": fit, "grid": grid}


def summarise(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: median and worst over the scans of a contrast, and their verdicts."""
    lines = [
        "| scan, harm | scans | Dice, median | worst | corners, mm, median | worst "
        "| centres, mm, median | worst | verdicts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = (("dice", min, 3), ("corner_mm", max, 1), ("residual_mm", max, 1))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['scan'].rpartition('_')[2]}, {row['harm']}", []).append(row)
    for name, group in groups.items():
        cells = [name, str(len(group))]
        for key, worst, digits in columns:
            values = [row[key] for row in group if key in row]
            both = (float(np.median(values)), worst(values)) if values else ()
            cells += [f"{value:.{digits}f}" for value in both] or ["", ""]
        counts = [(sum(row["verdict"] == v for row in group), v) for v in VERDICTS]
        refused = sum("error" in row for row in group)
        verdicts = ", ".join(f"{n} {v}" for n, v in counts if n)
        cells.append(verdicts + (f" ({refused} refused)" if refused else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Corrupt every scan, write the facts, print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("table", type=Path, help="JSON, one row per scan and corruption; resumed")
    parser.add_argument("--suffix", nargs="+", default=["T1w", "T2w"])
    parser.add_argument("--subjects", type=int, default=9, help="at most this many participants")
    parser.add_argument("--kind", choices=KINDS, default="harms", help="group of corruptions")
    args = parser.parse_args()
    rows = json.loads(args.table.read_text(encoding="utf-8")) if args.table.exists() else []
    done = {(row["scan"], row["harm"]) for row in rows}
    network = weights.load_parcellation(weights.FOLDER / "parcellation.safetensors", device="cpu")
    for subject in sorted(args.bids_dir.glob("sub-*"))[: args.subjects]:
        for path in (p for s in args.suffix for p in sorted(subject.rglob(f"*_{s}.nii.gz"))):
            image = conform(path, metadata={}).image
            facts, reference = compare(image, network)
            name = path.name.removesuffix(".nii.gz")
            if (name, "none") not in done:
                rows.append({"scan": name, "harm": "none", **facts})
            brain = _on(
                Grid(image.shape, image.affine),
                nib.Nifti1Image(np.zeros(1), reference["grid"].affine),
                reference["parcellation"].mask > 0,
            )
            compared = None if args.kind == "headers" else reference
            for harm, change in KINDS[args.kind].items():
                if (name, harm) not in done:
                    facts, _ = compare(change(image, brain), network, compared)
                    rows.append({"scan": name, "harm": harm, **facts})
                    print(json.dumps(rows[-1]), flush=True)
                    args.table.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    args.table.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(summarise(rows))


if __name__ == "__main__":
    main()
