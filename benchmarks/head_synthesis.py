# SPDX-License-Identifier: Apache-2.0
"""Time to synthesise a head with brainprior's and cornucopia's generators, in one process.

    pip install cornucopia
    python benchmarks/head_synthesis.py training_seg_01.nii.gz

Both draw a deformed head of random contrast, resolution, noise and bias with its labels from one
1 mm label map. brainprior samples the 1 mm map on a 2 mm grid. Cornucopia deforms a map on its own
grid: it is given the map at 1 mm, and a map of every second voxel, with linear deformations, which
are much faster than the cubic default according to its documentation. Measured with one thread, in
processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainprior_bids.training.synthesis import HeadMap, HeadSynthesiser, load_labels

SHAPE = (80, 96, 80)
"""Shape in voxels of 2 mm; at 1 mm there are twice as many along each axis."""


def seconds(draw: Callable[[], Any], repeats: int) -> float:
    """Median processor time of one draw, after a first one for warming up."""
    draw()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        draw()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("labels", type=Path, help="whole-head label map of 1 mm")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        import cornucopia
    except ImportError:
        parser.error("cornucopia is not installed: pip install cornucopia")
    torch.set_num_threads(1)
    labels, _ = load_labels(args.labels)
    ours = HeadSynthesiser([HeadMap.from_labels(labels)], SHAPE)
    generator = torch.Generator().manual_seed(0)
    baseline = seconds(lambda: ours.draw(generator), 4 * args.repeats)
    print(f"ours, 2 mm of a 1 mm map: {baseline:.2f} s")
    codes = torch.from_numpy(np.searchsorted(np.unique(labels), labels)).long()[None]
    half = codes[:, ::2, ::2, ::2]
    for what, codes_of, size in (
        ("2 mm", half, SHAPE),
        ("1 mm", codes, [2 * n for n in SHAPE]),
    ):
        theirs = cornucopia.SynthFromLabelTransform(order=1, patch=list(size))
        taken = seconds(lambda theirs=theirs, codes_of=codes_of: theirs(codes_of), args.repeats)
        print(f"cornucopia, {what}: {taken:.2f} s, {taken / baseline:.0f} times ours")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
