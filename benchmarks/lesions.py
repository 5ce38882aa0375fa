# SPDX-License-Identifier: Apache-2.0
"""Results of ``brainprior check-lesion`` for several participants, by slice thickness.

    python benchmarks/lesions.py OUT sub-01_desc-brain_T1w.nii.gz ... [--nprocs 4]

Each brain is degraded to slices of ``--spacing`` mm with 1 % noise; the command adds spheres in
the deepest white matter and restores a crop of 64 mm around them. ``kept`` is the share of the
contrast that remains in the restored image, and in the linearly interpolated scan.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from participants import SCANNER_UNIT, Record, Runs, parser, participant, run

from brainprior_bids.cli.run import main as brainprior
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.scans import Volume, write_scan

MARGIN = 14


def one_brain(path: Path, args: argparse.Namespace, record: Record, runs: Runs) -> None:
    """Make the scans, run the command on each, keep its table."""
    held = participant(path, args)
    for spacing in args.spacing:
        labels = {
            (size, contrast): f"{spacing:g} mm | {size:g} mm | {contrast:+g}"
            for size in args.size
            for contrast in args.contrast
        }
        if all(label in record for label in labels.values()):
            continue
        thick = round(spacing)
        sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in held.data.shape]
        truth = np.pad(held.data, sides)
        rng = np.random.default_rng([args.seed, int(held.name)])
        recipe = Recipe(spacing_mm=spacing, thickness_mm=spacing, noise_sd=0.01)
        data, own = degrade(truth, Grid(truth.shape, np.eye(4)), recipe, rng, unit=1.0)
        stem, folder = f"{runs.name}_T1w", runs.folder / f"{thick}mm"
        write_scan(
            folder, stem, Volume(data * SCANNER_UNIT, own), dataset="To put lesions into",
            metadata={"SliceThickness": spacing, "SpacingBetweenSlices": spacing,
                      "MRAcquisitionType": "3D" if thick == 1 else "2D"},
        )  # fmt: skip
        words = ["check-lesion", str(folder / runs.name / "anat" / f"{stem}.nii.gz")]
        words += ["--size", *map(str, args.size), "--contrast", *map(str, args.contrast)]
        words += ["--crop", str(args.crop), "--n-samples", str(args.n_samples)]
        words += ["--random-seed", str(args.seed), "--device", args.device]
        words += ["--prior", str(args.prior)] if args.prior is not None else []
        said = io.StringIO()
        with redirect_stdout(said):
            status = brainprior(words)
        if status:
            raise BrainpriorError(f"{runs.name}: check-lesion ended with {status}.")
        for line in said.getvalue().splitlines()[2:]:
            size, contrast, restored, interpolated = map(float, line.split("\t"))
            figures = {"restored": restored, "interpolated": interpolated}
            record.add(labels[size, contrast], figures)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser(__doc__, n_samples=2)
    options.add_argument("--spacing", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="mm")
    options.add_argument("--size", type=float, nargs="+", default=[4.0, 8.0], help="mm")
    options.add_argument("--contrast", type=float, nargs="+", default=[-0.3, -0.1, 0.1, 0.3])
    options.add_argument("--crop", type=float, default=64.0, help="mm")
    return run(options.parse_args(argv), one_brain, ["slices", "diameter", "contrast"])


if __name__ == "__main__":
    raise SystemExit(main())
