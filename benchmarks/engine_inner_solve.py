# SPDX-License-Identifier: Apache-2.0
"""Time of the inner solve and of the network, in one run.

The scan has 1 x 1 x 5 mm voxels, 176 x 208 x 176 mm, with bias, partial volume and noise. At every
level of the default schedule, the denoiser call, the refinement of bias and noise, the exact draw
and the rest are timed. Prints a table and the ratio, with the peak memory of the process.

    python benchmarks/engine_inner_solve.py [--threads 2] [--device cuda] [--sampler conditional]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainprior_bids.engine import restore as entry
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.gaussian.spectral import SpectralSolver
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.operators.slices import SliceProfile
from brainprior_bids.engine.sensing import brain_share, sensitivity
from brainprior_bids.engine.weights import load_prior

SPENT: dict[str, list[float]] = defaultdict(list)


def now() -> float:
    """Time in seconds, after the GPU's queue is empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which records its seconds under ``name``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = function(*args, **kwargs)
        SPENT[name].append(now() - start)
        return result

    return run


def head(extent: tuple[int, int, int], spacing: tuple[float, float, float]) -> dict[str, Any]:
    """An ellipsoid with folds as the brain, sampled by the engine's own operators."""
    shape = tuple(round(e / s) for e, s in zip(extent, spacing, strict=True))
    grid = Grid((shape[0], shape[1], shape[2]), np.diag([*spacing, 1.0]))
    fine = grid.one_millimetre()
    axes = [torch.linspace(-1, 1, n) for n in fine.shape]
    a, b, c = torch.meshgrid(*axes, indexing="ij")
    radius = ((a / 0.86) ** 2 + (b / 0.9) ** 2 + (c / 0.86) ** 2).sqrt()
    mask = (radius < 1).float()
    x = mask * (0.6 + 0.3 * torch.cos(40 * a) * torch.cos(30 * b) * torch.cos(35 * c))
    axis = int(np.argmax(spacing))
    acquisition = Acquisition(axis, spacing[axis], spacing[axis])
    profile, sensed = sensitivity(grid, acquisition, grid.shape)
    y = x
    for i, weights in enumerate([*sensed[:axis], profile, *sensed[axis + 1 :]]):
        y = SliceProfile(weights, tuple(y.shape), i)(y)
    ramp = torch.linspace(-0.2, 0.2, grid.shape[1])[None, :, None]
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    centre = np.eye(4)
    centre[:3, 3] = -np.array(extent) / 2
    return {
        "observation": Observation(
            y * ramp.exp() + 0.01 * noise, grid, acquisition, brain_share(mask, sensed)
        ),
        "mask_1mm": mask,
        "to_mni305": centre,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--extent", type=int, nargs=3, default=(176, 208, 176))
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 5.0))
    parser.add_argument("--prior", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--sampler", choices=("conditional", "exact"), default="exact")
    parser.add_argument("--move-bias", action="store_true", help="refine the field while sampling")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = head(tuple(args.extent), tuple(args.spacing))
    prior = load_prior(args.prior, device=args.device)
    prior.denoise = timed("network", prior.denoise)  # type: ignore[method-assign]
    for name in ("refine", "draw", "expect"):
        setattr(Likelihood, name, timed(name, getattr(Likelihood, name)))
    SpectralSolver.factors = timed("matrices", SpectralSolver.factors)  # type: ignore[method-assign]
    start = now()
    result = entry.restore(
        case.pop("observation"),
        contrast="T1w",
        prior=prior,
        n_samples=args.samples,
        n_steps=args.steps,
        sampler=args.sampler,
        device=args.device,
        nuisances=Nuisances(move_bias=args.move_bias),
        **case,
    )
    total = now() - start
    inner = sum(sum(SPENT[name]) for name in ("refine", "draw", "expect"))  # with ``matrices``
    network = sum(SPENT["network"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.sampler}, image {result.box.shape}, data {result.box.data_shape}, "
        f"{args.device}, {args.threads} threads, {args.samples} samples"
    )
    print("| part | s per level (median) | s in all |\n|---|---|---|")
    for name in ("network", "refine", "draw", "expect"):
        if not SPENT[name]:  # "conditional" passes the data to the network and solves only once
            continue
        print(f"| {name} | {np.median(SPENT[name]):.3f} | {sum(SPENT[name]):.1f} |")
    small = SPENT["matrices"]
    print(f"| of these, small matrices | {np.median(small):.3f} | {sum(small):.1f} |")
    print(f"| everything | | {total:.1f} |")
    print(
        f"inner solve / network = {inner / network:.3f}; inner / everything = "
        f"{inner / total:.3f}; {result.inner_iterations:.1f} iterations per level; "
        f"peak memory {memory:.2f} GiB"
    )
    if torch.cuda.is_available():
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
