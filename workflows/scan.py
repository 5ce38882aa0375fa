# SPDX-License-Identifier: Apache-2.0
"""The workflow of one scan, from the raw image to its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import isdefined
from nipype.interfaces.utility import Merge
from nipype.pipeline import engine as pe

from brainprior_bids.anatomy.conform import LARGEST_VIEW_MM
from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.anatomy.templates import find_template
from brainprior_bids.bids.derivatives import bids_uri
from brainprior_bids.bids.export import parents
from brainprior_bids.bids.given import Given
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.samplers import registry
from brainprior_bids.interfaces.anatomy import N4, CentroidAffine, Conform, Parcellate, ToMNI305
from brainprior_bids.interfaces.derivatives import Reportlets, Write
from brainprior_bids.interfaces.export import Deliver, Export
from brainprior_bids.interfaces.fuse import Align
from brainprior_bids.interfaces.lesion import Lesion
from brainprior_bids.interfaces.restore import Restore
from brainprior_bids.interfaces.templates import ToTemplates
from brainprior_bids.settings import LOW_MEMORY_TILE_MM, Settings

MEMORY_GB = {
    "conform": 0.8,
    "parcellate": 2.0,
    "lesion": 0.8,
    "n4": 0.8,
    "align": 2.0,
    "affine": 0.6,
    "restore": 3.0,
    "mni305": 0.8,
    "templates": 1.5,
    "export": 1.5,
    "deliver": 0.6,
    "reportlets": 0.8,
    "write": 0.6,
}
"""Memory reserved for each node, in GiB, including the interpreter."""
WIDE_GB = {"parcellate": (0.9, 0.075), "restore": (2.2, 0.052)}
"""GiB, plus GiB per litre of the field of view; used if more than ``MEMORY_GB`` (4.6 and 4.8 GiB
were measured at 50 l)."""
RESTORE_IN_TILES_GB = 2.5
"""GiB reserved for ``restore`` with ``--low-mem``."""
SAMPLE_GB = 0.15
"""GiB that each sample adds from the fifth on."""

NODES = tuple(MEMORY_GB)
EXPORT_NODES = ("export", "deliver")
"""Nodes that only scans with an export have."""
REGISTRATION_S = 270.0
"""Seconds of one core for each template (``brainprior evaluate --study alignment``)."""


@dataclass(frozen=True)
class Job:
    """One scan to be restored, with the decisions made before the graph is built.

    Parameters
    ----------
    scan : Scan
    seed : int
        Seed of the scan, derived from that of the run.
    fingerprint : str
        SHA-256 over everything that determines the result.
    given : role -> Given
        Mask and labels from other data sets.
    exports : tuple of str
        The ``settings.exports`` that include this scan.
    others : sequence of (Scan, role -> Given)
        The runs that are fused with the scan, each with its own mask and labels.
    parts : name -> value or SHA-256
        The values from which the fingerprint was computed.
    templates : tuple of str
        Standard spaces to whose template the scan itself is registered.
    """

    scan: Scan
    seed: int
    fingerprint: str
    given: Mapping[str, Given] = field(default_factory=dict)
    exports: tuple[str, ...] = ()
    others: Sequence[tuple[Scan, Mapping[str, Given]]] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()


def claims_gb(settings: Settings, field_of_view_l: float = 0.0) -> dict[str, float]:
    """Node -> GiB reserved for it in this run, for a field of view of a head or larger."""
    claims = dict(MEMORY_GB)
    if not settings.template_spaces:
        del claims["templates"]
    if settings.low_mem:
        claims["restore"] = RESTORE_IN_TILES_GB
    for name, (least, per_litre) in WIDE_GB.items():
        claims[name] = max(claims[name], least + per_litre * field_of_view_l)
    claims["restore"] += SAMPLE_GB * max(0, settings.n_samples - 4)
    return claims


def field_of_view_l(path: Path) -> float:
    """Field of view in litres, from the header; 0 if ``conform`` will refuse the image."""
    try:
        header: Any = open_image(path, path.name).header
        size_mm = np.multiply(header.get_data_shape()[:3], header.get_zooms()[:3])
        return float(np.prod(size_mm)) / 1e6 if size_mm.max() <= LARGEST_VIEW_MM else 0.0
    except Exception:  # any error of nibabel: a quaternion, an offset, an extension
        return 0.0


def expected_work(settings: Settings) -> dict[str, float]:
    """Node -> expected seconds for a thin T1w on one core, for the progress bar."""
    calls = settings.n_samples * registry.find(settings.sampler).calls(
        settings.n_steps, simple=settings.simple
    )
    return {
        "conform": 1.0,
        "parcellate": 8.0,
        **({"lesion": 1.0} if settings.inpaints else {}),
        **({"n4": 10.0} if settings.uses_scan else {}),
        **({"align": 60.0} if settings.fuse else {}),
        "affine": 1.0,
        "restore": 4.0 * calls,
        "mni305": 2.0,
        **(
            {"templates": REGISTRATION_S * len(settings.template_spaces)}
            if settings.template_spaces
            else {}
        ),
        **({"export": 4.0, "deliver": 1.0} if settings.exports else {}),
        "reportlets": 8.0,
        "write": 4.0,
    }


def log_dir(settings: Settings, subject: str) -> Path:
    """Folder of a participant's settings and crash files of this run."""
    return settings.output_dir / f"sub-{subject}" / "log" / settings.run_uuid


def init_scan_wf(
    *, job: Job, settings: Settings, prior: Path, parcellation: Path, name: str
) -> pe.Workflow:
    """conform → parcellate → n4 → affine → restore → mni305 → templates → reportlets → write.

    With a lesion mask, ``lesion`` precedes n4, and the voxels that it hides are excluded from n4,
    align and restore. With other runs, ``align`` follows n4. Another tool's image alone needs no
    n4. For exports, restore → export → deliver precede write. ``templates`` exists only if the job
    has templates.

    Parameters
    ----------
    job : Job
        The scan; its image and metadata are the graph's only inputs.
    settings : Settings
        Settings of the run. ``restore`` is a GPU node only if ``settings.use_gpu``; on the CPU the
        nodes that compute take ``omp_nthreads`` processors.
    prior, parcellation : Path
        Weights.
    name : str
        Name of the workflow: letters, digits, underscore.

    Returns
    -------
    Workflow
        Its outputs are files in ``settings.output_dir``; ``write.outputs.summary`` names the
        scan's summary.
    """
    scan = job.scan
    threads = settings.omp_nthreads
    widest = max(field_of_view_l(s.path) for s in (scan, *(other for other, _ in job.others)))
    memory_gb = claims_gb(settings, widest)

    def node(interface: pe.nodes.Interface, name: str, *, threads: int = 1) -> pe.Node:
        interface.inputs.num_threads = threads
        result = pe.Node(
            interface, name=name, mem_gb=memory_gb[name], n_procs=threads, overwrite=settings.force
        )
        result.config = {"execution": {"crashdump_dir": str(log_dir(settings, scan.subject))}}
        return result

    metadata = dict(scan.metadata)
    if settings.field_strength_t is not None:
        metadata["MagneticFieldStrength"] = settings.field_strength_t
    given = job.given
    # with refine alone, the other tool's image is the scan, and its header describes the slices
    alone = not settings.uses_scan
    conform = node(
        Conform(in_file=str(given["refined"].path), metadata={})
        if alone
        else Conform(in_file=str(scan.path), metadata=metadata),
        "conform",
    )
    if scan.warnings and not alone:
        conform.inputs.warnings = list(scan.warnings)
    if settings.slice_thickness_mm is not None and not alone:
        conform.inputs.slice_thickness = settings.slice_thickness_mm
    if settings.slice_plane is not None and not alone:
        conform.inputs.slice_plane = settings.slice_plane
    # another tool's image is smooth by nature
    conform.inputs.effective_resolution = "off" if alone else settings.effective_resolution
    parcellate = node(
        Parcellate(
            weights=str(parcellation),
            skull_strip=settings.skull_strip,
            parcellation=settings.parcellation,
        ),
        "parcellate",
        threads=threads,
    )
    if settings.synthstrip_model is not None:
        parcellate.inputs.synthstrip_model = str(settings.synthstrip_model)
    for role in {"mask", "dseg"} & set(given):
        file = given[role]
        parcellate.inputs.trait_set(**{f"{role}_file": str(file.path), f"{role}_uri": file.uri})
    lesion = None
    if "lesion" in given:
        lesion = node(
            Lesion(lesion=str(given["lesion"].path), dilate_mm=settings.dilate_mm), "lesion"
        )
    n4 = None if alone else node(N4(), "n4", threads=threads)
    affine = node(CentroidAffine(), "affine")
    restore = node(
        Restore(
            prior=str(prior),
            contrast=scan.contrast,
            sampler=settings.sampler,
            n_samples=settings.n_samples,
            **({} if settings.n_steps is None else {"n_steps": settings.n_steps}),
            keep_scan=settings.fills_scan,
            native=settings.output_grid == "native",
            save_samples=settings.save_samples,
            seed=job.seed,
            device=settings.device,
            use_gpu=settings.use_gpu,
        ),
        "restore",
        # a GPU node takes n_procs GPU slots: one
        threads=1 if settings.use_gpu else threads,
    )
    if settings.low_mem:
        restore.inputs.tile_mm = LOW_MEMORY_TILE_MM
    if "refined" in given and not alone:
        restore.inputs.refined = str(given["refined"].path)
    if settings.refines and settings.trust_sd is not None:
        restore.inputs.trust = settings.trust_sd
    if "trust" in given:
        restore.inputs.trust_map = str(given["trust"].path)
    align = None
    if job.others:
        align = node(
            Align(
                name=scan.runs[0].name.stem,
                runs=[
                    _other(run, files, conform.inputs, parcellate.inputs, settings, job.parts)
                    for run, files in job.others
                ],
            ),
            "align",
            threads=threads,
        )
    mni305 = node(ToMNI305(), "mni305")
    templates = None
    if job.templates:
        templates = _templates_node(node, job, settings, threads)
    reportlets = node(
        Reportlets(name=scan.name.stem, image_desc=settings.image, viewer=settings.viewer),
        "reportlets",
    )
    write = node(
        Write(
            name=scan.name.stem,
            image_desc=settings.image,
            source_file=str(scan.path),
            relative=str(scan.relative),
            metadata=metadata,
            given={
                role: {"path": str(file.path), "uri": file.uri}
                for role, file in given.items()
                if role not in ("mask", "dseg")  # recorded by the node that uses them
            }
            | _of_others(job.others),
            output_dir=str(settings.output_dir),
            settings=settings.scan_settings(),
            seed=job.seed,
            fingerprint=job.fingerprint,
            parts=dict(job.parts),
            run_uuid=settings.run_uuid,
            command=list(settings.command),
        ),
        "write",
    )
    records = pe.Node(Merge(12), name="records", run_without_submitting=True)

    workflow = pe.Workflow(name=name)
    # fmt: off
    workflow.connect([
        (conform, parcellate, [("out_file", "in_file"), ("conform_json", "conform_json")]),
        (conform, affine, [("out_file", "in_file")]),
        (parcellate, affine, [("structures_json", "structures_json"), ("mask", "mask")]),
        (conform, restore, [("out_file", "in_file"), ("conform_json", "conform_json")]),
        (affine, restore, [("affine_json", "affine_json")]),
        (restore, mni305, [("restored", "in_file")]),
        (affine, mni305, [("affine_json", "affine_json")]),
        *[link for last in (reportlets, write) for link in (
            (conform, last, [("out_file", "scan"), ("conform_json", "conform_json")]),
            (parcellate, last, [("structures", "structures"),
                                ("structures_json", "structures_json")]),
            (affine, last, [("affine_json", "affine_json")]),
            (restore, last, [("restored", "restored"), ("uncertainty", "uncertainty"),
                             ("image", "image"), ("residual", "residual"),
                             ("log_bias", "log_bias"),
                             ("restore_json", "restore_json")]),
            (mni305, last, [("out_file", "restored_mni305")]),
        )],
        *([] if "MNI305" not in settings.output_spaces else [
            (parcellate, mni305, [("structures", "structures")]),
            (align or parcellate, mni305, [("mask", "mask")]),
            *([] if settings.fills_scan else [
                (restore, mni305, [("uncertainty", "uncertainty"), ("samples", "samples")]),
            ]),
            (mni305, write, [("uncertainty", "uncertainty_mni305"), ("mask", "mask_mni305"),
                             ("structures", "structures_mni305"),
                             ("samples", "samples_mni305")]),
        ]),
        (parcellate, write, [("mask_scan", "mask_scan")]),
        (parcellate, restore, [("structures_json", "structures_json")]),
        (align or parcellate, write, [("mask", "mask")]),
        (affine, write, [("to_mni305", "to_mni305"), ("from_mni305", "from_mni305")]),
        (restore, write, [("samples", "samples"), ("restored_native", "restored_native")]),
        (reportlets, write, [("figures", "figures"), ("tissues_json", "tissues_json")]),
        (conform, records, [("record", "in1")]),
        (parcellate, records, [("record", "in2")]),
        (affine, records, [("record", "in4")]),
        (restore, records, [("record", "in5")]),
        (mni305, records, [("record", "in6")]),
        (reportlets, records, [("record", "in7")]),
        (records, write, [("out", "records")]),
    ])
    if n4 is not None:
        masked = (parcellate, "mask_scan") if lesion is None else (lesion, "measured")
        workflow.connect([
            (conform, n4, [("out_file", "in_file"), ("conform_json", "conform_json")]),
            (masked[0], n4, [(masked[1], "mask_scan")]),
            (parcellate, n4, [("structures_json", "structures_json")]),
            (n4, restore, [("log_bias", "log_bias"), ("bias_json", "bias_json")]),
            *[(n4, last, [("bias_json", "bias_json")]) for last in (reportlets, write)],
            (n4, records, [("record", "in3")]),
        ])
    brain = lesion or parcellate
    workflow.connect([
        *[link for user in (restore, reportlets) for link in (
            (brain, user, [("mask_scan", "mask_scan")]),
            (align or brain, user, [("mask", "mask")]),
        )],
    ])
    if lesion is not None:
        workflow.connect([
            (conform, lesion, [("out_file", "in_file")]),
            (parcellate, lesion, [("mask", "mask"), ("mask_scan", "mask_scan")]),
            *[(lesion, user, [("hidden", "hidden")])
              for user in (restore, reportlets, *([] if align is None else [align]))],
            (lesion, write, [("hidden", "hidden"), ("lesion_json", "lesion_json")]),
            (lesion, records, [("record", "in8")]),
        ])
    if templates is not None:
        workflow.connect([
            (restore, templates, [("restored", "in_file")]),
            (affine, templates, [("affine_json", "affine_json")]),
            (parcellate, templates, [("structures", "structures")]),
            (align or parcellate, templates, [("mask", "mask")]),
            *([] if settings.fills_scan else [
                (restore, templates, [("uncertainty", "uncertainty"), ("samples", "samples")]),
            ]),
            (templates, write, [("files", "template_files"), ("roles", "template_roles"),
                                ("templates_json", "templates_json")]),
            (templates, records, [("record", "in12")]),
        ])
    if align is not None:
        workflow.connect([
            (conform, align, [("out_file", "in_file"), ("conform_json", "conform_json")]),
            (brain, align, [("mask", "mask")]),
            (parcellate, align, [("structures_json", "structures_json")]),
            (n4, align, [("log_bias", "log_bias")]),
            *[(align, user, [("runs_json", "runs_json")]) for user in (restore, write)],
            (restore, write, [("run_residuals", "run_residuals")]),
            (align, records, [("record", "in11")]),
        ])
    # fmt: on
    if not job.exports:
        return workflow
    export = node(Export(tissues="fmriprep" in job.exports), "export")
    deliver = node(
        Deliver(
            source_file=str(scan.path),
            relative=str(scan.relative),
            metadata=metadata,
            fingerprint=job.fingerprint,
            exports={kind: settings.exports[kind] for kind in job.exports},
            per=settings.export_per,
            made_from=parents(scan.name, settings.image),
        ),
        "deliver",
    )
    # fmt: off
    workflow.connect([
        (conform, export, [("out_file", "scan"), ("conform_json", "conform_json")]),
        *([] if n4 is None else [(n4, export, [("bias_json", "bias_json")])]),
        (parcellate, export, [("structures", "structures")]),
        (brain, export, [("mask", "mask"), ("mask_scan", "mask_scan")]),
        (restore, export, [("restored", "restored"), ("log_bias", "log_bias")]),
        (brain, deliver, [("mask", "mask")]),
        (export, deliver, [("head", "head"), ("dseg", "dseg"), ("gm", "gm"), ("wm", "wm"),
                           ("csf", "csf"), ("export_json", "export_json")]),
        (export, records, [("record", "in9")]),
        (deliver, records, [("record", "in10")]),
    ])
    # fmt: on
    return workflow


def _templates_node(
    node: Callable[..., pe.Node], job: Job, settings: Settings, threads: int
) -> pe.Node:
    """The registration of the restored brain to the job's templates."""
    templates = [find_template(space) for space in job.templates]
    interface = ToTemplates(
        contrast=job.scan.name.suffix,
        spaces=list(job.templates),
        images=[str(template.image) for template in templates],
        masks=[str(template.mask) for template in templates],
        sloppy=settings.sloppy,
        brain_only=settings.fills_scan,
    )
    return node(interface, "templates", threads=threads)


def _of_others(others: Sequence[tuple[Scan, Mapping[str, Given]]]) -> dict[str, dict[str, str]]:
    """The other runs and their lesion masks, for the records: name -> path and URI."""
    files = {}
    for run, given in others:
        uri = bids_uri(str(run.relative), dataset="raw")
        files[run.name.stem] = {"path": str(run.path), "uri": uri}
        if "lesion" in given:
            lesion = given["lesion"]
            files[f"lesion of {run.name.stem}"] = {"path": str(lesion.path), "uri": lesion.uri}
    return files


def _other(
    run: Scan,
    given: Mapping[str, Given],
    conform: Any,
    parcellate: Any,
    settings: Settings,
    parts: Mapping[str, str],
) -> dict[str, Any]:
    """One run for Align: the reference's settings, its own files.

    Nipype hashes the table of runs, not the files named in it; therefore it contains their
    SHA-256, from the fingerprint's ``parts``.
    """
    metadata = dict(run.metadata)
    if settings.field_strength_t is not None:
        metadata["MagneticFieldStrength"] = settings.field_strength_t
    own = {"in_file": str(run.path), "metadata": metadata}
    for name in ("slice_thickness", "slice_plane", "effective_resolution"):
        if isdefined(getattr(conform, name)):
            own[name] = getattr(conform, name)
    same = ("weights", "skull_strip", "parcellation", "synthstrip_model")
    brain = {name: getattr(parcellate, name) for name in same}
    brain = {name: value for name, value in brain.items() if isdefined(value)}
    for role in {"mask", "dseg"} & set(given):
        brain |= {f"{role}_file": str(given[role].path), f"{role}_uri": given[role].uri}
    request = {"name": run.name.stem, "conform": own, "parcellate": brain}
    if "lesion" in given:
        path = str(given["lesion"].path)
        request["lesion"] = {"lesion": path, "dilate_mm": settings.dilate_mm}
    hashes = {what: value for what, value in parts.items() if what.endswith(run.name.stem)}
    return {**request, "hashes": hashes}
