# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: what would be done for each scan, with time and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from brainprior_bids.anatomy.conform import read_geometry
from brainprior_bids.bids import export
from brainprior_bids.bids.contrasts import Result, pairs
from brainprior_bids.bids.files import readable
from brainprior_bids.bids.names import output_names, scan_seed
from brainprior_bids.bids.query import Scan, subjects_without
from brainprior_bids.engine.acquisition import PLANES
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import ConformFacts
from brainprior_bids.run.jobs import Found, export_roots_of, exported_t1w, look_up, why_again
from brainprior_bids.run.preflight import checked_weights
from brainprior_bids.settings import Settings

TIMED = 64
"""Edge of the block, in voxels, whose network call is timed."""
BOX_MM = (192, 224, 192)
"""Largest box around a brain, its margins included, along right, anterior and superior."""
FUSED_SHARE = 0.5
"""Time of each further fused run over that of the network: 0.02 per iteration, 15 iterations, 3
solves in 2 levels (measured with two and three runs)."""
RUN_S = 60.0
"""Seconds of preprocessing for each fused run except the first."""
OTHER_S = 60.0
"""Seconds of all steps before and after the restoration; 20 to 60 s were measured."""


def print_plan(scans: Sequence[Scan], settings: Settings) -> None:
    """Print every scan's outputs, seed, time and memory; nothing is written."""
    from brainprior_bids.workflows.scan import claims_gb

    sampler = registry.find(settings.sampler)
    calls = settings.n_samples * sampler.calls(settings.n_steps)
    a_voxel = seconds_a_voxel(settings)
    total = 0.0
    refused = skipped = 0
    to_align: list[Result] = []
    to_fmriprep = exported_t1w(scans, settings)
    weights = {role: digest for role, (_, digest) in checked_weights(settings).items()}
    for scan in scans:
        seed = scan_seed(settings.random_seed, scan.name)
        print(f"{scan.relative}  {settings.task}, seed {seed}")
        try:
            found = look_up(scan, settings, weights)
            why = why_again(scan, found, settings, export_roots_of(scan, settings, to_fmriprep))
            if why is None:
                print("  done: it would be skipped")
                skipped += 1
                to_align.append(Result(scan.name, settings.image))
                continue
            if why:
                print(f"  {why}")
            voxels = _planned(scan, settings, found)
        except Exception as error:  # as `plan_jobs`: whatever it is, the others go on
            known = isinstance(error, BrainpriorError)
            print(f"  would fail: {error if known else f'{type(error).__name__}: {error}'}")
            refused += 1
            continue
        share = FUSED_SHARE * len(scan.runs) if scan.runs else sampler.solve_share
        seconds = OTHER_S + calls * voxels * a_voxel * (1 + share)
        seconds += RUN_S * len(scan.runs[1:])
        total += seconds
        print(f"  about {seconds / 60:.0f} min ({voxels / 1e6:.1f} million voxels)")
        to_align.append(Result(scan.name, settings.image))
        names = output_names(
            scan.name,
            n_samples=settings.n_samples,
            spaces=settings.output_spaces,
            save_samples=settings.save_samples,
            native=settings.output_grid == "native",
            image=settings.image,
            runs=[run.name for run in scan.runs[1:]],
            lesion="lesion" in found.given,
        )
        for name in names.values():
            print(f"  {scan.name.folder}/anat/{name}")
        if scan.name.stem in to_fmriprep:
            root = settings.exports["fmriprep"]
            for path in export.fmriprep_names(scan.name).values():
                print(f"  {root}/{path}")
        if "raw" in settings.exports:
            print(f"  {settings.exports['raw']}/{export.raw_name(scan.name)}")
    for name in contrast_names(to_align, settings):
        print(f"  {name}")
    for subject in subjects_without(scans, settings):
        print(f"sub-{readable(subject)}: no scan of it matches")
    to_do = len(scans) - refused - skipped
    memory = max(claims_gb(settings).values())
    at_once = (
        settings.n_gpu_procs if settings.use_gpu else settings.nprocs // settings.omp_nthreads
    )
    if not settings.low_mem:
        at_once = max(1, min(at_once, int(settings.mem_gb / memory), to_do))
    else:
        at_once = 1
    less = [(skipped, "would be skipped"), (refused, "would fail")]
    failing = ", of which " * any(n for n, _ in less)
    failing += " and ".join(f"{n} {what}" for n, what in less if n)
    print(
        f"{len(scans)} scan(s){failing}, {calls} network calls each ({settings.sampler} "
        f"sampler), on {settings.device}, {at_once} at once: about "
        f"{total / 60 / at_once:.0f} min and {at_once * memory:.0f} GiB of memory. "
        "One network call was timed for this; other running programs slow it down. Nothing was "
        "written."
    )


def contrast_names(results: Sequence[Result], settings: Settings) -> list[str]:
    """Paths of the transforms between the contrasts of a session, and of what they resample."""
    paths: list[str] = []
    for pair in pairs(results):
        own = pair.other.files(settings.n_samples, save_samples=settings.save_samples)
        paths += [*pair.transforms, *pair.on_reference(own, settings.output_spaces).values()]
    return paths


def _planned(scan: Scan, settings: Settings, found: Found) -> float:
    """Print the geometry of a scan and the other files that it uses.

    Returns
    -------
    1 mm voxels that the network sees of it, at most: its field of view, or a head's.
    """
    given = found.given
    for run, files in [(scan.runs[0] if scan.runs else scan, given), *found.others]:
        if scan.runs:
            print(f"  fuses {run.relative}")
        for file in files.values():
            print(f"  uses {file.uri}")
    voxels = 0.0
    alone = not settings.uses_scan  # then that image stands for the scan
    for run in scan.runs or (scan,):
        plane = settings.slice_plane
        taken = read_geometry(
            given["refined"].path if alone else run.path,
            metadata={} if alone else run.metadata,
            slice_thickness_mm=None if alone else settings.slice_thickness_mm,
            slice_axis=PLANES.index(plane) if plane is not None and not alone else None,
        )
        acquisition = taken.acquisition
        source = ConformFacts.from_json(taken.facts).acquisition.thickness_source
        print(
            f"  {' × '.join(str(n) for n in taken.grid.shape)} voxels of "
            f"{' × '.join(f'{size:.3g}' for size in taken.grid.spacing_mm)} mm; "
            f"{PLANES[acquisition.slice_axis]} slices, {acquisition.thickness_mm:.3g} mm thick "
            f"({source})"
        )
        for warning in (*run.warnings, *taken.warnings):
            print(f"  warning: {warning}")
        voxels = voxels or float(np.prod(np.minimum(taken.grid.extent_mm, BOX_MM)))
    return voxels


def seconds_a_voxel(settings: Settings) -> float:
    """Time of a network call on this machine, over its voxels."""
    import torch

    from brainprior_bids.engine.weights import load_prior

    if not settings.use_gpu:
        torch.set_num_threads(settings.omp_nthreads)
    device = "cpu" if settings.device == "auto" else settings.device  # a scheduler's job decides
    prior = load_prior(settings.prior, device=device)
    shape = (TIMED,) * 3
    x = torch.zeros((1, 1, *shape), device=device)
    coordinates = torch.zeros((3, *shape), device=device)
    taken = []
    for _ in range(4):  # the first one warms up, others may be disturbed
        start = time.monotonic()
        prior.denoise(x, 1.0, coordinates=coordinates, contrast="T1w").cpu()
        taken.append(time.monotonic() - start)
    return min(taken) / TIMED**3
