# SPDX-License-Identifier: Apache-2.0
"""The log of a run: standard error, and a file."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LOG = logging.getLogger("brainprior")
COMMANDS = logging.getLogger("brainprior_bids")
"""Loggers of the modules of `train` and `evaluate`."""


class _StandardError(logging.StreamHandler[TextIO]):
    """Write to the current standard error: a notebook may replace it, and close the former."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _RunFile(logging.FileHandler):
    """A run's log file; on a full disk it ends, and the run continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report once that the file ends here."""
        LOG.removeHandler(self)
        LOG.warning("%s ends here: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        """Close the file; text that cannot be flushed is lost."""
        with suppress(OSError):
            super().close()


def log_to_stderr() -> None:
    """Send every line to standard error, with the time of day."""
    if not any(isinstance(handler, _StandardError) for handler in LOG.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        LOG.propagate = False
        COMMANDS.addHandler(handler)
    LOG.setLevel(logging.INFO)
    COMMANDS.setLevel(logging.INFO)


def log_to_file(path: Path) -> logging.Handler:
    """Send every line to a file of this run as well, with its date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RunFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(handler)
    return handler
