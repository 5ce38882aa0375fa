# SPDX-License-Identifier: Apache-2.0
"""``brainprior check-lesion``: how much of synthetic lesions in a scan a restoration keeps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainprior_bids.cli.checks import named_prior
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation.lesions import contrast_kept, prepare_case
from brainprior_bids.run import resources
from brainprior_bids.run.logs import LOG


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior check-lesion``."""
    parser = argparse.ArgumentParser(
        prog="brainprior check-lesion",
        description="Add a synthetic lesion to a scan, restore it, and print how much of its "
        "contrast is kept.",
    )
    parser.add_argument("image", type=Path, help="NIfTI file of a scan")
    parser.add_argument("--modality", choices=("T1w", "T2w", "FLAIR"), default="T1w")
    parser.add_argument(
        "--size",
        nargs="+",
        type=float,
        default=[4.0, 8.0],
        metavar="MM",
        help="diameters of the synthetic lesions (default: 4 8)",
    )
    parser.add_argument(
        "--contrast",
        nargs="+",
        type=float,
        default=[-0.3, 0.3],
        metavar="C",
        help="contrasts relative to the tissue's intensity; -0.3 is darker by 30 %%",
    )
    parser.add_argument(
        "--at",
        nargs=3,
        type=float,
        metavar=("X", "Y", "Z"),
        help="centre in scanner RAS mm (default: the deepest white matter)",
    )
    parser.add_argument("--slice-thickness", type=float, metavar="MM")
    parser.add_argument(
        "--crop", type=float, metavar="MM", help="restore only a block of MM around the lesion"
    )
    parser.add_argument("--n-samples", type=int, default=2)
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument(
        "--prior", type=Path, help="a file, or a name from `brainprior weights list`"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    return parser


def check_lesion(argv: Sequence[str]) -> int:
    """Print a table of the contrast that is kept of lesions added to ``IMAGE``."""
    options = build_parser().parse_args(list(argv))
    if not options.image.is_file():
        raise UsageError(f"check-lesion: {options.image} is not a file. Give a NIfTI image.")
    if min(options.size) <= 0 or 0 in options.contrast:
        raise UsageError("check-lesion: expected sizes above 0, and contrasts other than 0.")
    if options.n_samples < 1:
        raise UsageError(
            f"check-lesion: --n-samples: expected at least 1, got {options.n_samples}."
        )
    prior = named_prior(options.prior)
    device = resources.resolve_device(options.device)
    case, warnings = prepare_case(
        options.image.absolute(), contrast=options.modality, thickness_mm=options.slice_thickness
    )
    for warning in warnings:
        LOG.warning("%s", warning)
    centre = case.deepest_mm() if options.at is None else np.array(options.at)
    if options.crop is not None:
        case = case.crop(centre, options.crop)
    rows = contrast_kept(
        case,
        load_prior(prior, device=device),
        centre_mm=centre,
        sizes_mm=options.size,
        contrasts=options.contrast,
        n_samples=options.n_samples,
        seed=options.random_seed,
        device=device,
    )
    print(
        f"# centre {', '.join(f'{v:.1f}' for v in centre)} mm (scanner RAS), sampler "
        f"{rows[0].sampler}, {options.n_samples} sample(s)"
    )
    print("size_mm\tcontrast\tkept_restored\tkept_interpolated")
    for row in rows:
        print(f"{row.size_mm:g}\t{row.contrast:g}\t{row.restored:.2f}\t{row.interpolated:.2f}")
    return 0
