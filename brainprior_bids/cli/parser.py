# SPDX-License-Identifier: Apache-2.0
"""The command line: what can be asked for, and from it the settings of a run."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids.export import EXPORTS
from brainprior_bids.bids.provenance import new_run_uuid
from brainprior_bids.bids.query import read_filters
from brainprior_bids.cli import resources
from brainprior_bids.cli.plugin_file import read_plugin_file
from brainprior_bids.engine.acquisition import PLANES
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.settings import (
    EXPORT_PER,
    LEVELS,
    LOW_MEMORY_TILE_MM,
    MODALITIES,
    PARCELLATIONS,
    SAMPLERS,
    SKULL_STRIPS,
    SPACES,
    TASKS,
    Settings,
    read_table,
)

WORDS = ("restore", "inpaint", "refine")
WORK_DIR = ".brainprior_work"
SLOPPY = {"n_samples": 1, "n_steps": 3}
STEPS = {"auto": 20, "eps": 20, "exact": 20, "daps": 200, "map": 20}
"""Noise levels of each sampler; DAPS calls the network five times at each."""

DESCRIPTION = """\
brainprior restores brain MRI: thick slices, bias field and noise in; 1 mm, skull-stripped,
bias-free images with a map of their uncertainty out, as BIDS-Derivatives, in the scan's own
space and in MNI305. T1w, T2w and FLAIR, each on its own; CPU or GPU.
"""
EPILOG = """\
examples:
  brainprior data out participant                               everything in ./data
  brainprior data out participant --participant-label 01 -m T2w    one person's T2w
  brainprior data out participant --nprocs 8 --omp-nthreads 4 -w /tmp/work
  brainprior data out participant --dry-run                     what that would take
  brainprior data out group                                     tables and a page over all scans

other commands (`brainprior COMMAND --help`):
  train prior|parcellation    train the networks
  selftest                    check this installation and its device
  slurm-script                an array job for Slurm, one participant a task
  check-lesion IMAGE          how much of a lesion's contrast a restoration keeps
  verify OUT                  compare every output with the SHA-256 in its provenance
A data set that is called like a command is written ./train.

exit codes: 0 every requested scan is done; 1 a scan failed (logs/status.tsv says which and
why), the others were done; 2 the command line or the data set cannot be used.
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors as exceptions: the command decides how to end."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\nRun `brainprior --help` for the options.")


class _Append(argparse.Action):
    """Values after an option, added to those of an earlier one of the same name."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or ()), *values])


def build_parser() -> argparse.ArgumentParser:
    """The parser of the main command; what an option sets has the name of its setting."""
    parser = _Parser(
        prog="brainprior",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="root of a raw BIDS data set; only read")
    parser.add_argument("output_dir", type=Path, help="where the derivatives go; made if absent")
    parser.add_argument(
        "analysis_level",
        nargs="+",
        choices=LEVELS,
        help="participant: restore every scan on its own; group: one table a contrast and one "
        "page over all scans in output_dir; both may be given",
    )
    _query_options(parser.add_argument_group("which scans"))
    _task_options(parser.add_argument_group("what to do"))
    _anatomy_options(parser.add_argument_group("brain mask and structures"))
    _output_options(parser.add_argument_group("what to write"))
    _performance_options(parser.add_argument_group("performance"))
    _subset_options(parser.add_argument_group("less than a whole run"))
    _other_options(parser.add_argument_group("other"))
    return parser


Group = argparse._ArgumentGroup


def _query_options(group: Group) -> None:
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
        help=f"contrasts to process, of {', '.join(MODALITIES)} (default: all three)",
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
        type=_derivative,
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


def _task_options(group: Group) -> None:
    group.add_argument(
        "--task",
        nargs="+",
        choices=WORDS,
        default=["restore"],
        help="restore (default): 1 mm, free of bias; inpaint: fill the lesion mask, every other "
        "voxel stays the scan's; refine: another tool's image in --derivatives, within --trust; "
        "restore inpaint: restore without believing what lies under the mask; restore refine: "
        "the scan and the other tool's image together",
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
        type=_distance,
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
        choices=SAMPLERS,
        default="auto",
        help="auto (default): eps for thick slices, else exact; eps: the network is told of the "
        "slices and gives the posterior's own mean at every noise level; exact: DAPS with its "
        "inner step solved exactly; daps: as published, 50 times the work; map: one estimate "
        "without an uncertainty",
    )
    group.add_argument(
        "--n-samples",
        type=_positive_int,
        metavar="N",
        help="posterior samples, from which the image and its uncertainty come "
        "(default: 4; with 1 there is no uncertainty map)",
    )
    group.add_argument(
        "--slice-thickness",
        dest="slice_thickness_mm",
        type=_positive_float,
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
        type=_positive_float,
        metavar="TESLA",
        help="field strength, where the sidecars lack it or are wrong; recorded, no more",
    )
    group.add_argument(
        "--prior", type=Path, metavar="FILE", help="weights of the prior (default: embedded)"
    )
    group.add_argument(
        "--random-seed",
        type=_seed,
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


def _output_options(group: Group) -> None:
    group.add_argument(
        "--save-samples",
        action="store_true",
        help="write each sample too (desc-restoredSample01 …), with its seed and its misfit",
    )
    group.add_argument(
        "--output-spaces",
        nargs="+",
        action=_Append,
        type=_space,
        default=[],
        metavar="SPACE",
        help="anat (the scan's own frame, always written) and MNI305 (default: both). Other "
        "templates need a nonlinear registration: hand the result on to fMRIPrep",
    )
    group.add_argument(
        "--export",
        dest="exports",
        nargs="+",
        action=_Append,
        type=_export,
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


def _performance_options(group: Group) -> None:
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="{auto,cpu,cuda[:N]}",
        help="where the networks run (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--n-gpu-procs",
        type=_positive_int,
        default=1,
        metavar="N",
        help="restorations at once on the GPU (default: 1)",
    )
    group.add_argument(
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        "--n_cpus",
        type=_positive_int,
        metavar="N",
        help="processors for all steps together (default: all that this process may use)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=_positive_int,
        metavar="N",
        help="threads of one step (default: --nprocs, at most 8); results are reproducible bit "
        "by bit for one machine and one number of threads",
    )
    group.add_argument(
        "--mem",
        "--mem-mb",
        "--mem_mb",
        dest="mem_gb",
        type=_memory,
        metavar="SIZE",
        help="memory that the steps may claim together: 8G, 8000M, 8000 (MB) "
        "(default: nine tenths of what there is)",
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


def _subset_options(group: Group) -> None:
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


def _other_options(group: Group) -> None:
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


NOT_IN_CONFIG = (
    "bids_dir", "output_dir", "analysis_level", "run_uuid", "command", "n_steps",
    "dry_run", "boilerplate_only", "reports_only",
)  # fmt: skip
"""Settings that belong to one run, or follow from others."""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, those it leaves out from ``--config-file``, then defaults."""
    parser = build_parser()
    options = parser.parse_args(list(argv))
    options.bids_filters = {}
    if options.config_file is None:
        return options
    config = _read_config(options.config_file)
    tokens = _tokens(parser, config)
    folders = [str(options.bids_dir), str(options.output_dir), *options.analysis_level]
    try:
        base = vars(parser.parse_args([*folders, *tokens]))
    except UsageError as error:
        raise UsageError(f"--config-file {options.config_file}: {error}") from error
    explicit = build_parser()
    for action in explicit._actions:
        action.default = argparse.SUPPRESS
    given = vars(explicit.parse_args(list(argv)))
    merged = {**base, **given, "bids_filters": {}}
    if options.bids_filter_file is None:
        merged["bids_filters"] = config.get("bids_filters", {})
    return argparse.Namespace(**merged)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_table(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config-file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"--config-file {path}: {error}") from error
    work, output = config.get("work_dir"), config.get("output_dir")
    if work is not None and output is not None and work == output / WORK_DIR:
        del config["work_dir"]  # the default there; here it is inside this output_dir
    if output is not None:
        config["exports"] = {
            kind: "" if Path(root) == output.with_name(f"{output.name}-{kind}") else root
            for kind, root in config.get("exports", {}).items()
        }  # the default there; here it lies beside this output_dir
    return {key: value for key, value in config.items() if key not in NOT_IN_CONFIG}


def _tokens(parser: argparse.ArgumentParser, config: dict[str, Any]) -> list[str]:
    """Settings as the command line would say them."""
    tokens = []
    for action in parser._actions:
        if action.dest not in config or not action.option_strings:
            continue
        option, value = action.option_strings[-1], config[action.dest]
        if isinstance(value, bool):
            tokens += [option] * value
        elif action.dest == "task":
            tokens += [option, *value.split("+")]
        elif action.dest == "verbose":
            tokens += [option] * int(value)
        elif action.dest == "mem_gb":
            tokens += [option, f"{value}G"]
        elif isinstance(value, dict):
            tokens += [option, *(f"{name}={path}" for name, path in value.items())] * bool(value)
        elif isinstance(value, tuple):
            tokens += [option, *value] * bool(value)
        else:
            tokens += [option, str(value)]
    return tokens


def _anatomy_options(group: Group) -> None:
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


def _check_anatomy(options: argparse.Namespace) -> None:
    """Refuse what needs a program or a file that is not there, before anything runs."""
    model = options.synthstrip_model
    for option, value in (("--skull-strip", "mask"), ("--parcellation", "derivatives")):
        if getattr(options, option[2:].replace("-", "_")) == value and not options.derivatives:
            raise UsageError(
                f"{option} {value}: expected --derivatives NAME=PATH with the data set to take it "
                "from, got none. Give it."
            )
    if model is not None and not model.is_file():
        raise UsageError(f"--synthstrip-model {model}: no such file.")
    if model is not None and options.skull_strip != "synthstrip":
        raise UsageError("--synthstrip-model is for --skull-strip synthstrip only.")
    if options.skull_strip == "synthstrip" and not (
        shutil.which("mri_synthstrip") or (model and shutil.which("nipreps-synthstrip"))
    ):
        raise UsageError(
            "--skull-strip synthstrip: expected mri_synthstrip (FreeSurfer) on the PATH, or "
            "nipreps-synthstrip on it and --synthstrip-model FILE. Install one, or use "
            "--skull-strip embedded."
        )
    if options.parcellation == "synthseg" and not shutil.which("mri_synthseg"):
        raise UsageError(
            "--parcellation synthseg: mri_synthseg (FreeSurfer 7.3 or later) is not on the PATH. "
            "Install FreeSurfer, or use --parcellation embedded."
        )


def parse_settings(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for, defaults filled in, paths checked.

    Raises
    ------
    UsageError
        With what to do.
    SystemExit
        After ``--help`` and ``--version``.
    """
    options = _parse(argv)
    task = "+".join(word for word in WORDS if word in options.task)
    _check_task(options, task)
    modalities = _modalities(options.modalities, options.ignore)
    bids_dir = options.bids_dir.absolute()
    output_dir = options.output_dir.absolute()
    work_dir = (options.work_dir or options.output_dir / WORK_DIR).absolute()
    check_paths(bids_dir, output_dir, work_dir)
    exports = _exports(options.exports, bids_dir, output_dir)
    _check_anatomy(options)
    if options.prior is not None and not options.prior.is_file():
        raise UsageError(f"--prior {options.prior}: no such file.")

    plugin = read_plugin_file(options.plugin_file)
    nprocs = options.nprocs or resources.available_processors()
    defaults = {"n_samples": 4, "n_steps": STEPS[options.sampler]}
    if options.sloppy:
        defaults = SLOPPY
    if options.sampler == "map":
        if (options.n_samples or 1) > 1:
            raise UsageError(
                f"--sampler map is a point estimate, its spread is no uncertainty: --n-samples "
                f"{options.n_samples} makes no sense. Leave it out, or use --sampler exact."
            )
        defaults = {**defaults, "n_samples": 1}
    filters = (
        read_filters(options.bids_filter_file, modalities)
        if options.bids_filter_file
        else {key: value for key, value in options.bids_filters.items() if key in modalities}
    )
    return Settings(
        bids_dir=bids_dir,
        output_dir=output_dir,
        work_dir=work_dir,
        analysis_level=tuple(level for level in LEVELS if level in options.analysis_level),
        participant_label=_labels(options.participant_label, "sub-"),
        session_label=_labels(options.session_label, "ses-"),
        run_id=_runs(options.run_id),
        modalities=modalities,
        bids_filters=filters,
        bids_database_dir=_absolute(options.bids_database_dir),
        derivatives=dict(options.derivatives),
        skip_bids_validation=options.skip_bids_validation,
        task=task,
        sampler=options.sampler,
        n_samples=options.n_samples or defaults["n_samples"],
        n_steps=defaults["n_steps"],
        save_samples=options.save_samples,
        lesion_mask=options.lesion_mask,
        dilate_mm=options.dilate_mm,
        trust=options.trust,
        output_spaces=tuple(s for s in SPACES if s in options.output_spaces) or SPACES,
        exports=exports,
        export_per=options.export_per,
        prior=_absolute(options.prior),
        slice_thickness_mm=options.slice_thickness_mm,
        slice_plane=options.slice_plane,
        field_strength_t=options.field_strength_t,
        skull_strip=options.skull_strip,
        parcellation=options.parcellation,
        synthstrip_model=_absolute(options.synthstrip_model),
        random_seed=options.random_seed,
        # a job of a scheduler sees another machine's devices than this process
        device=options.device if plugin.is_batch else resources.resolve_device(options.device),
        n_gpu_procs=options.n_gpu_procs,
        nprocs=nprocs,
        omp_nthreads=min(options.omp_nthreads or min(nprocs, 8), nprocs),
        mem_gb=options.mem_gb or resources.available_memory_gb(),
        low_mem=options.low_mem,
        plugin_file=_absolute(options.plugin_file),
        force=options.force,
        sloppy=options.sloppy,
        dry_run=options.dry_run,
        boilerplate_only=options.boilerplate_only,
        reports_only=options.reports_only,
        clean_workdir=options.clean_workdir,
        resource_monitor=options.resource_monitor,
        debug=options.debug,
        stop_on_first_crash=options.stop_on_first_crash or options.debug,
        write_graph=options.write_graph,
        verbose=max(options.verbose, 1) if options.debug else options.verbose,
        run_uuid=new_run_uuid(),
        command=("brainprior", *argv),
    )


def _modalities(asked: Sequence[str], ignored: Sequence[str]) -> tuple[str, ...]:
    modalities = tuple(dict.fromkeys(asked)) or MODALITIES
    unknown = [suffix for suffix in modalities if suffix not in MODALITIES]
    if unknown:
        raise UsageError(
            f"--modalities: no prior for {', '.join(unknown)}; known are {', '.join(MODALITIES)}."
        )
    left = tuple(suffix for suffix in modalities if suffix.lower() not in ignored)
    if not left:
        raise UsageError(
            f"--ignore {' '.join(ignored)} leaves nothing of {', '.join(modalities)} to process."
        )
    return left


def _check_task(options: argparse.Namespace, task: str) -> None:
    if task not in TASKS:
        raise UsageError(
            f"--task {' '.join(options.task)} do not go together; possible are "
            + ", ".join(name.replace("+", " ") for name in TASKS)
            + "."
        )
    if "refine" in task:
        _check_refine(options, task)
    elif options.trust is not None:
        raise UsageError(f"--trust needs --task refine; the task is {task}.")
    if "inpaint" not in task:
        for option, value in (
            ("--lesion-mask", options.lesion_mask),
            ("--dilate", options.dilate_mm),
        ):
            if value:
                raise UsageError(f"{option} needs --task inpaint; the task is {task}.")
    _check_pattern("--lesion-mask", options.lesion_mask)


def _check_refine(options: argparse.Namespace, task: str) -> None:
    if not options.derivatives:
        raise UsageError("--task refine needs the other tool's data set: --derivatives NAME=PATH.")
    if task == "refine" and options.exports:
        raise UsageError(
            "--export puts a brain back into its scan's head: with --task refine there is another "
            "tool's image in place of the scan. Use --task restore refine."
        )
    if options.sampler not in ("auto", "exact"):
        raise UsageError(f"--task refine needs --sampler exact, got {options.sampler}.")
    if options.trust is None:
        raise UsageError(
            "--task refine needs --trust: how far is the image to be believed? 0.05 means to 5 % "
            "of the brain's 99th percentile."
        )
    try:
        trust = float(options.trust)
    except ValueError:
        if task != "refine":
            raise UsageError(
                f"--task restore refine takes one SD for all voxels, got --trust {options.trust}."
            ) from None
        _check_pattern("--trust", options.trust)
    else:
        if not 0 < trust < float("inf"):
            raise UsageError(f"--trust must be above 0, got {options.trust}.")


def _check_pattern(option: str, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        pattern.format(subject="", session="", suffix="", stem="")
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(
            f"{option} {pattern}: {error!r} is not known; use {{subject}}, {{session}}, "
            "{suffix} or {stem}."
        ) from error


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path) -> None:
    """Refuse folders that would write into the raw data.

    Raises
    ------
    UsageError
    """
    raw, out, work = (path.resolve() for path in (bids_dir, output_dir, work_dir))
    if out == raw:
        raise UsageError(
            "output_dir is bids_dir: the raw data would be written to. Use, for example, "
            f"{bids_dir / 'derivatives' / 'brainprior'}."
        )
    derivatives = raw / "derivatives"
    if raw in out.parents and derivatives not in out.parents:
        raise UsageError(
            f"output_dir {output_dir} lies inside bids_dir. Only {derivatives}/NAME may; "
            "choose that, or a folder outside."
        )
    if (work == raw or raw in work.parents) and not (work == out or out in work.parents):
        raise UsageError(
            f"--work-dir {work_dir} lies inside bids_dir. Choose a folder outside of it."
        )
    if work == out:
        raise UsageError(
            f"--work-dir is output_dir. Leave it out (it is then {WORK_DIR} inside, hidden), or "
            "choose another folder."
        )


def _labels(given: Sequence[str], prefix: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.removeprefix(prefix) for label in given))


def _runs(given: Sequence[str]) -> tuple[str, ...]:
    runs = _labels(given, "run-")
    for run in runs:
        if not run.isdigit():
            raise UsageError(f"--run-id: a run is a whole number such as 1 or 02, got {run!r}.")
    return runs


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path is not None else None


def _derivative(text: str) -> tuple[str, str]:
    """``NAME=PATH`` or ``PATH`` -> name and absolute path of a derivative data set."""
    name, equals, rest = text.partition("=")
    path = Path(rest if equals else text).absolute()
    if not (path / "dataset_description.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{path} is no BIDS data set: it has no dataset_description.json"
        )
    name = name if equals else re.sub(r"[^a-zA-Z0-9]", "", path.name)
    if not re.fullmatch(r"[a-zA-Z0-9]+", name) or name == "raw":
        raise argparse.ArgumentTypeError(
            f"{name!r} is no name for a data set: letters and digits, and not 'raw'"
        )
    return name, str(path)


def _export(text: str) -> tuple[str, str]:
    """``fmriprep`` or ``raw``, and the folder behind ``=``, or nothing."""
    kind, _, folder = text.partition("=")
    if kind not in EXPORTS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not among {', '.join(EXPORTS)}, with or without =DIR"
        )
    return kind, folder


def _exports(asked: Sequence[tuple[str, str]], bids_dir: Path, output_dir: Path) -> dict[str, str]:
    """Kind -> absolute root, each outside of the other data sets."""
    exports = {}
    for kind, folder in asked:
        root = Path(folder) if folder else output_dir.with_name(f"{output_dir.name}-{kind}")
        root = root.absolute()
        if not folder and root.parent == Path("/"):
            raise UsageError(
                f"--export {kind}: {root} would lie outside of what a container mounts, and be "
                f"lost. Name a mounted folder: --export {kind}=/exports, or use an output_dir one "
                "level deeper."
            )
        taken = [bids_dir, output_dir, *map(Path, exports.values())]
        for other in (path.resolve() for path in taken):
            own = root.resolve()
            in_derivatives = bids_dir.resolve() / "derivatives" in own.parents
            clash = own == other or (other in own.parents and not in_derivatives)
            if clash or own in other.parents or output_dir.resolve() in own.parents:
                raise UsageError(
                    f"--export {kind}: {root} and {other} are not apart from each other. Every "
                    f"export has a root of its own: --export {kind}=DIR."
                )
        exports[kind] = str(root)
    return exports


def _space(text: str) -> str:
    """``anat``, ``T1w`` … or ``MNI305``, with or without ``:res-1``."""
    name, _, resolution = text.partition(":")
    space = "anat" if name in ("anat", *MODALITIES) else name
    if space not in SPACES or resolution not in ("", "res-1"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not among {', '.join(SPACES)} (1 mm). Another template needs a "
            "nonlinear registration: run fMRIPrep on the result"
        )
    return space


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _distance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a distance of at least 0 mm, got {text}")
    return value


def _memory(text: str) -> float:
    try:
        return resources.parse_memory_gb(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdigit()):
        return text
    raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
