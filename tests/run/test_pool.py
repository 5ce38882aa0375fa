# SPDX-License-Identifier: Apache-2.0
"""A worker that is killed neither hangs the run nor takes other nodes with it."""

from __future__ import annotations

import itertools

import pytest
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    SimpleInterface,
    TraitedSpec,
    traits,
)
from nipype.interfaces.utility import Function, Merge
from nipype.pipeline import engine as pe

from brainprior_bids.run.pool import KILLED, SurvivingPool

pytestmark = pytest.mark.timeout(120)


def die_once(folder, value):
    """Killed in its first run, once the node beside it has begun."""
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
    """Ends only when it is run again: the loss of its pool must interrupt the first run."""
    import threading
    from pathlib import Path

    if not (Path(folder) / "began").exists():
        (Path(folder) / "began").touch()
        threading.Event().wait()
    return value


def instant(value):
    return value


def node(function, name, inputs, **values):
    made = pe.Node(Function(inputs, ["out"], function), name=name)
    made.inputs.trait_set(**values)
    return made


def run(tmp_path, nodes):
    workflow = pe.Workflow(name="wf", base_dir=str(tmp_path))
    workflow.add_nodes(nodes)
    workflow.config["execution"] = {
        "crashdump_dir": str(tmp_path / "crash"),
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
    """By what the scheduler starts and sees end, not by the clock."""
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
