# SPDX-License-Identifier: Apache-2.0
"""Sampler and time of a scan, as far as they are known before a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import SamplerError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.samplers import registry
from brainprior_bids.engine.samplers.registry import Sampler
from brainprior_bids.settings import Settings

TIMED = 64
"""Edge of the block whose network call is timed, in voxels."""
BOX_MM = (160, 200, 164)
"""Typical box around a brain, its margins included, along right, anterior and superior: 5.2
million voxels. In 60 participants it had 4.4 to 6.4 million, in a tilted head 6.4."""
FUSED_SHARE = 0.5
"""Time for each fused run, relative to that of the network: 0.02 per iteration, 15 iterations, 3
solves in 2 levels (measured with two and three runs)."""
RUN_S = 60.0
"""Seconds of preprocessing for each fused run except the first."""
OTHER_S = ((0.5, 22.0), (2.0, 31.0), (6.0, 35.0))
"""Millions of voxels of a scan, and seconds of all its steps but the restoration: processor time
of the nodes in scans with slices of 5 mm (20 to 24 s), 3 mm (29 to 34 s) and 1 mm (35 s)."""
THERE_S = 8.4e-7
"""Seconds of a network call per voxel on the processor on which these were measured."""
SAMPLE_S = 5.0
"""Seconds per sample in addition to its network calls."""
COMMAND_S = 24.0
"""Seconds that a run takes to start, and to write tables, reports and provenance at its end:
processor time of the command itself, without its steps, for one scan."""
ALIGN_S = 15.0
"""Seconds to align a contrast with the session's T1w: 13.7 and 14.5 s of processor time for T2w
with slices of 5 mm, and a second to write the transforms."""


@dataclass(frozen=True)
class Sampling:
    """How a scan will be sampled.

    Parameters
    ----------
    sampler : Sampler
    reason : str or None
        Why it is not the one that was requested, or not the default.
    calls : int
        Network calls for all samples.
    uncertainty : str or None
        Source of the uncertainty map: the ``prior``, ``samples``, or None if there is no map.
    """

    sampler: Sampler
    reason: str | None
    calls: int
    uncertainty: str | None


def expected_sampling(
    grid: Grid,
    acquisition: Acquisition,
    settings: Settings,
    *,
    n_runs: int = 0,
    any_hidden: bool = False,
    uneven_noise: bool = False,
) -> Sampling:
    """The sampling of a scan, by the rule of the engine.

    The engine applies the rule to the scan as it was processed. Displaced slices, lost slices and
    interpolated voxels are found during the run, and can change its choice.

    Parameters
    ----------
    grid, acquisition : Grid, Acquisition
        Of the scan (fused runs: of the reference), from header and sidecars.
    n_runs : int
        Number of fused runs; 0 if nothing is fused.
    any_hidden : bool
        Whether a lesion mask hides voxels of the scan.
    uneven_noise : bool
        Whether the noise of the scan is a map.
    """
    from brainprior_bids.engine.conditioning import UNEVEN_NOISE, expected_obstacle
    from brainprior_bids.engine.restore import choose_sampler

    facts = _weights_facts(settings.prior)
    obstacle = UNEVEN_NOISE if uneven_noise else None
    obstacle = obstacle or expected_obstacle(grid, acquisition, any_hidden=any_hidden, facts=facts)
    n_scans = max(1, n_runs)

    def choose(asked: str) -> tuple[str, str | None]:
        return choose_sampler(asked, obstacle, n_steps=settings.n_steps, n_scans=n_scans)

    try:
        name, reason = choose(settings.sampler)
    except SamplerError as error:  # as in the restoration: it is restored by another sampler
        (name, _), reason = choose("auto"), error.obstacle
    sampler = registry.find(name)
    simple = n_scans == 1 and not any_hidden
    n_samples = settings.n_samples
    return Sampling(
        sampler,
        reason,
        n_samples * sampler.calls(settings.n_steps, simple=simple),
        uncertainty_from(sampler, settings, n_runs),
    )


def uncertainty_from(sampler: Sampler, settings: Settings, n_runs: int) -> str | None:
    """Source of a scan's uncertainty map: the ``prior``, ``samples``, or None.

    Parameters
    ----------
    n_runs : int
        Number of fused runs; 0 if nothing is fused.
    """
    with_image = settings.refines and settings.uses_scan
    alone = n_runs < 2 and not with_image and not settings.fills_scan
    if sampler.given_data and alone and _weights_facts(settings.prior)["config"].get("spread"):
        return "prior"
    return "samples" if settings.n_samples > 1 else None


@cache
def _weights_facts(prior: Path | None) -> dict[str, Any]:
    from brainprior_bids.engine.weights import FOLDER, read_weights

    return read_weights(prior or FOLDER / "prior.safetensors", kind="prior")[1]


def scan_seconds(
    sampling: Sampling, *, box_voxels: float, scan_voxels: float, n_runs: int, n_samples: int,
    voxel_s: float,
) -> float:  # fmt: skip
    """Seconds of one scan on an idle machine.

    Parameters
    ----------
    box_voxels : float
        Number of 1 mm voxels in the box that the network processes.
    scan_voxels : float
        Number of voxels of the scan.
    n_runs : int
        Number of fused runs; 0 if nothing is fused.
    voxel_s : float
        Seconds of a network call per voxel.
    """
    share = FUSED_SHARE * n_runs if n_runs else sampling.sampler.solve_share
    restoration = sampling.calls * box_voxels * voxel_s * (1 + share) + SAMPLE_S * n_samples
    slower = max(1.0, voxel_s / THERE_S)  # a faster network does not make the other steps faster
    return slower * other_seconds(scan_voxels) + restoration + RUN_S * max(0, n_runs - 1)


def other_seconds(scan_voxels: float) -> float:
    """Seconds of all steps of a scan but the restoration, for its number of voxels.

    They are those of a processor on which a network call takes ``THERE_S`` per voxel.

    Interpolated between the measurements of ``OTHER_S``, and constant beyond them.
    """
    millions, seconds = zip(*OTHER_S, strict=True)
    return float(np.interp(scan_voxels / 1e6, millions, seconds))


def seconds_per_voxel(settings: Settings) -> float:
    """Time of a network call per voxel on this machine when it is idle.

    On the CPU it is the processor time of the calling thread: time taken by other programs does
    not count, and the thread sleeps while it waits for the other threads of the call.
    """
    import torch

    from brainprior_bids.engine.weights import load_prior

    if not settings.use_gpu:
        torch.set_num_threads(settings.omp_nthreads)
    device = (
        "cpu" if settings.device == "auto" else settings.device
    )  # known only in a scheduler's job
    prior = load_prior(settings.prior, device=device)
    shape = (TIMED,) * 3
    x = torch.zeros((1, 1, *shape), device=device)
    coordinates = torch.zeros((3, *shape), device=device)
    clock = time.thread_time if device == "cpu" else time.monotonic
    seconds = []
    for _ in range(4):  # the first one warms up, others may be disturbed
        start = clock()
        prior.denoise(x, 1.0, coordinates=coordinates, contrast="T1w").cpu()
        seconds.append(clock() - start)
    return min(seconds) / TIMED**3
