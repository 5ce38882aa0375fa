# SPDX-License-Identifier: Apache-2.0
"""Average a whole head to thick slices, restore it with the command, compare with the original.

``python -m brainprior_bids.evaluation.thick_slices BIDS_DIR OUT --participant-label 01``

The T1w (or another contrast) is averaged along its slice axis to slices of ``--spacing`` mm, each
the mean of the thin slices. ``brainprior`` restores the result twice, as the mean of
``--n-samples`` and as a single sample. Everything is compared inside the brain mask of the
*original* scan, on the original's own voxels:

* reference: the original divided by its N4 field;
* linear and cubic interpolation, Tikhonov and TV of the thick slices, each divided by the
  *reference's* field, the best estimate that they could be given;
* the restored images (bias-free by the program's own estimate), interpolated to the original's
  voxels by a cubic spline.

Every image is multiplied by the one factor that brings it closest to the reference in least
squares. ``psnr_field_db`` is the PSNR after a factor that may vary smoothly over the brain (a
cubic polynomial of position), so that a disagreement of the two bias fields does not count.
``rmse_0_1mm`` and so on are the errors in shells below the mask's border. The noise of the
original remains in the reference, so that no method can reach an error of 0.

Writes ``metrics.tsv`` and one PNG per scan.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.brain import find_brain
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import BrainpriorError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.weights import load_parcellation
from brainprior_bids.evaluation.baselines import interpolate, tikhonov, total_variation
from brainprior_bids.evaluation.degrade import averaging_weights, thick_slices
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import DEPTHS, by_depth, compare, matching_gain
from brainprior_bids.evaluation.scans import Volume, read_output, run_command, write_scan

COLUMNS = ("scan", "method", "mae", "psnr_db", "ssim", "psnr_field_db", "mask_dice", *DEPTHS)
TIKHONOV_PENALTY = 0.01
TV_PENALTY = 0.001  # of the brain's 99th percentile; both tuned on two other participants


def matching_field(
    image: NDArray[np.float32], truth: NDArray[np.float32], mask: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """The cubic polynomial of position that, as a gain, brings ``image`` closest to ``truth``.

    Parameters
    ----------
    image, truth : (i, j, k) arrays
    mask : (i, j, k) bool array
        Where they are compared.

    Returns
    -------
    (i, j, k) float32 array
        The gain; 1 outside the mask.
    """
    where = np.array(np.nonzero(mask), dtype=np.float64)
    middle, half = where.mean(1, keepdims=True), np.ptp(where, axis=1)[:, None] / 2 + 1
    x, y, z = (where - middle) / half
    powers = [p for p in product(range(4), repeat=3) if sum(p) <= 3]
    basis = np.stack([x**a * y**b * z**c for a, b, c in powers], axis=1)
    values = image[mask].astype(np.float64)
    design = basis * values[:, None]
    target = truth[mask].astype(np.float64)
    coefficients = np.linalg.solve(design.T @ design, design.T @ target)
    field = np.ones(mask.shape, np.float32)
    field[mask] = basis @ coefficients
    return field


def classical(
    thick: Volume, grid: Grid, weights: NDArray[np.float64], *, axis: int, unit: float
) -> dict[str, NDArray[np.float32]]:
    """The baselines on the fine grid, in the scan's units.

    Parameters
    ----------
    thick : Volume
        The thick slices.
    grid : Grid
        The fine grid.
    weights : (slices, fine) array
        The slice weights, given to Tikhonov and TV only.
    axis : int
        Slice axis.
    unit : float
        Scanner units of the brain's 99th percentile.
    """
    return {
        "linear": interpolate(thick.data, thick.grid, grid, order=1),
        "cubic": interpolate(thick.data, thick.grid, grid, order=3),
        "tikhonov": tikhonov(thick.data, weights, axis=axis, penalty=TIKHONOV_PENALTY),
        "tv": total_variation(thick.data, weights, axis=axis, penalty=TV_PENALTY * unit),
    }


def metrics_of(
    images: Mapping[str, NDArray[np.float32]],
    reference: NDArray[np.float32],
    inside: NDArray[np.bool_],
    spacing_mm: Sequence[float],
) -> dict[str, dict[str, float]]:
    """The metrics of every image after its gain; see the module's docstring."""
    table = {}
    for method, image in images.items():
        alike = matching_gain(image, reference, inside) * image
        row = {
            **compare(alike, reference, inside),
            **by_depth(alike, reference, inside, spacing_mm),
        }
        flat = compare(image * matching_field(image, reference, inside), reference, inside)
        table[method] = {**row, "psnr_field_db": flat["psnr_db"]}
    return table


def evaluate(
    path: Path, out: Path, *, spacing_mm: float, axis: int | None, options: Sequence[str]
) -> list[dict[str, Any]]:
    """One scan: average, restore, compare, draw.

    Parameters
    ----------
    path : Path
        ``sub-<label>_<suffix>.nii.gz``, near-isotropic.
    out : Path
        Folder for the thick scan, the outputs, the picture.
    spacing_mm : float
        Spacing of the thick slices, rounded to a whole number (2 or more) of thin ones.
    axis : 0, 1, 2 or None
        Along which to average, on RAS axes; None: the scan's slice axis.
    options : sequence of str
        Passed on to the command.

    Returns
    -------
    list of dict
        One row per method, with the keys ``COLUMNS``.
    """
    name = path.name.removesuffix(".nii.gz")
    conformed = conform(path, metadata={})
    original = conformed.image.get_fdata(dtype=np.float32)
    grid = Grid(original.shape, conformed.image.affine)
    along = conformed.acquisition.slice_axis if axis is None else axis
    thin_mm = float(grid.spacing_mm[along])
    spacing = max(2, round(spacing_mm / thin_mm)) * thin_mm
    whole = int(grid.extent_mm[along] / spacing + 1e-6) * round(spacing / thin_mm)
    stop = list(grid.shape)
    stop[along] = whole
    grid = grid.crop((0, 0, 0), (stop[0], stop[1], stop[2]))
    original = original[: stop[0], : stop[1], : stop[2]]
    scan = _image(original, grid)
    mask = find_brain(scan, network=load_parcellation()).mask_scan
    inside = mask > 0.5
    field = np.exp(n4(scan, mask))
    reference = original / field
    unit = float(np.percentile(reference[inside], 99))

    data, thick_grid = thick_slices(
        original, grid, axis=along, spacing_mm=spacing, profile="boxcar"
    )
    thick = Volume(data, thick_grid)
    bids = out / "bids"
    write_scan(
        bids,
        name,
        thick,
        dataset=f"{name} averaged to {spacing:g} mm slices",
        metadata={"SliceThickness": spacing, "SpacingBetweenSlices": spacing},
    )
    wanted = ["--participant-label", name.split("_")[0], "--modalities", name.split("_")[1]]
    common = [*wanted, "--skip-bids-validation", "-w", str(out / "work"), *options]
    run_command(bids, out / "restored", common)
    run_command(bids, out / "single", [*common, "--n-samples", "1"])

    weights = averaging_weights(grid.shape[along], thin_mm, spacing, spacing, "boxcar")
    images = {
        method: image / field
        for method, image in classical(thick, grid, weights, axis=along, unit=unit).items()
    }
    dice = {}
    for method, folder in (("single sample", "single"), ("mean of samples", "restored")):
        restored = read_output(out / folder, name, "restored")
        images[method] = resample(restored.data, restored.grid, grid)
        brain = read_output(out / folder, name, "brain")
        own = resample(brain.data, brain.grid, grid, order=1) > 0.5
        dice[method] = 2 * float((own & inside).sum()) / float(own.sum() + inside.sum())
    table = metrics_of(images, reference, inside, grid.spacing_mm)
    rows = [
        {"scan": name, "method": method, "mask_dice": dice.get(method), **table[method]}
        for method in images
    ]
    _picture(out / f"{name}.png", name, thick, images, reference, inside, grid, out / "restored")
    return rows


def _image(data: NDArray[np.float32], grid: Grid) -> Any:
    return nib.Nifti1Image(data, np.array(grid.affine))


def _picture(
    path: Path,
    name: str,
    thick: Volume,
    images: Mapping[str, NDArray[np.float32]],
    reference: NDArray[np.float32],
    inside: NDArray[np.bool_],
    grid: Grid,
    restored_dir: Path,
) -> None:
    top = 1.05 * float(np.percentile(reference[inside], 99))
    blocks = interpolate(thick.data, thick.grid, grid, order=0)
    columns = [Column("original, N4", np.where(inside, reference, 0), top)]
    columns.append(Column("thick slices", np.where(inside, blocks, 0), top))
    for method in ("cubic", "mean of samples", "single sample"):
        gain = matching_gain(images[method], reference, inside)
        columns.append(Column(method, np.where(inside, gain * images[method], 0), top))
    spread = read_output(restored_dir, name, "uncertainty")
    sd = resample(spread.data, spread.grid, grid, order=1)
    columns.append(Column("posterior SD", sd, 0.2 * top, "magma"))
    draw(
        path, columns, inside=inside, spacing_mm=[float(s) for s in grid.spacing_mm], caption=name
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows as TSV, with ``n/a`` for missing values."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in COLUMNS])
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Other options are passed on to ``brainprior``."""
    parser = argparse.ArgumentParser(
        prog="python -m brainprior_bids.evaluation.thick_slices",
        description="Average a head to thick slices, restore it, compare. Options that are not "
        "listed are passed on to brainprior.",
    )
    parser.add_argument("bids_dir", type=Path, help="raw BIDS data set with near-isotropic heads")
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--participant-label", nargs="+", required=True)
    parser.add_argument("--modality", default="T1w")
    parser.add_argument("--spacing", type=float, default=5.0, help="slice spacing in mm")
    parser.add_argument(
        "--axis", type=int, choices=(0, 1, 2), help="RAS axis; default: the scan's slice axis"
    )
    args, options = parser.parse_known_args(argv)
    rows: list[dict[str, Any]] = []
    try:
        for label in args.participant_label:
            subject = f"sub-{label.removeprefix('sub-')}"
            path = args.bids_dir / subject / "anat" / f"{subject}_{args.modality}.nii.gz"
            if not path.is_file():
                raise UsageError(f"thick_slices: expected a scan, there is none at {path}.")
            args.out.mkdir(parents=True, exist_ok=True)
            rows += evaluate(
                path, args.out, spacing_mm=args.spacing, axis=args.axis, options=options
            )
            write_table(args.out / "metrics.tsv", rows)
    except BrainpriorError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print((args.out / "metrics.tsv").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
