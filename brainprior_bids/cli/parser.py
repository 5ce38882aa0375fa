# SPDX-License-Identifier: Apache-2.0
"""The command line: what can be asked for, and from it the settings of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids.provenance import new_run_uuid
from brainprior_bids.bids.query import read_filters
from brainprior_bids.cli import resources
from brainprior_bids.cli.plugin_file import read_plugin_file
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.settings import MODALITIES, SAMPLERS, TASKS, Settings

WORK_DIR = ".brainprior_work"
SLOPPY = {"n_samples": 1, "n_steps": 3}
STEPS = {"exact": 20, "daps": 200, "map": 20}
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

other commands (`brainprior COMMAND --help`):
  train prior|parcellation    train the networks
  selftest                    check this installation and its device
  slurm-script                an array job for Slurm, one participant a task
A data set that is called like a command is written ./train.

exit codes: 0 every requested scan is done; 1 a scan failed (logs/status.tsv says which and
why), the others were done; 2 the command line or the data set cannot be used.
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors as exceptions: the command decides how to end."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\nRun `brainprior --help` for the options.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the main command."""
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
        "analysis_level", choices=["participant"], help="every participant on their own"
    )

    query = parser.add_argument_group("which scans")
    query.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="do not run bids-validator-deno on the requested part of bids_dir",
    )
    query.add_argument(
        "--participant-label",
        "--participant_label",
        nargs="+",
        action="extend",
        default=[],
        metavar="LABEL",
        help="participants to process, with or without 'sub-' (default: all)",
    )
    query.add_argument(
        "--session-label",
        "--session-id",
        nargs="+",
        action="extend",
        default=[],
        metavar="LABEL",
        help="sessions to process, with or without 'ses-' (default: all)",
    )
    query.add_argument(
        "--run-id",
        nargs="+",
        action="extend",
        default=[],
        metavar="INDEX",
        help="runs to process, with or without 'run-' (default: all)",
    )
    query.add_argument(
        "-m",
        "--modalities",
        nargs="+",
        action="extend",
        default=[],
        metavar="SUFFIX",
        help=f"contrasts to process, of {', '.join(MODALITIES)} (default: all three)",
    )
    query.add_argument(
        "--bids-filter-file",
        type=Path,
        metavar="FILE",
        help='JSON with a pybids query a contrast: {"t1w": {"acquisition": "mprage", '
        '"session": null}}; null: the entity is absent, "*": it is present',
    )

    task = parser.add_argument_group("what to do")
    task.add_argument(
        "--task",
        choices=TASKS,
        default="restore",
        help="restore (default); inpaint and refine are not in this version",
    )
    task.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="exact",
        help="exact (default): DAPS with its inner step solved exactly; daps: as published, "
        "50 times the work; map: one estimate without an uncertainty",
    )
    task.add_argument(
        "--n-samples",
        type=_positive_int,
        metavar="N",
        help="posterior samples; their mean is the image, their SD the uncertainty "
        "(default: 4; with 1 there is no uncertainty map)",
    )
    task.add_argument(
        "--save-samples",
        action="store_true",
        help="write each sample too (desc-restoredSample01 …), with its seed and its misfit",
    )
    task.add_argument(
        "--slice-thickness",
        type=_positive_float,
        metavar="MM",
        help="slice thickness in mm, where the sidecars lack it or are wrong",
    )
    task.add_argument(
        "--prior", type=Path, metavar="FILE", help="weights of the prior (default: embedded)"
    )
    task.add_argument(
        "--random-seed",
        type=_seed,
        default=0,
        metavar="N",
        help="seed of the run; each scan's own is derived from it and from the scan's name, so "
        "a scan's result does not depend on the others (default: 0)",
    )
    task.add_argument(
        "--force", action="store_true", help="redo scans that are done, work folder included"
    )
    task.add_argument(
        "--sloppy",
        action="store_true",
        help=f"for testing only: {SLOPPY['n_samples']} sample of {SLOPPY['n_steps']} steps",
    )

    performance = parser.add_argument_group("performance")
    performance.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="{auto,cpu,cuda[:N]}",
        help="where the networks run (default: auto, a GPU if there is one)",
    )
    performance.add_argument(
        "--n-gpu-procs",
        type=_positive_int,
        default=1,
        metavar="N",
        help="restorations at once on the GPU (default: 1)",
    )
    performance.add_argument(
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        type=_positive_int,
        metavar="N",
        help="processors for all steps together (default: all that this process may use)",
    )
    performance.add_argument(
        "--omp-nthreads",
        type=_positive_int,
        metavar="N",
        help="threads of one step (default: --nprocs, at most 8); results are reproducible bit "
        "by bit for one machine and one number of threads",
    )
    performance.add_argument(
        "--mem",
        "--mem-mb",
        type=_memory,
        metavar="SIZE",
        help="memory that the steps may claim together: 8G, 8000M, 8000 (MB) "
        "(default: nine tenths of what there is)",
    )

    performance.add_argument(
        "--use-plugin",
        "--nipype-plugin-file",
        dest="plugin_file",
        type=Path,
        metavar="FILE",
        help="YAML with one of Nipype's execution plugins and its plugin_args, and step_args for "
        "single steps (default: a MultiProc that survives killed workers)",
    )

    other = parser.add_argument_group("other")
    other.add_argument("--version", action="version", version=f"brainprior {__version__}")
    other.add_argument(
        "-v",
        dest="verbose",
        action="count",
        default=0,
        help="say more: -v tracebacks, -vv what Nipype does",
    )
    other.add_argument(
        "-w",
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="intermediate files; a later run goes on from them "
        f"(default: {WORK_DIR}, hidden in output_dir)",
    )
    other.add_argument(
        "--dry-run", action="store_true", help="say what would be done, scan by scan, and stop"
    )
    other.add_argument(
        "--write-graph",
        action="store_true",
        help="write the graph of the steps to logs/ (an SVG where Graphviz is installed)",
    )
    other.add_argument(
        "--stop-on-first-crash", action="store_true", help="stop everything when one scan fails"
    )
    other.add_argument(
        "--notrack",
        action="store_true",
        help="accepted for compatibility: brainprior sends nothing anywhere",
    )
    return parser


def parse_settings(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for, defaults filled in, paths checked.

    Raises
    ------
    UsageError
        With what to do.
    SystemExit
        After ``--help`` and ``--version``.
    """
    options = build_parser().parse_args(list(argv))
    if options.task != "restore":
        raise UsageError(
            f"--task {options.task} is not available in this version ({__version__}); "
            "use --task restore."
        )
    modalities = tuple(dict.fromkeys(options.modalities)) or MODALITIES
    unknown = [suffix for suffix in modalities if suffix not in MODALITIES]
    if unknown:
        raise UsageError(
            f"--modalities: no prior for {', '.join(unknown)}; known are {', '.join(MODALITIES)}."
        )
    bids_dir = options.bids_dir.absolute()
    output_dir = options.output_dir.absolute()
    work_dir = (options.work_dir or options.output_dir / WORK_DIR).absolute()
    check_paths(bids_dir, output_dir, work_dir)
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
    return Settings(
        bids_dir=bids_dir,
        output_dir=output_dir,
        work_dir=work_dir,
        participant_label=_labels(options.participant_label, "sub-"),
        session_label=_labels(options.session_label, "ses-"),
        run_id=_runs(options.run_id),
        modalities=modalities,
        bids_filters=(
            read_filters(options.bids_filter_file, modalities) if options.bids_filter_file else {}
        ),
        skip_bids_validation=options.skip_bids_validation,
        task=options.task,
        sampler=options.sampler,
        n_samples=options.n_samples or defaults["n_samples"],
        n_steps=defaults["n_steps"],
        save_samples=options.save_samples,
        prior=options.prior.absolute() if options.prior else None,
        slice_thickness_mm=options.slice_thickness,
        random_seed=options.random_seed,
        # a job of a scheduler sees another machine's devices than this process
        device=options.device if plugin.is_batch else resources.resolve_device(options.device),
        n_gpu_procs=options.n_gpu_procs,
        nprocs=nprocs,
        omp_nthreads=min(options.omp_nthreads or min(nprocs, 8), nprocs),
        mem_gb=options.mem or resources.available_memory_gb(),
        plugin_file=options.plugin_file.absolute() if options.plugin_file else None,
        force=options.force,
        sloppy=options.sloppy,
        dry_run=options.dry_run,
        stop_on_first_crash=options.stop_on_first_crash,
        write_graph=options.write_graph,
        verbose=options.verbose,
        run_uuid=new_run_uuid(),
        command=("brainprior", *argv),
    )


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
