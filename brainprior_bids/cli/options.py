# SPDX-License-Identifier: Apache-2.0
"""The options of the main command, in the groups of ``--help``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.cli.values import (
    derivative_root,
    device_name,
    distance,
    effective_resolution,
    export_kind,
    memory_gb,
    positive_float,
    positive_int,
    seed,
    space_name,
)
from brainprior_bids.engine.grids import PLANES
from brainprior_bids.engine.samplers import registry
from brainprior_bids.run.resources import MAIN_GB
from brainprior_bids.settings import (
    EXPORT_PER,
    FUSE,
    LOW_MEMORY_TILE_MM,
    MODALITIES,
    OTHER_MODALITIES,
    OUTPUT_GRIDS,
    PARCELLATIONS,
    SKULL_STRIPS,
)

WORDS = ("restore", "inpaint", "refine")
WORK_DIR = ".brainprior_work"
SLOPPY = {"n_samples": 1, "n_steps": 3}

Group = argparse._ArgumentGroup


class _Append(argparse.Action):
    """Append the values of an option to those of an earlier occurrence."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or ()), *values])


def query_options(group: Group) -> None:
    """Which scans."""
    group.add_argument(
        "--skip-bids-validation",
        "--skip_bids_validation",
        action="store_true",
        help="skip validation of the requested part of bids_dir by bids-validator-deno",
    )
    group.add_argument(
        "--participant-label",
        "--participant_label",
        nargs="+",
        action=_Append,
        default=[],
        metavar="LABEL",
        help="participants to process, with or without 'sub-' (default: all)",
    )
    group.add_argument(
        "--session-label",
        "--session-id",
        nargs="+",
        action=_Append,
        default=[],
        metavar="LABEL",
        help="sessions to process, with or without 'ses-' (default: all)",
    )
    group.add_argument(
        "--run-id",
        nargs="+",
        action=_Append,
        default=[],
        metavar="INDEX",
        help="runs to process, with or without 'run-' (default: all)",
    )
    group.add_argument(
        "-m",
        "--modalities",
        nargs="+",
        action=_Append,
        default=[],
        metavar="SUFFIX",
        help=f"contrasts to process: {', '.join(MODALITIES)} (default: all three), or "
        f"{', '.join(OTHER_MODALITIES)}, on which the prior was not trained (UNIT1 of an MP2RAGE "
        "is processed as a T1w)",
    )
    group.add_argument(
        "--ignore",
        nargs="+",
        action=_Append,
        default=[],
        choices=[suffix.lower() for suffix in MODALITIES],
        metavar="{" + ",".join(suffix.lower() for suffix in MODALITIES) + "}",
        help="contrasts to exclude (names as in fMRIPrep)",
    )
    group.add_argument(
        "--bids-filter-file",
        type=Path,
        metavar="FILE",
        help='JSON with one pybids query per contrast: {"t1w": {"acquisition": "mprage", '
        '"session": null}}; null: the entity must be absent, "*": it must be present',
    )
    group.add_argument(
        "-d",
        "--derivatives",
        nargs="+",
        action=_Append,
        type=derivative_root,
        default=[],
        metavar="NAME=PATH",
        help="other derivative data sets and their names; linked in dataset_description.json. "
        "A path without a name takes the name of its folder",
    )
    group.add_argument(
        "--bids-database-dir",
        type=Path,
        metavar="DIR",
        help="folder of pybids' index of bids_dir: created on first use, then reused. It is not "
        "updated: remove it if the data set has changed",
    )


def task_options(group: Group) -> None:
    """What is done with a scan."""
    group.add_argument(
        "--task",
        nargs="+",
        choices=WORDS,
        default=["restore"],
        help="one or several. restore (default): estimate a 1 mm brain without bias field; "
        "inpaint: ignore the scan under its lesion mask (without restore: fill in the masked "
        "region and keep every other voxel of the scan); refine: use another tool's image from "
        "--derivatives, with an error of --trust, together with the scan or in place of it",
    )
    group.add_argument(
        "--fuse",
        choices=FUSE,
        help="runs: align scans of one participant, session and contrast that differ only in run- "
        "and acq- (crossed stacks, repeated scans) and estimate one result from all of them. Its "
        "name drops both entities. Not with --task refine alone",
    )
    group.add_argument(
        "--lesion-mask",
        metavar="PATTERN",
        help="path of the lesion masks, absolute or relative to bids_dir, with {subject}, "
        "{session}, {suffix}, {stem} and * (default: label-lesion_mask in --derivatives, then "
        "label-lesion_roi in anat/)",
    )
    group.add_argument(
        "--dilate",
        dest="dilate_mm",
        type=distance,
        default=0.0,
        metavar="MM",
        help="dilate the lesion mask by MM (default: no dilation)",
    )
    group.add_argument(
        "--trust",
        metavar="SD|PATTERN",
        help="for --task refine: SD of the error of the other tool's image, as a fraction of the "
        "brain's 99th percentile (0.05: 5 %%), or the path of an error map (as --lesion-mask)",
    )
    group.add_argument(
        "--sampler",
        choices=registry.NAMES,
        default="auto",
        help=f"auto (default): {registry.DEFAULT.name} where applicable, otherwise "
        f"{registry.FALLBACK.name}; "
        + "; ".join(f"{name}: {facts.help}" for name, facts in registry.SAMPLERS.items()),
    )
    group.add_argument(
        "--n-samples",
        type=positive_int,
        metavar="N",
        help="number of posterior samples; the image is an average over them (default: 4). If the "
        "network cannot predict the uncertainty map, it is the SD of the samples, and with 1 "
        "sample there is none",
    )
    group.add_argument(
        "--slice-thickness",
        dest="slice_thickness_mm",
        type=positive_float,
        metavar="MM",
        help="slice thickness in mm, if missing or wrong in the sidecars",
    )
    group.add_argument(
        "--effective-resolution",
        type=effective_resolution,
        metavar="{auto,off,MM,MM,MM}",
        help="measured voxel size in mm along the left-right, back-front and bottom-top axes (0: "
        "as stored), for scans that were interpolated to smaller voxels (default: auto, estimated "
        "from the image; off: use every scan as stored)",
    )
    group.add_argument(
        "--slice-plane",
        choices=PLANES,
        help="plane of the slices, if missing or wrong in header and sidecars; voxel sizes and "
        "slice spacing are always read from the image: correct its header instead",
    )
    group.add_argument(
        "--field-strength",
        dest="field_strength_t",
        type=positive_float,
        metavar="TESLA",
        help="field strength, if missing or wrong in the sidecars; recorded in the provenance "
        "only",
    )
    group.add_argument(
        "--prior",
        type=Path,
        metavar="FILE|NAME",
        help="weights of the prior: a file, or a name from `brainprior weights list` "
        "(default: embedded)",
    )
    group.add_argument(
        "--random-seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the run; each scan's seed is derived from it and from the scan's name, so "
        "that its result does not depend on the other scans (default: 0)",
    )
    group.add_argument(
        "--sloppy",
        action="store_true",
        help=f"for testing only: {SLOPPY['n_samples']} sample of {SLOPPY['n_steps']} steps, and a "
        "coarse registration to standard spaces",
    )


def anatomy_options(group: Group) -> None:
    """Where brain mask and structures come from."""
    group.add_argument(
        "--skull-strip",
        choices=SKULL_STRIPS,
        default="embedded",
        help="embedded (default): the embedded network, or the scan's own edge if it is already "
        "skull-stripped; synthstrip: SynthStrip, if installed; skip: treat every scan as "
        "skull-stripped; mask: use desc-brain_mask from a data set of --derivatives",
    )
    group.add_argument(
        "--synthstrip-model",
        type=Path,
        metavar="FILE",
        help="weights for --skull-strip synthstrip; required by nipreps-synthstrip",
    )
    group.add_argument(
        "--parcellation",
        choices=PARCELLATIONS,
        default="embedded",
        help="embedded (default): the embedded network; synthseg: FreeSurfer's mri_synthseg, if "
        "installed; derivatives: a dseg with FreeSurfer's label values (desc-aseg …) from a "
        "data set of --derivatives",
    )


def output_options(group: Group) -> None:
    """What is written."""
    group.add_argument(
        "--save-samples",
        action="store_true",
        help="also write each sample (desc-restoredSample01 …), with its seed and its residual",
    )
    group.add_argument(
        "--no-viewer",
        action="store_true",
        help="do not write the pages that show a result in three linked planes (about 20 MB per "
        "scan)",
    )
    group.add_argument(
        "--output-spaces",
        nargs="+",
        action=_Append,
        type=space_name,
        default=[],
        metavar="SPACE",
        help="anat (the scan's own frame, always written) and MNI305 (default: both); T1w: also "
        "the other contrasts of a session on the grid of its T1w; "
        "a template of TemplateFlow, such as MNI152NLin2009cAsym or MNIPediatricAsym:cohort-3: "
        "nonlinear registration to it; it must be in TemplateFlow's folder (never downloaded)",
    )
    group.add_argument(
        "--output-grid",
        choices=OUTPUT_GRIDS,
        default="1mm",
        help="1mm (default), or native: in addition to the 1 mm brain, the whole head on the "
        "scan's own voxels (res-native): inside the brain the result's prediction, elsewhere the "
        "scan itself",
    )
    group.add_argument(
        "--export",
        dest="exports",
        nargs="+",
        action=_Append,
        type=export_kind,
        default=[],
        metavar="{fmriprep,raw}[=DIR]",
        help="data sets for other programs, each in its own folder (default: output_dir with "
        "-fmriprep or -raw appended). fmriprep: whole heads with the restored brain, masks and "
        "tissues, for fMRIPrep's --derivatives; raw: the same heads as rec-brainprior, with func "
        "and fmap linked",
    )
    group.add_argument(
        "--export-per",
        choices=EXPORT_PER,
        default="subject",
        help="for --export fmriprep: one T1w per subject (default) or per session (for fMRIPrep's "
        "--subject-anatomical-reference sessionwise); the one with the thinnest slices is used",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="process finished scans again, without reusing the work folder",
    )


def performance_options(group: Group) -> None:
    """Processors, memory, devices."""
    group.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="{auto,cpu,cuda[:N]}",
        help="device of the networks (default: auto: a GPU if available)",
    )
    group.add_argument(
        "--n-gpu-procs",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of simultaneous restorations on the GPU (default: 1)",
    )
    group.add_argument(
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        "--n_cpus",
        type=positive_int,
        metavar="N",
        help="processors for all steps together (default: all available to this process)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=positive_int,
        metavar="N",
        help="threads per step (default: --nprocs, at most 8); results are reproducible bit by "
        "bit on the same machine with the same number of threads",
    )
    group.add_argument(
        "--mem",
        "--mem-mb",
        "--mem_mb",
        dest="mem_gb",
        type=memory_gb,
        metavar="SIZE",
        help="memory for all steps together: 8G, 8000M, 8000 (MB) "
        "(default: nine tenths of the memory of the machine, container or job, leaving at least "
        f"{MAIN_GB:g} GiB)",
    )
    group.add_argument(
        "--low-mem",
        action="store_true",
        help="never use more memory at once than the largest step needs, and run the prior in "
        f"tiles of {LOW_MEMORY_TILE_MM} mm (same result up to rounding)",
    )
    group.add_argument(
        "--use-plugin",
        "--nipype-plugin-file",
        dest="plugin_file",
        type=Path,
        metavar="FILE",
        help="YAML file with one of Nipype's execution plugins, its plugin_args, and step_args "
        "for single steps (default: a fault-tolerant MultiProc)",
    )


def subset_options(group: Group) -> None:
    """Partial runs."""
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be done for each scan, with memory, the time on an idle machine, "
        "and how busy this one is; write nothing. One network call is timed for this",
    )
    only.add_argument(
        "--boilerplate-only",
        "--boilerplate_only",
        action="store_true",
        help="write the methods text of this command line to logs/CITATION.*, and stop",
    )
    only.add_argument(
        "--reports-only",
        action="store_true",
        help="rebuild reports and tables from the existing results, and stop",
    )


def other_options(group: Group) -> None:
    """Folders, logs, and the end of a run."""
    group.add_argument("--version", action="version", version=f"brainprior {__version__}")
    group.add_argument(
        "-v",
        "--verbose",
        dest="verbose",
        action="count",
        default=0,
        help="more output: -v tracebacks, -vv also Nipype's messages",
    )
    group.add_argument(
        "-w",
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="folder of intermediate files, from which a later run resumes "
        f"(default: {WORK_DIR}, hidden in output_dir)",
    )
    group.add_argument(
        "--clean-workdir",
        action="store_true",
        help="first remove the files of earlier runs from the work folder, and no others",
    )
    group.add_argument(
        "--config-file",
        type=Path,
        metavar="FILE",
        help="settings of an earlier run (sub-XX/log/RUN/brainprior.toml), or some of them; "
        "command-line options take precedence. Folders and analysis level are not read from it",
    )
    group.add_argument(
        "--resource-monitor",
        action="store_true",
        help="write processor and memory usage to logs/RUN_resources.tsv every second "
        "(time and peak memory of every step are always recorded)",
    )
    group.add_argument(
        "--write-graph",
        action="store_true",
        help="write the graph of the steps to logs/ (an SVG where Graphviz is installed)",
    )
    group.add_argument(
        "--job-id",
        metavar="ID",
        help="the scheduler's job number, as passed by slurm-script. participant: recorded in the "
        "status of running scans (default: Slurm's own); group: this job has ended, so mark scans "
        "that are still running or waiting under it, and those of --participant-label that it "
        "never started, as failed",
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop the run when a scan fails"
    )
    group.add_argument(
        "--debug",
        action="store_true",
        help="run the steps one by one in this process, with tracebacks; stop at the first crash",
    )
    group.add_argument(
        "--notrack",
        action="store_true",
        help="accepted for compatibility: brainprior sends nothing anywhere",
    )
