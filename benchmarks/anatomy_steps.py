# SPDX-License-Identifier: Apache-2.0
"""Time of conform, parcellate, n4 and affine for the T1w and T2w of every participant in turn.

    python benchmarks/anatomy_steps.py BIDS_DIR [--participants 9] [--threads 1]

Everything runs in one process, after the weights were read; the first scan is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainprior_bids.anatomy.affine import fit_affine
from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.weights import load_parcellation

Seconds = dict[str, tuple[float, float]]
"""Step -> elapsed and processor seconds."""


def steps(path: Path, network: Any, threads: int) -> Seconds:
    """The time of each step on one scan."""
    seconds: Seconds = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        clock, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds[name] = time.perf_counter() - clock, time.process_time() - cpu
        return result

    image = timed("conform", partial(conform, path, metadata={})).image
    grid = Grid(image.shape, image.affine).one_millimetre()
    label = partial(parcellate, image, network=network, restored_grid=grid)
    brain = timed("parcellate", label)
    timed("n4", partial(n4, image, brain.mask_scan, threads=threads))
    timed("affine", lambda: fit_affine(brain.table, surface=surface(brain.mask > 0, grid)))
    elapsed, used = np.sum(list(seconds.values()), axis=0)
    return {**seconds, "all": (float(elapsed), float(used))}


def main() -> None:
    """Print one row per contrast and step: median and maximum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="BIDS data set with a T1w and a T2w of each")
    parser.add_argument("--participants", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = load_parcellation()
    subjects = sorted(args.data.glob("sub-*"))[: args.participants]
    for suffix in ("T1w", "T2w"):
        paths = [path for subject in subjects for path in subject.rglob(f"*_{suffix}.nii.gz")]
        rows = [steps(path, network, args.threads) for path in (paths[0], *paths)][1:]
        for name in rows[0]:
            elapsed, used = np.array([row[name] for row in rows]).T
            print(
                f"{suffix} {name}: {np.median(elapsed):.1f} s, {elapsed.max():.1f} at most; "
                f"processor {np.median(used):.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
