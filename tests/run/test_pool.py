# SPDX-License-Identifier: Apache-2.0
"""A killed worker neither hangs the run nor makes other nodes fail."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    SimpleInterface,
    TraitedSpec,
    traits,
)
from nipype.interfaces.utility import Function, Merge
from nipype.pipeline import engine as pe

from brainprior_bids.records import FULL_DISK
from brainprior_bids.run.failures import KILLED_WORKER
from brainprior_bids.run.pool import KILLED, SurvivingPool

# Jobs here wait for each other: wrongly scheduled ones end at this limit. With twice as many
# busy programs as cores a test took 14 s.
pytestmark = pytest.mark.timeout(300)


def die_once(folder, value):
    """Killed in its first run, after the other node has started."""
    import os
    import signal
    import time
    from pathlib import Path

    while not (Path(folder) / "began").exists():
        time.sleep(0.01)
    if not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die(folder, value):
    import os
    import signal
    import time
    from pathlib import Path

    while not (Path(folder) / "began").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def unfinished(folder, value):
    """Ends only in its second run: the loss of its pool must interrupt the first."""
    import threading
    from pathlib import Path

    if not (Path(folder) / "began").exists():
        (Path(folder) / "began").touch()
        threading.Event().wait()
    return value


def instant(value):
    return value


def node(function, name, inputs, **values):
    output = pe.Node(Function(inputs, ["out"], function), name=name)
    output.inputs.trait_set(**values)
    return output


def run(tmp_path, nodes, crash_dir="crash"):
    workflow = pe.Workflow(name="wf", base_dir=str(tmp_path))
    workflow.add_nodes(nodes)
    workflow.config["execution"] = {
        "crashdump_dir": str(tmp_path / crash_dir),
        "crashfile_format": "txt",
        "poll_sleep_duration": "0.1",
    }
    events: list[tuple[str, str]] = []
    plugin = SurvivingPool(
        plugin_args={
            "n_procs": 2,
            "memory_gb": 4,
            "mp_context": "forkserver",
            "order": [n.name for n in nodes],
            "status_callback": lambda n, event: events.append((n.name, event)),
        }
    )
    try:
        workflow.run(plugin=plugin)
    finally:
        run.events = events
        run.failures = plugin.failures
    return events


def test_a_scan_is_finished_before_another_is_begun(tmp_path):
    """A node that only gathers results, as ``records`` does, does not wait for all scans."""
    workflow = pe.Workflow("wf", base_dir=str(tmp_path))
    workflow.config["execution"] = {"poll_sleep_duration": "0.1"}
    for scan in "abc":
        first = node(instant, "first", ["value"], value=1)
        gather = pe.Node(Merge(1), name="records", run_without_submitting=True)
        last = node(instant, "last", ["value"])
        one = pe.Workflow(scan)
        one.connect([(first, gather, [("out", "in1")]), (gather, last, [("out", "value")])])
        workflow.add_nodes([one])
    ended = []
    plugin = SurvivingPool(
        plugin_args={
            "n_procs": 1,
            "memory_gb": 4,
            "mp_context": "forkserver",
            "order": ["first", "last"],
            "status_callback": lambda n, event: event == "end" and ended.append(n.fullname),
        }
    )
    workflow.run(plugin=plugin)
    assert ended.index("wf.a.last") < ended.index("wf.c.first")


def test_a_node_killed_once_is_run_again(tmp_path):
    nodes = [
        node(unfinished, "beside", ["folder", "value"], folder=str(tmp_path), value=1),
        node(die_once, "victim", ["folder", "value"], folder=str(tmp_path), value=2),
    ]
    events = run(tmp_path, nodes)
    assert sorted(name for name, event in events if event == "end") == ["beside", "victim"]
    assert not list((tmp_path).glob("crash/*"))


def test_a_node_killed_twice_fails_alone(tmp_path):
    nodes = [
        node(unfinished, "beside", ["folder", "value"], folder=str(tmp_path), value=1),
        node(die, "victim", ["folder", "value"], folder=str(tmp_path), value=2),
        node(instant, "later", ["value"], value=3),
    ]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, nodes)
    ended = {name: event for name, event in run.events if event != "start"}
    assert ended == {"beside": "end", "victim": "exception", "later": "end"}
    (crash,) = (tmp_path / "crash").glob("*.txt")
    assert KILLED in crash.read_text()
    failure = run.failures["wf.victim"]
    assert (failure.record.type, failure.record.message) == (KILLED_WORKER, KILLED)
    assert failure.crash_file == crash


def fill(value):
    import errno

    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("crash_dir", ["crash", "a file/crash"])
def test_a_full_disk_is_recorded_without_any_file(tmp_path, crash_dir):
    """If the crash file cannot be written, the other nodes are run nevertheless."""
    (tmp_path / "a file").touch()
    nodes = [node(fill, "full", ["value"], value=1), node(instant, "later", ["value"], value=2)]
    with pytest.raises(RuntimeError):
        run(tmp_path, nodes, crash_dir=crash_dir)
    ended = {name: event for name, event in run.events if event != "start"}
    assert ended == {"full": "exception", "later": "end"}
    failure = run.failures["wf.full"]
    assert failure.record.type == FULL_DISK
    assert (failure.crash_file is None) == (crash_dir != "crash")


IN_PROCESS = """
import contextlib, os, signal, sys
import psutil
from nipype.pipeline import engine as pe
from nipype.interfaces.utility import Function
from brainprior_bids.records import FULL_DISK
from brainprior_bids.run.failures import KILLED_WORKER
from brainprior_bids.run.pool import SurvivingPool

def instant(value):
    return value

if __name__ == "__main__":
    workflow = pe.Workflow("wf", base_dir=sys.argv[1])
    made = pe.Node(Function(["value"], ["out"], instant), name="a")
    made.inputs.value = 1
    workflow.add_nodes([made])
    plugin = SurvivingPool(plugin_args={
        "n_procs": 1, "memory_gb": 4, "mp_context": "forkserver", "order": ["a"]})
    workflow.run(plugin=plugin)
    children = psutil.Process().children(recursive=True)
    named = [c for c in children if sys.argv[2] in " ".join(c.cmdline())]
    for child in named:
        child.send_signal(getattr(signal, sys.argv[3]))
    if sys.argv[3] == "SIGKILL":
        psutil.wait_procs(named)
    plugin.stop()
    print(len(named))
"""


@pytest.mark.parametrize(
    ("process", "signal"), [("resource_tracker", "SIGKILL"), ("forkserver", "SIGINT")]
)
def test_nothing_is_shown_of_a_helper_that_a_signal_meets(tmp_path, process, signal):
    """The tracker of semaphores killed; Ctrl-C, which a terminal sends to every process."""
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESS)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), process, signal],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(result.stdout.split()[-1]) >= 1
    assert "Traceback" not in result.stderr
    assert "leaked" not in result.stderr


class _GpuSpec(BaseInterfaceInputSpec):
    use_gpu = traits.Bool(True, usedefault=True)


class Gpu(SimpleInterface):
    """As ``Restore`` for the scheduler: a GPU node by its trait."""

    input_spec = _GpuSpec
    output_spec = TraitedSpec

    def _run_interface(self, runtime):
        return runtime


def most_at_once(events):
    """The largest number of nodes that were started and had not ended, in the order of events."""
    running = itertools.accumulate(1 if event == "start" else -1 for event in events)
    return max(running)


@pytest.mark.parametrize("slots", [1, 3])
def test_so_many_restorations_at_once_as_the_gpu_has_slots(tmp_path, slots):
    """From the scheduler's events, not by the clock."""
    nodes = [pe.Node(Gpu(), name=f"restore{number}") for number in range(3)]
    workflow = pe.Workflow(name="wf", base_dir=str(tmp_path))
    workflow.add_nodes(nodes)
    workflow.config["execution"] = {"poll_sleep_duration": "0.1"}
    events = []
    plugin = SurvivingPool(
        plugin_args={
            "n_procs": 4, "memory_gb": 9, "n_gpu_procs": slots, "raise_insufficient": False,
            "mp_context": "forkserver", "order": [n.name for n in nodes],
            "status_callback": lambda node, event: events.append(event),
        }
    )  # fmt: skip
    workflow.run(plugin=plugin)
    assert sorted(events) == ["end"] * 3 + ["start"] * 3
    assert most_at_once(events) == slots
