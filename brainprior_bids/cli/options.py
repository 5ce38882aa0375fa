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
    export_kind,
    memory_gb,
    positive_float,
    positive_int,
    seed,
    space_name,
)
from brainprior_bids.engine.acquisition import PLANES
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
    """Values after an option, added to those of an earlier one of the same name."""

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
        help="do not run bids-validator-deno on the requested part of bids_dir",
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
        help=f"contrasts to process, of {', '.join(MODALITIES)} (default: all three), and, "
        f"outside of what the prior was trained on, {', '.join(OTHER_MODALITIES)}",
    )
    group.add_argument(
        "--ignore",
        nargs="+",
        action=_Append,
        default=[],
        choices=[suffix.lower() for suffix in MODALITIES],
        metavar="{" + ",".join(suffix.lower() for suffix in MODALITIES) + "}",
        help="contrasts to leave out, as fMRIPrep names them",
    )
    group.add_argument(
        "--bids-filter-file",
        type=Path,
        metavar="FILE",
        help='JSON with a pybids query a contrast: {"t1w": {"acquisition": "mprage", '
        '"session": null}}; null: the entity is absent, "*": it is present',
    )
    group.add_argument(
        "-d",
        "--derivatives",
        nargs="+",
        action=_Append,
        type=derivative_root,
        default=[],
        metavar="NAME=PATH",
        help="other derivative data sets, by name; linked in dataset_description.json. A path "
        "alone is named after its folder",
    )
    group.add_argument(
        "--bids-database-dir",
        type=Path,
        metavar="DIR",
        help="keep pybids' index of bids_dir here: made on first use, then read. It is not "
        "brought up to date: remove it when the data set changed",
    )


def task_options(group: Group) -> None:
    """What is done with a scan."""
    group.add_argument(
        "--task",
        nargs="+",
        choices=WORDS,
        default=["restore"],
        help="one word, or any of them together. restore (default): a 1 mm brain without bias "
        "field; inpaint: exclude the scan under its lesion mask; without restore, fill the hole "
        "and keep every other voxel of the scan; refine: use another tool's image in "
        "--derivatives, within --trust: together with the scan, or alone in place of it",
    )
    group.add_argument(
        "--fuse",
        choices=FUSE,
        help="runs: scans of one participant, session and contrast that differ in run- and acq- "
        "alone (crossed stacks, repeated scans) are aligned and enter one result, whose name "
        "drops both entities; with every task but refine alone",
    )
    group.add_argument(
        "--lesion-mask",
        metavar="PATTERN",
        help="path of the lesion masks, absolute or from bids_dir, with {subject}, {session}, "
        "{suffix}, {stem} and * (default: label-lesion_mask in --derivatives, then "
        "label-lesion_roi in anat/)",
    )
    group.add_argument(
        "--dilate",
        dest="dilate_mm",
        type=distance,
        default=0.0,
        metavar="MM",
        help="widen the lesion mask by so much (default: not)",
    )
    group.add_argument(
        "--trust",
        metavar="SD|PATTERN",
        help="for --task refine: SD of the error of the image to refine, as a share of the "
        "brain's 99th percentile (0.05: to 5 %%), or the path of a map of it (as --lesion-mask)",
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
        help="posterior samples, from which the image and its uncertainty come "
        "(default: 4; with 1 there is no uncertainty map)",
    )
    group.add_argument(
        "--slice-thickness",
        dest="slice_thickness_mm",
        type=positive_float,
        metavar="MM",
        help="slice thickness in mm, where the sidecars lack it or are wrong",
    )
    group.add_argument(
        "--slice-plane",
        choices=PLANES,
        help="plane of the slices, where header and sidecars lack it or are wrong; voxel sizes "
        "and the distance between slices are always the image's: repair its header instead",
    )
    group.add_argument(
        "--field-strength",
        dest="field_strength_t",
        type=positive_float,
        metavar="TESLA",
        help="field strength, where the sidecars lack it or are wrong; recorded, no more",
    )
    group.add_argument(
        "--prior",
        type=Path,
        metavar="FILE|NAME",
        help="weights of the prior: a file, or a name of `brainprior weights list` "
        "(default: embedded)",
    )
    group.add_argument(
        "--random-seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the run; each scan's own is derived from it and from the scan's name, so "
        "a scan's result does not depend on the others (default: 0)",
    )
    group.add_argument(
        "--sloppy",
        action="store_true",
        help=f"for testing only: {SLOPPY['n_samples']} sample of {SLOPPY['n_steps']} steps",
    )


def anatomy_options(group: Group) -> None:
    """Where brain mask and structures come from."""
    group.add_argument(
        "--skull-strip",
        choices=SKULL_STRIPS,
        default="embedded",
        help="embedded (default): our network, and the scan's own edge where it is already "
        "skull-stripped; synthstrip: SynthStrip, if installed; skip: every scan is "
        "skull-stripped; mask: desc-brain_mask of a data set of --derivatives",
    )
    group.add_argument(
        "--synthstrip-model",
        type=Path,
        metavar="FILE",
        help="weights for --skull-strip synthstrip; nipreps-synthstrip needs them",
    )
    group.add_argument(
        "--parcellation",
        choices=PARCELLATIONS,
        default="embedded",
        help="embedded (default): our network; synthseg: FreeSurfer's mri_synthseg, if "
        "installed; derivatives: a dseg with FreeSurfer's values (desc-aseg …) of a data set of "
        "--derivatives",
    )


def output_options(group: Group) -> None:
    """What is written."""
    group.add_argument(
        "--save-samples",
        action="store_true",
        help="write each sample too (desc-restoredSample01 …), with its seed and its misfit",
    )
    group.add_argument(
        "--output-spaces",
        nargs="+",
        action=_Append,
        type=space_name,
        default=[],
        metavar="SPACE",
        help="anat (the scan's own frame, always written) and MNI305 (default: both). Other "
        "templates need a nonlinear registration: hand the result on to fMRIPrep",
    )
    group.add_argument(
        "--output-grid",
        choices=OUTPUT_GRIDS,
        default="1mm",
        help="1mm (default), or native: beside the 1 mm brain the whole head on the scan's own "
        "voxels (res-native), the brain as the result predicts it, every other voxel the scan's",
    )
    group.add_argument(
        "--export",
        dest="exports",
        nargs="+",
        action=_Append,
        type=export_kind,
        default=[],
        metavar="{fmriprep,raw}[=DIR]",
        help="data sets for other programs, each in a root of its own (default: output_dir with "
        "-fmriprep or -raw behind it). fmriprep: derivatives for its --derivatives, whole heads "
        "with the restored brain, masks and tissues; raw: the same heads as rec-brainprior, with "
        "func and fmap linked",
    )
    group.add_argument(
        "--export-per",
        choices=EXPORT_PER,
        default="subject",
        help="--export fmriprep: one T1w a subject (default), or one a session, for fMRIPrep's "
        "--subject-anatomical-reference sessionwise; the one with the thinnest slices is taken",
    )
    group.add_argument(
        "--force", action="store_true", help="redo scans that are done, work folder included"
    )


def performance_options(group: Group) -> None:
    """Processors, memory, devices."""
    group.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="{auto,cpu,cuda[:N]}",
        help="where the networks run (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--n-gpu-procs",
        type=positive_int,
        default=1,
        metavar="N",
        help="restorations at once on the GPU (default: 1)",
    )
    group.add_argument(
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        "--n_cpus",
        type=positive_int,
        metavar="N",
        help="processors for all steps together (default: all that this process may use)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=positive_int,
        metavar="N",
        help="threads of one step (default: --nprocs, at most 8); results are reproducible bit "
        "by bit for one machine and one number of threads",
    )
    group.add_argument(
        "--mem",
        "--mem-mb",
        "--mem_mb",
        dest="mem_gb",
        type=memory_gb,
        metavar="SIZE",
        help="memory that the steps may claim together: 8G, 8000M, 8000 (MB) "
        "(default: nine tenths of what the machine, the container or the job has, and at least "
        f"{MAIN_GB:g} GiB less than that)",
    )
    group.add_argument(
        "--low-mem",
        action="store_true",
        help="never claim more memory at once than the largest step needs, and run the prior in "
        f"tiles of {LOW_MEMORY_TILE_MM} mm (same result up to rounding)",
    )
    group.add_argument(
        "--use-plugin",
        "--nipype-plugin-file",
        dest="plugin_file",
        type=Path,
        metavar="FILE",
        help="YAML with one of Nipype's execution plugins and its plugin_args, and step_args for "
        "single steps (default: a MultiProc that survives killed workers)",
    )


def subset_options(group: Group) -> None:
    """Less than a whole run."""
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done, scan by scan, with time and memory; write nothing. One "
        "network call is timed for it",
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
        help="write the reports and tables of what is done again, and stop",
    )


def other_options(group: Group) -> None:
    """Folders, logs, and how a run ends."""
    group.add_argument("--version", action="version", version=f"brainprior {__version__}")
    group.add_argument(
        "-v",
        "--verbose",
        dest="verbose",
        action="count",
        default=0,
        help="say more: -v tracebacks, -vv what Nipype does",
    )
    group.add_argument(
        "-w",
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="intermediate files; a later run goes on from them "
        f"(default: {WORK_DIR}, hidden in output_dir)",
    )
    group.add_argument(
        "--clean-workdir",
        action="store_true",
        help="remove what earlier runs left in the work folder first; nothing else in it",
    )
    group.add_argument(
        "--config-file",
        type=Path,
        metavar="FILE",
        help="settings of an earlier run, sub-XX/log/RUN/brainprior.toml, or some of them; what "
        "is on the command line comes first. Folders and level are not taken from it",
    )
    group.add_argument(
        "--resource-monitor",
        action="store_true",
        help="write processors and memory in use, second by second, to logs/RUN_resources.tsv "
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
        help="the scheduler's job, as slurm-script passes it. participant: what the status says "
        "of a scan that is at work (default: what Slurm says); group: this job has ended, so that "
        "scans that are still at work under it, and those of --participant-label that it never "
        "began, failed",
    )
    group.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop everything when one scan fails"
    )
    group.add_argument(
        "--debug",
        action="store_true",
        help="one step after the other in this process, with tracebacks; stop at the first crash",
    )
    group.add_argument(
        "--notrack",
        action="store_true",
        help="accepted for compatibility: brainprior sends nothing anywhere",
    )
