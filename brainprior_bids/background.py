# SPDX-License-Identifier: Apache-2.0
"""Work beside the main thread, such as a measurement that is repeated until a block ends."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread between ``start`` and ``end``.

    Parameters
    ----------
    work : function
        Called with an event that is set by ``end``. It should then return. With ``while not
        stop.wait(seconds)`` it repeats something at an interval.
    """

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._work, self._stop = work, threading.Event()

    def start(self) -> None:
        """Begin the work; possible again after ``end``."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, args=(self._stop,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Set the event, and wait until the work has returned."""
        self._stop.set()
        self._thread.join()
