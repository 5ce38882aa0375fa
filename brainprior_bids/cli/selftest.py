# SPDX-License-Identifier: Apache-2.0
"""``brainprior selftest``: check that everything a run needs is installed and computes.

It is the last step of a container's build, and needs no data and no network.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec

from brainprior_bids import __version__
from brainprior_bids.bids.validate import find_validator
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.run.resources import resolve_device

LIBRARIES = (
    "torch",
    "SimpleITK",
    "nipype",
    "bids",
    "niworkflows",
    "nireports",
    "brainprior_bids.workflows.base",
    "brainprior_bids.reports.subject",
)
SIZE_MM = 48


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior selftest``."""
    parser = argparse.ArgumentParser(
        prog="brainprior selftest",
        description="Check the libraries, the weights' hashes and one small restoration.",
    )
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda[:N]}")
    return parser


def selftest(argv: Sequence[str]) -> int:
    """Check the libraries, the weights' hashes and one small restoration; 0 if all is well.

    Raises
    ------
    BrainpriorError
        Naming what is wrong.
    """
    device = resolve_device(build_parser().parse_args(list(argv)).device)
    print(f"brainprior {__version__}, device {device}")
    _libraries()
    _weights()
    _restoration(device)
    print("self-test passed")
    return 0


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        raise BrainpriorError(
            f"self-test: {name} cannot be imported ({type(error).__name__}: {error}). "
            "Reinstall brainprior with constraints.txt."
        ) from error


def _libraries() -> None:
    for name in LIBRARIES:
        _load(name)
    print(f"{len(LIBRARIES)} libraries load")
    if find_spec("ants") is None:
        print("antspyx is not installed: scans cannot be registered to the MNI305 template")
    else:
        _load("ants")
    command = find_validator()
    if command is None:
        print("bids-validator-deno is not installed: data sets will not be validated")
        return
    result = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=False, timeout=120
    )
    if result.returncode:
        raise BrainpriorError(
            f"self-test: {command} --version exited with status {result.returncode}: "
            f"{result.stderr.strip()[-500:]}. Reinstall it."
        )
    print(result.stdout.strip())


def _weights() -> None:
    """Check the weights: ``read_weights`` compares the tensors with the hash in their header."""
    from brainprior_bids.engine.weights import FOLDER, read_weights

    for kind in ("prior", "coarse", "parcellation"):
        _, metadata = read_weights(FOLDER / f"{kind}.safetensors", kind=kind)
        print(f"weights of the {kind} are intact, SHA-256 {metadata['sha256']}")


def _restoration(device: str) -> None:
    """Two steps on a ball of 5 mm slices: the values must be finite, and similar to the ball's."""
    import numpy as np
    import torch

    from brainprior_bids.engine.acquisition import Acquisition
    from brainprior_bids.engine.grids import Grid
    from brainprior_bids.engine.observation import Observation
    from brainprior_bids.engine.restore import restore
    from brainprior_bids.engine.weights import load_prior

    torch.set_num_threads(1)  # so small that more threads only wait for each other
    began = time.monotonic()
    spacing = np.array([1.0, 1.0, 5.0])
    shape = tuple(int(n) for n in SIZE_MM // spacing)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    grid = Grid(shape, affine)
    fine = grid.one_millimetre()
    mask, mask_1mm = (
        (np.linalg.norm(g.points_mm(), axis=0) < 0.4 * SIZE_MM).astype(np.float32)
        for g in (grid, fine)
    )
    scan = mask * (100 + np.random.default_rng(0).normal(0, 2, shape)).astype(np.float32)
    result = restore(
        Observation(scan, grid, Acquisition(2, thickness_mm=5.0, spacing_mm=5.0), mask),
        mask_1mm=mask_1mm,
        to_mni305=np.eye(4),
        contrast="T1w",
        prior=load_prior(device=device),
        n_samples=1,
        n_steps=2,
        device=device,
    )
    inside = result.mean[mask_1mm > 0]
    if not np.isfinite(result.mean).all() or not 80 < np.median(inside) < 120:
        raise BrainpriorError(
            f"self-test: a restored ball of 100 has the median {np.median(inside):.4g}, from "
            f"{inside.min():.4g} to {inside.max():.4g}. Check the weights: "
            "brainprior weights verify."
        )
    print(
        f"a ball of 100 was restored to a median of {np.median(inside):.1f} "
        f"in {time.monotonic() - began:.1f} s"
    )
