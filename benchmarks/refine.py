# SPDX-License-Identifier: Apache-2.0
"""Another tool's image, too smooth or too sharp, refined with several values of ``--trust``.

    python benchmarks/refine.py OUT sub-01_desc-brain_T1w.nii.gz ... [--nprocs 4] [--picture OUT]

The image of the "other tool" is the truth blurred by a Gaussian of SD 1 mm, or sharpened (the
truth plus the detail that this blur removes). They are derivative data sets of a raw data set with
the participant's scan (slices of ``--spacing`` mm, 1 % noise). ``brainprior`` restores the scan
alone, refines each image alone (``--task refine``), and both together (``--task restore refine``),
at each trust. RMSE is computed inside both the given mask and the program's own, in units of the
truth's 99th percentile, after one gain, and after a gain that may vary slowly (``slow gain``: no
bias field is estimated for an image that is refined alone). ``residual`` is the samples' residual
with respect to their input, in units of its stated error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from participants import (
    PLANES,
    SCANNER_UNIT,
    Record,
    Runs,
    parser,
    participant,
    read,
    restore_record,
    run,
)
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, matching_gain
from brainprior_bids.evaluation.scans import Volume, write_scan
from brainprior_bids.evaluation.thick_slices import matching_field

MARGIN = 14
TOOLS = ("smooth", "sharp")
HOWS = {
    "alone": ("refined alone", "refined", ("refine",)),
    "both": ("with the scan", "restoredRefined", ("restore", "refine")),
}
"""--tasks -> name in the table, ``desc-`` of the image, tasks of the command."""
SCAN_ALONE = "the-scan-alone"
STRIPPED = "share of the given mask that the program strips, excluded from the errors"


def other_tool(truth: np.ndarray, inside: np.ndarray, kind: str) -> np.ndarray:
    """The truth blurred by 1 mm, or sharpened by the detail that this removes; 0 outside."""
    blurred = ndimage.gaussian_filter(truth, 1.0)
    image = blurred if kind == "smooth" else 2 * truth - blurred
    return np.where(inside, np.maximum(image, 0), 0).astype(np.float32)


def one_brain(path: Path, args: argparse.Namespace, record: Record, runs: Runs) -> None:
    """Make the data sets, run the command for each row, compare."""
    hows = [HOWS[task][0] for task in args.tasks]
    wanted = [f"{t} | {how} | {s:g}" for t in args.tools for how in hows for s in args.trust]
    if all(label in record for label in wanted):
        return
    held = participant(path, args)
    thick = round(args.spacing)
    sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in held.data.shape]
    truth, inside = np.pad(held.data, sides), np.pad(held.inside, sides)
    grid = Grid(truth.shape, np.eye(4))
    rng = np.random.default_rng([args.seed, int(held.name)])
    recipe = Recipe(spacing_mm=args.spacing, thickness_mm=args.spacing, noise_sd=0.01)
    data, own = degrade(truth, grid, recipe, rng, unit=1.0)
    stem, bids_dir = f"{runs.name}_T1w", runs.folder / "bids"
    write_scan(
        bids_dir, stem, Volume(data * SCANNER_UNIT, own), dataset="A scan of thick slices",
        metadata={"SliceThickness": args.spacing, "SpacingBetweenSlices": args.spacing,
                  "MRAcquisitionType": "2D"},
    )  # fmt: skip
    output_dir = runs.command(bids_dir, SCAN_ALONE, "--task", "restore")
    own_mask = read(output_dir, stem, "restored", role="mask")
    kept = resample(own_mask.data.astype(np.float32), own_mask.grid, grid, order=1) > 0.5
    record.add(STRIPPED, {"value": 1 - float(kept[inside].mean())})
    judged = inside & kept  # the masks of some of these brains hold vessels and fat
    shown = {"truth": truth}

    def note(label: str, image: np.ndarray, residuals: Sequence[float] = ()) -> None:
        shown[label] = matching_gain(image, truth, judged) * image
        flat = image * matching_field(image, truth, judged)
        row = {"RMSE": compare(shown[label], truth, judged)["rmse"],
               "slow gain": compare(flat, truth, judged)["rmse"]}  # fmt: skip
        if residuals:
            row["residual"] = float(np.mean(residuals))
        record.add(label, row)

    def made(label: str, image: str, *options: str) -> None:
        if label in record and args.picture is None:
            return
        output = "-".join(word for word in label.replace("|", " ").split() if word != "-")
        output_dir = runs.command(bids_dir, output, *options)
        volume = read(output_dir, stem, image)
        ratios = restore_record(output_dir, stem, image).residual_ratios
        note(label, resample(volume.data, volume.grid, grid), ratios)

    made(f"- | {SCAN_ALONE.replace('-', ' ')} | -", "restored", "--task", "restore")
    for tool in args.tools:
        image = other_tool(truth, inside, tool)
        other = runs.folder / tool
        write_scan(other, f"{runs.name}_desc-{tool}_T1w", Volume(image * SCANNER_UNIT, grid),
                   dataset="Another tool's image", metadata={})  # fmt: skip
        note(f"{tool} | as it is | -", image)
        for trust in args.trust:
            asked = ["-d", f"{tool}={other}", "--trust", f"{trust:g}"]
            for task in args.tasks:
                how, result, words = HOWS[task]
                try:
                    made(f"{tool} | {how} | {trust:g}", result, "--task", *words, *asked)
                except BrainpriorError as error:
                    print(f"{runs.name}: {tool} {how}, trust {trust:g}: {error}", flush=True)
    if args.picture is not None:
        middle = f"{args.trust[len(args.trust) // 2]:g}"
        for tool in args.tools:
            columns_of = {
                "truth": "truth",
                "scan restored": "- | the scan alone | -",
                f"too {tool}": f"{tool} | as it is | -",
                "refined alone": f"{tool} | refined alone | {middle}",
                "with the scan": f"{tool} | with the scan | {middle}",
            }
            columns = [
                Column(title, np.where(inside, shown[key], 0), 1.1)
                for title, key in columns_of.items()
                if key in shown
            ]
            caption = f"{runs.name} (OpenNeuro ds002748, CC0), trust {middle}"
            draw(args.picture / f"refine_{runs.name}_{tool}.png", columns, inside=inside,
                 spacing_mm=[1.0] * 3, caption=caption, dpi=60,
                 planes=PLANES[args.slab is None])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser(__doc__, n_samples=1)
    options.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    options.add_argument("--tasks", nargs="+", choices=HOWS, default=list(HOWS))
    options.add_argument("--trust", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    options.add_argument("--spacing", type=float, default=4.0, help="of the scan's slices, mm")
    return run(options.parse_args(argv), one_brain, ["other tool", "what", "trust"])


if __name__ == "__main__":
    raise SystemExit(main())
