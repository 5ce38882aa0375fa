# SPDX-License-Identifier: Apache-2.0
"""Growth of time and memory with the size of the volume, whole and in tiles.

    python benchmarks/size_growth.py [--threads 1] [--tile 32] [--largest-whole 256]

Each case is one `restore` in a separate process, with a single noise level: one network call and
one inner solve (small matrices, refinement of the noise, exact draw, conditional mean). The brain
fills the field of view, so that nothing is cropped. Extrapolated to a sample of 20 levels:

    T(20) = set-up + 20 (network + refine + draw) + 10 expect

``refine`` and ``draw`` contain the small matrices. Memory is the peak resident size of the
process, weights and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from brainprior_bids.engine import restore as entry
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.weights import load_prior

SIZES = ((176, 208, 176), (192, 192, 192), (256, 256, 256), (320, 320, 320))
SPACING = 5.0


def measure(
    extent: tuple[int, int, int], tile: int | None, args: argparse.Namespace
) -> dict[str, Any]:
    """One restoration of one level, in this process."""
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        def run(*values: Any, **names: Any) -> Any:
            start = clock()
            result = function(*values, **names)
            spent[name] += clock() - start
            return result

        return run

    shape = (extent[0], extent[1], int(extent[2] // SPACING))
    spacing = (1.0, 1.0, extent[2] / shape[2])
    generator = torch.Generator().manual_seed(0)

    def ball(size: tuple[int, int, int]) -> torch.Tensor:
        squares = [torch.linspace(-1, 1, n) ** 2 for n in size]
        return (squares[0][:, None, None] + squares[1][:, None] + squares[2] < 0.97**2).float()

    scan = ball(shape) * (0.7 + 0.1 * torch.randn(shape, generator=generator))
    centre = np.eye(4)
    centre[:3, 3] = -np.array(extent) / 2
    prior = load_prior(tile_mm=tile)
    prior.denoise = timed("network", prior.denoise)  # type: ignore[method-assign]
    for name in ("refine", "draw", "expect"):
        setattr(Likelihood, name, timed(name, getattr(Likelihood, name)))
    start = clock()
    grid = Grid(shape, np.diag([*spacing, 1.0]))
    result = entry.restore(
        Observation(scan, grid, Acquisition(2, spacing[2], spacing[2]), ball(shape)),
        mask_1mm=ball(extent),
        to_mni305=centre,
        contrast="T1w",
        prior=prior,
        n_samples=1,
        n_steps=1,
    )
    total = clock() - start
    return {
        "box": result.box.shape,
        "total": total,
        # the initial estimate of a chain is one more draw, which is part of the set-up
        "setup": total - spent["network"] - spent["refine"] - spent["draw"] / 2 - spent["expect"],
        "network": spent["network"],
        "inner": spent["refine"] + spent["draw"] / 2,
        "expect": spent["expect"],
        "tile": prior.tile_mm,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, with one thread that of a dedicated core",
    )
    parser.add_argument("--tile", type=int, default=32, help="slab thickness, mm")
    parser.add_argument(
        "--largest-whole", type=int, default=256, help="untiled up to this edge, mm"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # for the child process
    args = parser.parse_args()
    if args.case:
        extent, tile = json.loads(args.case)
        print(json.dumps(measure(tuple(extent), tile, args)))
        return
    print(f"{args.threads} threads, {args.clock} clock, load average {os.getloadavg()[0]:.1f}")
    print(
        "| volume | tiles | Mvoxels | network, s | inner solve, s | T(20), s | "
        "T(20), s per Mvoxel | peak GiB |\n|---|---|---|---|---|---|---|---|"
    )
    for extent in SIZES:
        for tile in (None, args.tile):
            if tile is None and max(extent) > args.largest_whole:
                continue
            child = subprocess.run(
                [sys.executable, __file__, "--threads", str(args.threads), "--clock", args.clock,
                 "--case", json.dumps([extent, tile])],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            case = json.loads(child.stdout.splitlines()[-1])
            million = float(np.prod(case["box"])) / 1e6
            sample = case["setup"] + 20 * (case["network"] + case["inner"]) + 10 * case["expect"]
            print(
                f"| {' x '.join(map(str, case['box']))} | {case['tile'] or 'whole'} | "
                f"{million:.1f} | {case['network']:.1f} | {case['inner']:.1f} | {sample:.0f} | "
                f"{sample / million:.0f} | {case['gib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
