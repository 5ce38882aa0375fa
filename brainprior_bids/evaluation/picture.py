# SPDX-License-Identifier: Apache-2.0
"""The README's picture: a degraded brain, its restoration, and the truth.

``python -m brainprior_bids.evaluation.picture BRAIN.nii.gz OUT.png --caption "source, licence"``

A real, skull-stripped 1 mm T1w brain is degraded to a clinical axial scan (5 mm slices with a
trapezoid profile, a smooth bias field, noise), restored with ``brainprior`` like any other scan,
and drawn next to the truth (divided by its own N4 field). The metrics are printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import BrainpriorError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.baselines import interpolate
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import matching_gain, metrics_of
from brainprior_bids.evaluation.scans import Volume, read_output, run_command, write_scan

SEED = 7
RECIPE = Recipe(noise_sd=0.01, bias_sd=0.1)
MARGIN = 10  # empty voxels around the brain
NAME = "sub-01_T1w"


def picture(
    brain: Path, out: Path, *, caption: str, work: Path, options: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Simulate the scan, restore it and draw it.

    Parameters
    ----------
    brain : Path
        Image of 1 mm voxels, 0 outside the brain.
    out : Path
        PNG to write.
    caption : str
        Source and licence.
    work : Path
        Folder for the simulated data set and the command's output.
    options : sequence of str
        Passed on to the command.

    Returns
    -------
    dict
        The metrics of cubic interpolation, of the restored mean and of a single sample.

    Raises
    ------
    UsageError
        If the voxels are not about 1 mm.
    """
    truth, grid = padded(brain)
    inside = ndimage.binary_fill_holes(truth > 0)
    unit = float(np.percentile(truth[inside], 99))
    field = np.exp(n4(nib.Nifti1Image(truth, np.array(grid.affine)), inside))
    reference = truth / field
    rng = np.random.default_rng(SEED)
    scan = Volume(*degrade(truth, grid, RECIPE, rng, unit=unit))
    bids = work / "bids"
    write_scan(
        bids,
        NAME,
        scan,
        dataset="A brain degraded to thick slices",
        metadata={
            "MRAcquisitionType": "2D",
            "SliceThickness": RECIPE.thickness_mm,
            "SpacingBetweenSlices": RECIPE.spacing_mm,
        },
    )
    common = ["--skip-bids-validation", "-w", str(work / "nodes"), *options]
    run_command(bids, work / "out", common)
    run_command(bids, work / "single", [*common, "--n-samples", "1"])

    scan_field = n4(nib.Nifti1Image(scan.data, np.array(scan.grid.affine)), _share(inside))
    flat = scan.data / np.exp(scan_field)
    images = {"cubic": interpolate(flat, scan.grid, grid, order=3)}
    for method, folder in (("mean of samples", "out"), ("single sample", "single")):
        restored = read_output(work / folder, NAME)
        images[method] = resample(restored.data, restored.grid, grid)
    table = metrics_of(images, reference, inside, grid.spacing_mm)

    blocks = interpolate(scan.data, scan.grid, grid, order=0)
    spread = read_output(work / "out", NAME, role="uncertainty")
    sd = resample(spread.data, spread.grid, grid, order=1)
    top = 1.05 * float(np.percentile(reference[inside], 99))

    def column(title: str, image: np.ndarray) -> Column:
        return Column(title, matching_gain(image, reference, inside) * image, top)

    draw(
        out,
        [
            column(f"scan, 1 × 1 × {RECIPE.spacing_mm:g} mm", blocks),
            column("cubic interpolation", np.where(inside, images["cubic"], 0)),
            column("restored, mean of samples", images["mean of samples"]),
            Column("posterior SD", sd, 0.15 * top, "magma"),
            Column("truth, 1 mm", reference, top),
        ],
        inside=inside,
        spacing_mm=[float(s) for s in grid.spacing_mm],
        caption=caption,
        planes=(0, 1),
    )
    return table


def padded(brain: Path) -> tuple[np.ndarray, Grid]:
    """The brain with a margin, whole slices along the third axis."""
    image = conform(brain, metadata={}).image
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if not np.allclose(spacing, 1, atol=0.05):
        raise UsageError(
            f"picture: expected voxels of 1 mm, got {np.round(spacing, 2)} in {brain}."
        )
    data = image.get_fdata(dtype=np.float32)
    per_slice = round(RECIPE.spacing_mm)
    extra = -(data.shape[2] + 2 * MARGIN) % per_slice
    data = np.pad(data, ((MARGIN, MARGIN), (MARGIN, MARGIN), (MARGIN, MARGIN + extra)))
    affine = np.array(image.affine)
    affine[:3, 3] = (affine @ [-MARGIN, -MARGIN, -MARGIN, 1])[:3]
    return data, Grid(data.shape, affine)


def _share(inside: np.ndarray) -> np.ndarray:
    """Fraction of every thick voxel that is inside the mask."""
    per_slice = round(RECIPE.spacing_mm)
    i, j, k = inside.shape
    return inside.reshape(i, j, k // per_slice, per_slice).mean(-1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Other options are passed on to ``brainprior``."""
    parser = argparse.ArgumentParser(
        prog="python -m brainprior_bids.evaluation.picture",
        description="Draw a degraded brain, its restoration and the truth. Options that are not "
        "listed are passed on to brainprior.",
    )
    parser.add_argument("brain", type=Path, help="1 mm T1w brain, 0 outside")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--caption", required=True, help="source and licence of the brain")
    parser.add_argument("--work", type=Path, help="keep the simulated data set and outputs here")
    args, options = parser.parse_known_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = args.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            table = picture(args.brain, args.out, caption=args.caption, work=work, options=options)
    except BrainpriorError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for method, row in table.items():
        print(method, *(f"{key} {value:.4f}" for key, value in row.items()), sep="\t")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
