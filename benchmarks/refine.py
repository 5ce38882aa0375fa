# SPDX-License-Identifier: Apache-2.0
"""Another tool's image, too smooth or too sharp, refined over a sweep of trust.

    python benchmarks/refine.py sub-01_desc-brain_T1w.nii.gz ...

The "other tool" is the truth blurred by a Gaussian of SD 1 mm, or sharpened (the truth plus what
that blur takes from it). Root mean square error inside the brain, in units of its 99th percentile:
of that image, of the image refined alone at each trust, of the scan (slices of ``--spacing`` mm,
1 % noise) restored alone, and of both together. Residual is the misfit to what was given (RMS over
the SD that was stated), of the first sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.weights import load_parcellation, load_prior
from brainprior_bids.evaluation.metrics import compare, matching_gain
from brainprior_bids.evaluation.protocol import AXIS, Condition, from_scan, make_case

TOOLS = ("smooth", "sharp")


def other_tool(truth: np.ndarray, inside: np.ndarray, kind: str) -> np.ndarray:
    """Blurred by 1 mm, or sharpened by what that takes; 0 outside."""
    blurred = ndimage.gaussian_filter(truth, 1.0)
    image = blurred if kind == "smooth" else 2 * truth - blurred
    return np.where(inside, image, 0).astype(np.float32)


def one_brain(path: Path, args: argparse.Namespace) -> list[list[Any]]:
    """Rows of the table: tool, how, trust, error, residual."""
    name = path.name.partition("_")[0].removeprefix("sub-")
    condition = Condition(
        study="refine", spacing_mm=args.spacing, noise_sd=0.01, crop_mm=tuple(args.crop)
    )
    case = make_case(from_scan(path, name, "T1w", load_parcellation()), condition)
    truth, fine = case.truth.data, case.truth.grid
    common = {
        "mask_1mm": case.inside,
        "to_mni305": case.to_mni305,
        "contrast": "T1w",
        "prior": load_prior(args.prior, device=args.device),
        "n_samples": args.n_samples,
        "n_steps": args.n_steps,
        "seed": args.seed,
        "device": args.device,
    }
    thick = {
        "grid": case.scan.grid,
        "acquisition": Acquisition(AXIS, args.spacing, args.spacing),
        "mask": case.mask,
    }
    rows: list[list[Any]] = []

    def note(tool: str, how: str, trust: float, image: np.ndarray, residual: float) -> None:
        gain = matching_gain(image, truth, case.judged)
        error = compare(gain * image, truth, case.judged)["rmse"]
        rows.append([tool, how, trust, error, residual])
        print(
            f"{name}: {tool} {how} {trust:g} RMSE {error:.4f} residual {residual:.2f}", flush=True
        )

    done = restore(case.scan.data, **thick, **common)
    note("-", "scan alone", np.nan, done.mean, done.residual_ratios[0])
    for tool in args.tools:
        image = other_tool(truth, case.inside, tool)
        note(tool, "as it is", np.nan, image, np.nan)
        for trust in args.trust:
            alone = restore(
                image,
                grid=fine,
                acquisition=Acquisition(AXIS, 1.0, 1.0),
                mask=case.inside.astype(np.float32),
                noise_sd=trust,
                **common,
            )
            note(tool, "refined alone", trust, alone.mean, alone.residual_ratios[0])
            try:
                both = restore(case.scan.data, anchor=image, anchor_sd=trust, **thick, **common)
            except BrainpriorError as error:
                print(f"{name}: {tool} with the scan, trust {trust:g}: {error}")
                continue
            note(tool, "with the scan", trust, both.mean, both.residual_ratios[0])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--trust", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--spacing", type=float, default=4.0, help="of the scan's slices, mm")
    parser.add_argument("--crop", type=int, nargs=3, default=[80, 80, 80])
    parser.add_argument("--n-samples", type=int, default=2)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = [row for path in args.brains for row in one_brain(path, args)]
    print("| other tool | what | trust | RMSE | residual |\n|---|---|---|---|---|")
    for key in dict.fromkeys((r[0], r[1], str(r[2])) for r in rows):
        values = [r[3:] for r in rows if (r[0], r[1], str(r[2])) == key]
        error, residual = np.mean(np.array(values, float), axis=0)
        print(f"| {key[0]} | {key[1]} | {key[2]} | {error:.4f} | {residual:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
