# SPDX-License-Identifier: Apache-2.0
"""Processor time and memory of a process and of those that nobody waits for."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from brainprior_bids.evaluation.usage import Watch

BURN = """
import pathlib, sys, time
data = bytearray(200 << 20)
while time.process_time() < 0.8: pass
pathlib.Path(sys.argv[1]).touch()
time.sleep(5)
"""
PARENT = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.05)
time.sleep(0.5)  # the last look
os._exit(0)  # without waiting for it
"""


def burn(seconds):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_a_worker_that_nobody_waited_for_counts(tmp_path):
    with Watch(interval_s=0.1) as watch:
        subprocess.run([sys.executable, "-c", PARENT, BURN, tmp_path / "mark"], check=True)
    assert watch.usage.cpu_seconds > 0.75
    assert watch.usage.peak_memory_gb > 0.19
    assert watch.usage.seconds >= 0.5


def test_without_the_family_only_the_process_itself_counts():
    burn(0.2)  # before the block
    with Watch(family=False) as watch:
        burn(0.3)
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: 0"])
    assert watch.usage.cpu_seconds == pytest.approx(0.3, abs=0.15)


def test_another_process_is_measured_until_it_ends():
    words = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: 0"]
    with subprocess.Popen(words) as process, Watch(process.pid) as watch:
        process.wait()
    assert watch.usage.cpu_seconds == pytest.approx(0.6, abs=0.15)
