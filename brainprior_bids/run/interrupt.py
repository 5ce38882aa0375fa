# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: one signal is enough, and none is lost.

A signal raises KeyboardInterrupt wherever the command is. Code of a library that catches
everything, or a destructor, may swallow it there, so it is remembered, and ``check`` raises it
again. Further signals leave the command the seconds that it takes to end its workers and to give
every scan its status. SIGQUIT (Ctrl-\\) does not wait for that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals of a terminal (Ctrl-C) and of a scheduler."""


class _Signal:
    """Whether a signal was received."""

    received = False


def _interrupt(*_: object) -> None:
    if _Signal.received:
        os.write(2, b"brainprior: stopping.\n")  # the signal may have interrupted a print
        return
    _Signal.received = True
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which the first signal, and it alone, raises KeyboardInterrupt."""
    _Signal.received = False
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise the pending interrupt."""
    if _Signal.received:
        raise KeyboardInterrupt


def end_silently(code: int) -> None:
    """Ignore further signals, so that one during Python's shutdown shows no traceback."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
