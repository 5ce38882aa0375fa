# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: what would be done for each scan, with time and memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from brainprior_bids.anatomy.conform import Geometry, read_geometry
from brainprior_bids.bids import export, status
from brainprior_bids.bids.contrasts import Pair, Result, pairs, record_path
from brainprior_bids.bids.files import readable
from brainprior_bids.bids.names import output_names, scan_seed
from brainprior_bids.bids.query import Scan, subjects_without
from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.grids import PLANES
from brainprior_bids.records import ConformFacts
from brainprior_bids.run.forecast import (
    ALIGN_S,
    BOX_MM,
    COMMAND_S,
    Sampling,
    expected_sampling,
    scan_seconds,
    seconds_per_voxel,
)
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

BUSY = 0.5
"""Load per processor above which the machine is called busy."""
ONLY_IN_THE_RUN = (
    "The samplers are chosen by headers, sidecars and options. Displaced slices, lost slices and "
    "interpolated voxels are found in the run only, and can change sampler and time."
)


@dataclass
class _Totals:
    """Sums over the scans of a plan.

    Attributes
    ----------
    seconds : float
        Time of all scans, one by one.
    results : list of (Result, bool)
        The results that there will be, and whether each has an uncertainty map.
    pending : set of str
        Titles of those that are not there yet.
    """

    seconds: float = 0.0
    calls: int = 0
    refused: int = 0
    skipped: int = 0
    conditioned: bool = False
    results: list[tuple[Result, bool]] = field(default_factory=list)
    pending: set[str] = field(default_factory=set)


def print_plan(scans: Sequence[Scan], settings: Settings) -> None:
    """Print every scan's outputs, seed, sampler, time and memory; nothing is written."""
    voxel_s = seconds_per_voxel(settings)
    totals = _Totals()
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
                totals.skipped += 1
                totals.results.append(_existing(scan, settings))
                continue
            if why:
                print(f"  {why}")
            _print_scan(scan, job, settings, voxel_s, totals)
        except Exception as error:  # as in `plan_jobs`: the other scans continue after any error
            known = isinstance(error, BrainpriorError)
            print(f"  would fail: {error if known else f'{type(error).__name__}: {error}'}")
            totals.refused += 1
            continue
        if scan.name.stem in to_fmriprep:
            root = settings.exports["fmriprep"]
            for path in export.fmriprep_names(scan.name).values():
                print(f"  {root}/{path}")
        if "raw" in settings.exports:
            print(f"  {settings.exports['raw']}/{export.raw_name(scan.name)}")
    new = pairs_to_align([result for result, _ in totals.results], totals.pending, settings)
    for pair in new:
        print(f"{pair.other.title} would be aligned with {pair.reference.title}")
    for name in contrast_names(totals.results, settings, through):
        print(f"  {name}")
    for subject in subjects_without(scans, settings):
        print(f"sub-{readable(subject)}: no scan matches the request")
    _print_totals(len(scans), len(new), totals, settings)


def _existing(scan: Scan, settings: Settings) -> tuple[Result, bool]:
    """The result of an earlier run, and whether it has an uncertainty map."""
    result = Result(scan.name, settings.image)
    summary = status.read_summary(settings.output_dir, result.title)
    outputs = () if summary is None else summary.outputs
    return result, any(path.endswith("_uncertainty.nii.gz") for path in outputs)


def _print_scan(
    scan: Scan, job: ScanInputs, settings: Settings, voxel_s: float, totals: _Totals
) -> None:
    """Print the geometry, inputs, sampler, time and outputs of a scan, and add it to the sums."""
    from brainprior_bids.workflows.scan import REGISTRATION_S

    geometry = _print_geometry(scan, settings, job)
    sampling = expected_sampling(
        geometry.grid,
        geometry.acquisition,
        settings,
        n_runs=len(scan.runs),
        any_hidden="lesion" in job.given,
        uneven_noise="trust" in job.given and not settings.uses_scan,
    )
    box_voxels = float(np.prod(np.minimum(geometry.grid.extent_mm, BOX_MM)))
    seconds = scan_seconds(
        sampling,
        box_voxels=box_voxels,
        scan_voxels=float(np.prod(geometry.grid.shape)),
        n_runs=len(scan.runs),
        n_samples=settings.n_samples,
        voxel_s=voxel_s,
    )
    seconds += REGISTRATION_S * len(job.templates)
    print(
        f"  sampler {sampler_words(sampling, settings.sampler)}, {sampling.calls} network calls, "
        f"about {minutes(seconds)} ({box_voxels / 1e6:.1f} million voxels)"
    )
    result = Result(scan.name, settings.image)
    uncertain = sampling.uncertainty is not None
    totals.seconds += seconds
    totals.calls += sampling.calls
    totals.conditioned |= sampling.sampler.given_data
    totals.results.append((result, uncertain))
    totals.pending.add(result.title)
    names = output_names(
        scan.name,
        n_samples=settings.n_samples,
        spaces=(*plain_spaces(settings), *job.templates),
        save_samples=settings.save_samples,
        native=settings.output_grid == "native",
        image=settings.image,
        runs=[run.name for run in scan.runs[1:]],
        lesion="lesion" in job.given,
        uncertainty=uncertain,
    )
    for name in names.values():
        print(f"  {scan.name.folder}/anat/{name}")


def sampler_words(sampling: Sampling, asked: str) -> str:
    """The name of a sampler, and why it is not the one that was requested, or the default."""
    if sampling.reason is None:
        return sampling.sampler.name
    other = "conditional" if asked == "auto" else asked
    return f"{sampling.sampler.name} (not {other}: {sampling.reason})"


def pairs_to_align(
    results: Sequence[Result], pending: Collection[str], settings: Settings
) -> list[Pair]:
    """The contrasts that a run would align: those of a new result, or never aligned before.

    Parameters
    ----------
    pending : collection of str
        Titles of the results that the run makes.
    """
    return [
        pair
        for pair in pairs(results)
        if {pair.reference.title, pair.other.title} & set(pending)
        or not record_path(settings.output_dir, pair).is_file()
    ]


def _print_totals(n_scans: int, n_aligned: int, totals: _Totals, settings: Settings) -> None:
    """Print the time and memory of the whole run."""
    from brainprior_bids.workflows.scan import claims_gb

    to_do = n_scans - totals.refused - totals.skipped
    memory = max(claims_gb(settings).values())
    at_once = (
        settings.n_gpu_procs if settings.use_gpu else settings.nprocs // settings.omp_nthreads
    )
    if not settings.low_mem:
        at_once = max(1, min(at_once, int(settings.mem_gb / memory), to_do))
    else:
        at_once = 1
    omitted = [(totals.skipped, "would be skipped"), (totals.refused, "would fail")]
    counts = ", of which " * any(n for n, _ in omitted)
    counts += " and ".join(f"{n} {what}" for n, what in omitted if n)
    around = COMMAND_S + ALIGN_S * n_aligned
    aligned = f", to align {n_aligned} contrast(s)" if n_aligned else ""
    print(
        f"{n_scans} scan(s){counts}, {totals.calls} network calls, on {settings.device}, "
        f"{at_once} at once: about {minutes(totals.seconds / at_once + around)} on an idle "
        f"machine, {minutes(around)} of them to start{aligned} and to write tables and reports, "
        f"and {at_once * memory:.0f} GiB of memory. One network call was timed for this. Nothing "
        "was written."
    )
    if totals.conditioned:
        print(ONLY_IN_THE_RUN)
    print(busy_now())


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
    results: Sequence[tuple[Result, bool]], settings: Settings, through: Collection[str]
) -> list[str]:
    """Paths of the transforms between the contrasts of a session, and of the resampled files.

    Parameters
    ----------
    results : sequence of (Result, bool)
        Each with whether it has an uncertainty map.
    through : collection of str
        Stems of the scans that reach the templates through a T1w.
    """
    paths: list[str] = []
    uncertain = {result.title for result, has_map in results if has_map}
    for pair in pairs([result for result, _ in results]):
        own = pair.other.files(
            settings.n_samples,
            save_samples=settings.save_samples,
            uncertainty=pair.other.title in uncertain,
        )
        paths += [*pair.transforms, *pair.on_reference(own, settings.output_spaces).values()]
        if pair.other.name.stem in through:
            for space in settings.template_spaces:
                paths += pair.on_template(own, space).values()
    return paths


def plain_spaces(settings: Settings) -> list[str]:
    """The output spaces that need no template."""
    return [space for space in settings.output_spaces if not is_template(space)]


def _print_geometry(scan: Scan, settings: Settings, inputs: ScanInputs) -> Geometry:
    """Print the geometry of a scan and the other files that it uses.

    Returns
    -------
    The geometry; of fused runs that of the reference.
    """
    given = inputs.given
    for run, files in [(scan.runs[0] if scan.runs else scan, given), *inputs.others]:
        if scan.runs:
            print(f"  fuses {run.relative}")
        for file in files.values():
            print(f"  uses {file.uri}")
    geometries = []
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
        geometries.append(geometry)
    return geometries[0]
