# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: one is enough, none is lost, and none shows a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from brainprior_bids.run.interrupt import SIGNALS, check, interruptible


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_that_was_swallowed_is_raised_again(number, capfd):
    before = [signal.getsignal(one) for one in SIGNALS]
    with interruptible():
        check()  # no signal yet
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            check()
        os.kill(os.getpid(), signal.SIGINT)  # again: it does not interrupt the end
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.count("brainprior: stopping") == 2
    assert [signal.getsignal(one) for one in SIGNALS] == before
    with interruptible():
        check()  # a new block starts afresh


@pytest.mark.parametrize("number", SIGNALS)
def test_the_imports_can_be_interrupted(number):
    """Python prints each module after its import: torch's modules are in the middle."""
    words = ("none", "out", "participant")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "brainprior_bids", *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "torch." in line:
            process.send_signal(number)
            break
    messages = process.communicate()[1]
    assert "Traceback" not in messages
    assert "brainprior: interrupted" in messages
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both
