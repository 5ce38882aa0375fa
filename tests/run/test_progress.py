# SPDX-License-Identifier: Apache-2.0
"""Messages during a run, and the table of --resource-monitor."""

from __future__ import annotations

import io
import logging
import os
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainprior_bids.bids.files import write_json
from brainprior_bids.interfaces.restoration import progress_writer
from brainprior_bids.interfaces.restore import PROGRESS
from brainprior_bids.run.logs import log_to_stderr
from brainprior_bids.run.monitor import ResourceMonitor
from brainprior_bids.run.progress import Progress


@pytest.fixture
def lines():
    """Lines of the program's log."""
    result: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: result.append(record.getMessage())
    log = logging.getLogger("brainprior")
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    yield result
    log.setLevel(before)
    log.removeHandler(handler)


def make(folder: Path, *, terminal: bool) -> Progress:
    work = {"conform": 1.0, "restore": 9.0}
    return Progress({"a_wf": "sub-01_T1w"}, {"a_wf": folder}, work, terminal=terminal)


def node(step: str) -> SimpleNamespace:
    return SimpleNamespace(fullname=f"brainprior_wf.a_wf.{step}")


def test_plain_lines_where_there_is_no_terminal(tmp_path, lines):
    messages = make(tmp_path, terminal=False)
    messages(node("conform"), "start")
    messages(node("conform"), "end")
    messages(node("restore"), "start")
    observe = progress_writer(tmp_path / "restore" / PROGRESS, 2)
    (tmp_path / "restore").mkdir()
    for step in range(4):
        observe(step, 4, 1.0, 0)
        messages.refresh()
    assert messages.running == ["sub-01_T1w restore"]
    messages(node("restore"), "exception")
    messages(node("unknown"), "start")
    assert lines == [
        "sub-01_T1w: conform …",
        "[1/2] sub-01_T1w: conform done",
        "sub-01_T1w: restore …",
        "sub-01_T1w restore sample 1/2 step 2/4",
        "sub-01_T1w restore sample 1/2 step 4/4",
        "[2/2] sub-01_T1w: restore FAILED",
    ]
    assert messages.running == []


def test_a_scan_begins_with_its_second_step(tmp_path):
    """The first one reads scans in advance."""
    seen: list[str] = []
    scans = {"a_wf": "sub-01_T1w", "b_wf": "sub-02_T1w"}
    work = {"conform": 1.0, "n4": 3.0, "restore": 6.0}
    messages = Progress(
        scans, dict.fromkeys(scans, tmp_path), work, on_begin=seen.append, terminal=False
    )
    for event in ("start", "end"):
        messages(node("conform"), event)
    assert (seen, messages.begun, messages.share) == ([], set(), 1 / 20)
    for step in ("n4", "restore"):
        messages(node(step), "start")
        assert (seen, messages.begun) == (["a_wf"], {"a_wf"})
        if step == "n4":
            assert messages.share == (1 + 3 / 2) / 20
            messages(node(step), "end")
    write_json(tmp_path / "restore" / PROGRESS, {"sample": 1, "samples": 1, "step": 1, "steps": 3})
    assert messages.share == (1 + 3 + 2) / 20


def test_one_line_on_a_terminal(tmp_path, capsys, lines):
    with make(tmp_path, terminal=True) as messages:
        messages(node("conform"), "start")
        messages(node("conform"), "end")
        messages(node("restore"), "start")
        write_json(
            tmp_path / "restore" / PROGRESS,
            {"sample": 2, "samples": 2, "step": 1, "steps": 4},
        )
        messages.refresh()
    shown = capsys.readouterr().err
    # 1 of 10 for conform, 9 * 5/8 of the sampling
    assert " 66 % |" in shown
    assert "left, sub-01_T1w restore sample 2/2 step 1/4" in shown


@pytest.mark.parametrize("columns", [0, 100])
def test_the_line_shows_on_a_real_terminal_of_unknown_width_too(tmp_path, monkeypatch, columns):
    leader, follower = os.openpty()  # 0 columns at first, as under `docker run -t`
    if columns:
        termios.tcsetwinsize(follower, (24, columns))
    with os.fdopen(follower, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        messages = Progress({"a_wf": "sub-01_T1w"}, {"a_wf": tmp_path}, {"conform": 1.0})
        with messages:
            messages(node("conform"), "start")
            messages.refresh()
    shown = b""
    with suppress(
        OSError
    ):  # raised by Linux after everything that was written before the close has been read
        while chunk := os.read(leader, 10_000):
            shown += chunk
    os.close(leader)
    assert "left, sub-01_T1w conform" in shown.decode(errors="replace")


def test_the_machine_is_watched(tmp_path):
    path = tmp_path / "logs" / "r.tsv"
    begun = time.monotonic()
    with ResourceMonitor(path, lambda: ["sub-01_T1w n4"], interval_s=0.02):
        while not path.exists() or path.read_text().count("\n") < 3:
            time.sleep(0.01)
    took = time.monotonic() - begun
    header, first, *_ = path.read_text().splitlines()
    assert header == "seconds\tprocesses\tcpu_percent\tmemory_gb\trunning"
    seconds, processes, _, memory, running = first.split("\t")
    assert 0 <= float(seconds) <= took + 0.05  # written with one decimal
    assert int(processes) >= 1
    assert 0.01 < float(memory) < 64
    assert running == "sub-01_T1w n4"


def test_lines_go_to_what_standard_error_is_now(monkeypatch):
    former, now = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", former)
    log_to_stderr()
    former.close()  # as a notebook's or a test's, when its cell is done
    monkeypatch.setattr(sys, "stderr", now)
    logging.getLogger("brainprior").info("still heard")
    assert "still heard" in now.getvalue()


def test_a_step_that_a_scan_does_not_have_is_not_counted(tmp_path, lines):
    scans = {"a_wf": "sub-01_T1w", "b_wf": "sub-01_T2w"}
    work = {"conform": 1.0, "templates": 9.0}
    folders = dict.fromkeys(scans, tmp_path)
    messages = Progress(scans, folders, work, left_out=["templates"], terminal=False)
    for name in ("a_wf.conform", "a_wf.templates", "b_wf.conform"):
        step = SimpleNamespace(fullname=f"brainprior_wf.{name}")
        messages(step, "start")
        messages(step, "end")
    assert lines[-1] == "[3/3] sub-01_T2w: conform done"
