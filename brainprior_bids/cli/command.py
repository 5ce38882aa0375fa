# SPDX-License-Identifier: Apache-2.0
"""From a command line to an exit code: choose the command and report its errors."""

from __future__ import annotations

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

COMMANDS = (
    "check-lesion",
    "evaluate",
    "selftest",
    "slurm-script",
    "status",
    "train",
    "verify",
    "weights",
)
"""Each in a module of its name, as a function of its name; all else is a run."""


def command(arguments: list[str]) -> int:
    """Execute one command line; returns the exit code as defined by ``run.main``.

    Raises
    ------
    BrokenPipeError, KeyboardInterrupt
    """
    log_to_stderr()
    settings: Settings | None = None
    try:
        if arguments[:1] and arguments[0] in COMMANDS:
            name = arguments[0].replace("-", "_")
            module = importlib.import_module(f"brainprior_bids.cli.{name}")
            return int(getattr(module, name)(arguments[1:]))
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
