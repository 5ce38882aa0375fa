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


def die_once(marker, value):
    import os
    import signal
    from pathlib import Path

    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die(value):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def slow(value):
    import time

    time.sleep(1.0)
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
        node(slow, "beside", ["value"], value=1),
        node(die_once, "victim", ["marker", "value"], marker=str(tmp_path / "m"), value=2),
    ]
    events = run(tmp_path, nodes)
    assert sorted(name for name, event in events if event == "end") == ["beside", "victim"]
    assert not list((tmp_path).glob("crash/*"))


def test_a_node_killed_twice_fails_alone(tmp_path):
    nodes = [
        node(slow, "beside", ["value"], value=1),
        node(die, "victim", ["value"], value=2),
        node(slow, "later", ["value"], value=3),
    ]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, nodes)
    ended = {name: event for name, event in run.events if event != "start"}
    assert ended == {"beside": "end", "victim": "exception", "later": "end"}
    (crash,) = (tmp_path / "crash").glob("*.txt")
    assert KILLED in crash.read_text()


class _TimesSpec(BaseInterfaceInputSpec):
    use_gpu = traits.Bool(True, usedefault=True)


class _TimesOutput(TraitedSpec):
    began = traits.Float()
    ended = traits.Float()


class Times(SimpleInterface):
    """As ``Restore`` for the scheduler: a GPU node by its trait; it says when it ran."""

    input_spec = _TimesSpec
    output_spec = _TimesOutput

    def _run_interface(self, runtime):
        import time

        self._results["began"] = time.time()
        time.sleep(0.5)
        self._results["ended"] = time.time()
        return runtime


@pytest.mark.parametrize("slots", [1, 3])
def test_so_many_restorations_at_once_as_the_gpu_has_slots(tmp_path, slots):
    nodes = [pe.Node(Times(), name=f"restore{number}") for number in range(3)]
    workflow = pe.Workflow(name="wf", base_dir=str(tmp_path))
    workflow.add_nodes(nodes)
    workflow.config["execution"] = {"poll_sleep_duration": "0.1"}
    plugin = SurvivingPool(
        plugin_args={
            "n_procs": 4, "memory_gb": 9, "n_gpu_procs": slots, "raise_insufficient": False,
            "mp_context": "forkserver", "order": [n.name for n in nodes],
        }
    )  # fmt: skip
    ran = workflow.run(plugin=plugin)
    spans = sorted((n.result.outputs.began, n.result.outputs.ended) for n in ran.nodes())
    overlaps = sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
    assert overlaps == (0 if slots == 1 else 2)
