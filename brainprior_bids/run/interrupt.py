# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: one is enough, and none is lost.

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
"""From a terminal (Ctrl-C), and from a scheduler."""


class _Asked:
    """Whether a signal came."""

    yet = False


def _interrupt(*_: object) -> None:
    if _Asked.yet:
        os.write(2, b"brainprior: it is ending.\n")  # print could be met in the middle
        return
    _Asked.yet = True
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which the first signal, and it alone, raises KeyboardInterrupt."""
    _Asked.yet = False
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise the interrupt that was asked for."""
    if _Asked.yet:
        raise KeyboardInterrupt


def end_silently(code: int) -> None:
    """All is said: a signal that comes while Python ends shows no traceback."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
