# SPDX-License-Identifier: Apache-2.0
"""Work beside the main thread begins, ends, and can begin again."""

from __future__ import annotations

import threading

from brainprior_bids.background import Background


def test_it_works_until_its_end_which_waits_for_it():
    ticks, twice, ended = [], threading.Event(), []

    def work(stop):
        while not stop.wait(0.001):
            ticks.append(threading.current_thread())
            if len(ticks) >= 2:
                twice.set()
        ended.append(True)

    thread = Background(work)
    assert not ticks
    thread.start()
    assert twice.wait(60)
    thread.end()
    assert ended == [True]
    assert threading.main_thread() not in ticks
    count = len(ticks)
    thread.start()
    twice.clear()
    assert twice.wait(60)
    thread.end()
    assert len(ticks) > count
    assert ended == [True, True]
