# SPDX-License-Identifier: Apache-2.0
"""``brainprior slurm-script``: an array job with one task per participant, then a group job."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from brainprior_bids.bids.files import write_text
from brainprior_bids.bids.query import check_dataset, find_scans
from brainprior_bids.cli import parser as run_parser
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.slurm import ArrayJob
from brainprior_bids.settings import Settings

PROCESSORS = 4
MEMORY_GB = 5.0
"""Memory that the steps of a task may reserve together, in GiB."""

DESCRIPTION = """\
Write a bash script that submits one array job with a task for each participant, and a group job
that runs when all tasks have ended, successfully or not. Options that are not listed here are
brainprior's own, and go to every task.

  brainprior slurm-script --sbatch "--partition=gpu --gres=gpu:1 --time=2:00:00" \\
      -o submit.sh BIDS OUT participant --device cuda -m T2w
  bash submit.sh
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior slurm-script``."""
    parser = argparse.ArgumentParser(
        prog="brainprior slurm-script",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-o", "--script", type=Path, metavar="FILE", help="file to write (default: print)"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="ARGS",
        help="additional sbatch arguments for the tasks, such as '--partition=gpu --gres=gpu:1'",
    )
    parser.add_argument(
        "--group-sbatch",
        action="append",
        default=[],
        metavar="ARGS",
        help="additional sbatch arguments for the group job",
    )
    parser.add_argument(
        "--max-running", type=int, metavar="N", help="maximum number of simultaneous tasks"
    )
    parser.add_argument(
        "--launcher",
        default="brainprior",
        metavar="COMMAND",
        help="command that starts brainprior, for example 'apptainer run --nv --containall "
        "--bind /project /images/brainprior.sif' (default: brainprior)",
    )
    parser.add_argument("--participant-label", "--participant_label", nargs="+", default=[])
    return parser


def slurm_script(argv: Sequence[str]) -> int:
    """Write the script to ``--script`` or the standard output.

    Raises
    ------
    UsageError
        As the main command: options that a task would refuse are refused here.
    """
    own, rest = build_parser().parse_known_args(_joined(argv))
    labels = ["--participant-label", *own.participant_label] if own.participant_label else []
    # the tasks run on a machine with other devices: --device is checked there
    settings = run_parser.parse_settings([*rest, *labels, "--device", "cpu"])
    check_dataset(settings.bids_dir)
    if "group" in rest:
        raise UsageError("slurm-script adds the group job itself: give `participant` only.")
    if own.max_running is not None and own.max_running < 1:
        raise UsageError(f"--max-running: expected at least 1, got {own.max_running}.")
    job = _array_job(own, rest, settings, made_by=shlex.join(["slurm-script", *argv]))
    if own.script is None:
        print(job.script(), end="")
    else:
        write_text(own.script, job.script())
        print(f"{len(job.participants)} participant(s). Look at it, then: bash {own.script}")
    return 0


def _array_job(
    own: argparse.Namespace, rest: Sequence[str], settings: Settings, *, made_by: str
) -> ArrayJob:
    """The job for this command line; processors and memory have their own defaults."""
    participants = sorted({scan.subject for scan in find_scans(settings)})
    own_cpus = _given(rest, "--nprocs", "--nthreads", "--n-cpus", "--n_cpus")
    own_memory = _given(rest, "--mem", "--mem-mb", "--mem_mb")
    # the same selection, to detect scans that no task started; on any machine
    level = [*_as_group(rest), "--device", "cpu", "--participant-label", *participants]
    return ArrayJob(
        participants=participants,
        task=f"{own.launcher} {shlex.join(rest)}",
        group=f"{own.launcher} {shlex.join(level)}",
        logs=settings.output_dir / "logs" / "slurm",
        processors=settings.nprocs if own_cpus else PROCESSORS,
        memory_gb=settings.mem_gb if own_memory else MEMORY_GB,
        sbatch=own.sbatch,
        group_sbatch=own.group_sbatch,
        max_running=own.max_running,
        made_by=made_by,
    )


def _as_group(rest: Sequence[str]) -> list[str]:
    """The command line of the tasks with the other level; a value may have the level's name."""
    parser = run_parser.build_parser()
    lines = ([*rest[:at], "group", *rest[at + 1 :]] for at in range(len(rest)))
    return next(
        line
        for line, word in zip(lines, rest, strict=True)
        if word == "participant" and parser.parse_args(line).analysis_level == ["group"]
    )


def _joined(argv: Sequence[str]) -> list[str]:
    """``--sbatch --partition=gpu`` as one word: argparse accepts no value with a dash."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--sbatch", "--group-sbatch"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _given(rest: Sequence[str], *names: str) -> bool:
    return any(word.partition("=")[0] in names for word in rest)
