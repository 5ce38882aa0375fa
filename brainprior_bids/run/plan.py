# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: what would be done for each scan, with time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from brainprior_bids.anatomy.conform import read_geometry
from brainprior_bids.bids import export
from brainprior_bids.bids.contrasts import Result, pairs
from brainprior_bids.bids.files import readable
from brainprior_bids.bids.names import output_names, scan_seed
from brainprior_bids.bids.query import Scan, subjects_without
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import PLANES
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import ConformFacts
from brainprior_bids.run.jobs import (
    ScanInputs,
    export_roots_of,
    exported_t1w,
    look_up,
    via_t1w,
    why_again,
)
from brainprior_bids.run.preflight import checked_weights
from brainprior_bids.settings import Settings, is_template

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
OTHER_S = 60.0
"""All steps before and after the network calls, in seconds: the demo took 52 on an idle machine
with two threads (most of these steps use one)."""
SAMPLE_S = 5.0
"""Seconds per sample in addition to its network calls."""
BUSY = 0.5
"""Load per processor above which the machine is called busy."""


def print_plan(scans: Sequence[Scan], settings: Settings) -> None:
    """Print every scan's outputs, seed, time and memory; nothing is written."""
    from brainprior_bids.workflows.scan import REGISTRATION_S, claims_gb

    sampler = registry.find(settings.sampler)
    calls = settings.n_samples * sampler.calls(settings.n_steps, simple=settings.simple)
    voxel_s = seconds_per_voxel(settings)
    total = 0.0
    refused = skipped = 0
    to_align: list[Result] = []
    to_fmriprep = exported_t1w(scans, settings)
    through = via_t1w(scans, settings)
    weights = {role: digest for role, (_, digest) in checked_weights(settings).items()}
    for scan in scans:
        seed = scan_seed(settings.random_seed, scan.name)
        print(f"{scan.relative}  {settings.task}, seed {seed}")
        try:
            job = look_up(scan, settings, weights, via_t1w=scan.name.stem in through)
            why = why_again(scan, job, settings, export_roots_of(scan, settings, to_fmriprep))
            if why is None:
                print("  done: it would be skipped")
                skipped += 1
                to_align.append(Result(scan.name, settings.image))
                continue
            if why:
                print(f"  {why}")
            voxels = _planned(scan, settings, job)
        except Exception as error:  # as in `plan_jobs`: the other scans continue after any error
            known = isinstance(error, BrainpriorError)
            print(f"  would fail: {error if known else f'{type(error).__name__}: {error}'}")
            refused += 1
            continue
        seconds = scan_seconds(voxels, len(scan.runs), settings, voxel_s)
        seconds += REGISTRATION_S * len(job.templates)
        total += seconds
        print(f"  about {minutes(seconds)} ({voxels / 1e6:.1f} million voxels)")
        to_align.append(Result(scan.name, settings.image))
        names = output_names(
            scan.name,
            n_samples=settings.n_samples,
            spaces=(*plain_spaces(settings), *job.templates),
            save_samples=settings.save_samples,
            native=settings.output_grid == "native",
            image=settings.image,
            runs=[run.name for run in scan.runs[1:]],
            lesion="lesion" in job.given,
            uncertainty=uncertainty_from(settings, len(scan.runs)) is not None,
        )
        for name in names.values():
            print(f"  {scan.name.folder}/anat/{name}")
        if scan.name.stem in to_fmriprep:
            root = settings.exports["fmriprep"]
            for path in export.fmriprep_names(scan.name).values():
                print(f"  {root}/{path}")
        if "raw" in settings.exports:
            print(f"  {settings.exports['raw']}/{export.raw_name(scan.name)}")
    for name in contrast_names(to_align, settings, through):
        print(f"  {name}")
    for subject in subjects_without(scans, settings):
        print(f"sub-{readable(subject)}: no scan matches the request")
    to_do = len(scans) - refused - skipped
    memory = max(claims_gb(settings).values())
    at_once = (
        settings.n_gpu_procs if settings.use_gpu else settings.nprocs // settings.omp_nthreads
    )
    if not settings.low_mem:
        at_once = max(1, min(at_once, int(settings.mem_gb / memory), to_do))
    else:
        at_once = 1
    omitted = [(skipped, "would be skipped"), (refused, "would fail")]
    counts = ", of which " * any(n for n, _ in omitted)
    counts += " and ".join(f"{n} {what}" for n, what in omitted if n)
    print(
        f"{len(scans)} scan(s){counts}, {calls} network calls each ({settings.sampler} "
        f"sampler), on {settings.device}, {at_once} at once: about "
        f"{minutes(total / at_once)} on an idle machine, and {at_once * memory:.0f} GiB of "
        "memory. One network call was timed for this. Nothing was written."
    )
    print(busy_now())


@cache
def _predicts_spread(prior: Path | None) -> bool:
    from brainprior_bids.engine.weights import FOLDER, read_weights

    _, facts = read_weights(prior or FOLDER / "prior.safetensors", kind="prior")
    return bool(facts["config"].get("spread"))


def uncertainty_from(settings: Settings, n_runs: int) -> str | None:
    """Source of a scan's uncertainty map: the ``prior``, ``samples``, or None.

    If the default sampler turns out not to be applicable to a scan, its map is from the samples.
    """
    sampler = registry.find(settings.sampler)
    alone = n_runs < 2 and not settings.refines and not settings.fills_scan
    if sampler.given_data and alone and _predicts_spread(settings.prior):
        return "prior"
    return "samples" if settings.n_samples > 1 else None


def scan_seconds(voxels: float, n_runs: int, settings: Settings, voxel_s: float) -> float:
    """Seconds of one scan on an idle machine.

    Parameters
    ----------
    voxels : float
        Number of 1 mm voxels in the box that the network processes.
    n_runs : int
        Number of fused runs; 0 if nothing is fused.
    voxel_s : float
        Seconds of a network call per voxel.
    """
    sampler = registry.find(settings.sampler)
    calls = settings.n_samples * sampler.calls(settings.n_steps, simple=settings.simple)
    share = FUSED_SHARE * n_runs if n_runs else sampler.solve_share
    restoration = calls * voxels * voxel_s * (1 + share) + SAMPLE_S * settings.n_samples
    return OTHER_S + restoration + RUN_S * max(0, n_runs - 1)


def minutes(seconds: float) -> str:
    """``3 min``; below ten minutes with a decimal."""
    value = seconds / 60
    return f"{value:.1f} min" if value < 10 else f"{value:.0f} min"


def busy_now() -> str:
    """How busy this machine is, by its load of the last minute."""
    if not hasattr(os, "getloadavg"):
        return "The present load of this machine is not known."
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load <= BUSY:
        return f"This machine is not busy now (load {load:.1f} per processor)."
    return (
        f"This machine is busy now (load {load:.1f} per processor): the run will take longer, as "
        "it shares the processors with other programs."
    )


def contrast_names(
    results: Sequence[Result], settings: Settings, through: Collection[str]
) -> list[str]:
    """Paths of the transforms between the contrasts of a session, and of the resampled files."""
    paths: list[str] = []
    for pair in pairs(results):
        uncertain = uncertainty_from(settings, 0) is not None
        own = pair.other.files(
            settings.n_samples, save_samples=settings.save_samples, uncertainty=uncertain
        )
        paths += [*pair.transforms, *pair.on_reference(own, settings.output_spaces).values()]
        if pair.other.name.stem in through:
            for space in settings.template_spaces:
                paths += pair.on_template(own, space).values()
    return paths


def plain_spaces(settings: Settings) -> list[str]:
    """The output spaces that need no template."""
    return [space for space in settings.output_spaces if not is_template(space)]


def _planned(scan: Scan, settings: Settings, inputs: ScanInputs) -> float:
    """Print the geometry of a scan and the other files that it uses.

    Returns
    -------
    Number of 1 mm voxels in the box that the network processes: a typical brain's, or the field
    of view if that is smaller.
    """
    given = inputs.given
    for run, files in [(scan.runs[0] if scan.runs else scan, given), *inputs.others]:
        if scan.runs:
            print(f"  fuses {run.relative}")
        for file in files.values():
            print(f"  uses {file.uri}")
    voxels = 0.0
    alone = not settings.uses_scan  # then that image replaces the scan
    for run in scan.runs or (scan,):
        plane = settings.slice_plane
        geometry = read_geometry(
            given["refined"].path if alone else run.path,
            metadata={} if alone else run.metadata,
            slice_thickness_mm=None if alone else settings.slice_thickness_mm,
            slice_axis=PLANES.index(plane) if plane is not None and not alone else None,
        )
        acquisition = geometry.acquisition
        source = ConformFacts.from_json(geometry.facts).acquisition.thickness_source
        print(
            f"  {' × '.join(str(n) for n in geometry.grid.shape)} voxels of "
            f"{' × '.join(f'{size:.3g}' for size in geometry.grid.spacing_mm)} mm; "
            f"{PLANES[acquisition.slice_axis]} slices, {acquisition.thickness_mm:.3g} mm thick "
            f"({source})"
        )
        for warning in (*run.warnings, *geometry.warnings):
            print(f"  warning: {warning}")
        voxels = voxels or float(np.prod(np.minimum(geometry.grid.extent_mm, BOX_MM)))
    return voxels


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
