# SPDX-License-Identifier: Apache-2.0
"""From a command line to an exit code: choose the command and report its errors."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.bids.files import write_text
from brainprior_bids.cli.parser import parse_settings
from brainprior_bids.engine.errors import BrainpriorError, UsageError, is_full
from brainprior_bids.run.logs import log_to_stderr
from brainprior_bids.run.outcome import no_room
from brainprior_bids.settings import Settings

TRAINERS = ("prior", "parcellation")


def command(arguments: list[str]) -> int:
    """Execute one command line; returns the exit code as defined by ``run.main``.

    Raises
    ------
    BrokenPipeError, KeyboardInterrupt
    """
    log_to_stderr()
    settings: Settings | None = None
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        if arguments[:1] == ["selftest"]:
            from brainprior_bids.cli.selftest import selftest

            return selftest(arguments[1:])
        if arguments[:1] == ["check-lesion"]:
            from brainprior_bids.cli.check_lesion import check_lesion

            return check_lesion(arguments[1:])
        if arguments[:1] == ["slurm-script"]:
            from brainprior_bids.cli.slurm_script import slurm_script

            return slurm_script(arguments[1:])
        if arguments[:1] == ["evaluate"]:
            from brainprior_bids.cli.evaluate import evaluate

            return evaluate(arguments[1:])
        if arguments[:1] == ["weights"]:
            from brainprior_bids.cli.weights import weights

            return weights(arguments[1:])
        if arguments[:1] == ["verify"]:
            return verify(arguments[1:])
        if arguments[:1] == ["status"]:
            from brainprior_bids.cli.status import status

            return status(arguments[1:])
        settings = parse_settings(arguments)
        from brainprior_bids.run.analysis_levels import run  # and torch, which takes seconds

        return run(settings)
    except UsageError as error:
        print(f"brainprior: error: {error}", file=sys.stderr)
        return 2
    except BrainpriorError as error:
        print(f"brainprior: failed: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:  # the only place for unexpected errors
        if settings is not None and is_full(error):
            text = f"{no_room(settings)}."
        else:
            logs = settings and settings.output_dir / "logs"
            text = _unexpected(error, logs, arguments)
        print(f"brainprior: failed: {text}", file=sys.stderr)
        return 1


def _unexpected(error: Exception, logs: Path | None, arguments: Sequence[str]) -> str:
    """One line about an unexpected error; its traceback is written to a file."""
    message = " ".join(str(error).split()) or "an error without a message"
    text = f"brainprior {__version__}: {shlex.join(arguments)}\n\n"
    text += "".join(traceback.format_exception(error))
    name = f"crash-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (logs, Path(os.environ.get("TMPDIR", "/tmp")), Path("/dev/shm")):
        if folder is not None and folder.is_dir():
            try:
                path = write_text(folder / name, text)
            except OSError:  # full or read-only: the next one
                continue
            return f"unexpected error: {message}. Please report it, with {path}."
    return f"unexpected error: {message}. Please report it ({type(error).__name__})."


def train(argv: Sequence[str]) -> int:
    """``brainprior train prior|parcellation``; the trainer is imported on demand."""
    parser = argparse.ArgumentParser(prog="brainprior train", description="Train a network.")
    commands = parser.add_subparsers(dest="network", required=True, metavar="|".join(TRAINERS))
    chosen = next((word for word in argv if word in TRAINERS), None)
    for name in TRAINERS:
        command = commands.add_parser(name, help=f"train the {name} network")
        if name == chosen:
            module = importlib.import_module(f"brainprior_bids.training.{name}")
            module.add_arguments(command)
            command.set_defaults(trainer=module.main)
    options = parser.parse_args(list(argv))
    return int(options.trainer(options))


def verify(argv: Sequence[str]) -> int:
    """``brainprior verify OUT``: compare every file with its recorded SHA-256."""
    parser = argparse.ArgumentParser(
        prog="brainprior verify",
        description="Compare every output, and every input that is still in its place, with the "
        "SHA-256 in the provenance; exit with status 1 if one is changed or missing.",
    )
    parser.add_argument(
        "output_dir", type=Path, help="output folder of a run, or a data set of --export"
    )
    options = parser.parse_args(list(argv))
    from brainprior_bids.bids.provenance import verify_export, verify_records

    report = verify_records(options.output_dir)
    if not report.outputs:
        report = verify_export(options.output_dir)
    if not report.outputs:
        raise UsageError(
            f"{options.output_dir} has no provenance to verify: expected an output folder "
            "(prov/*_io.json), or a data set of --export."
        )
    for address, what in report.changes.items():
        print(f"{what}\t{address}")
    for address in report.out_of_reach:
        print(f"not checked\t{address}")
    print(
        f"{report.outputs} output(s) and {report.inputs} input(s) checked, {len(report.changes)} "
        "changed or missing."
    )
    return 1 if report.changes else 0
