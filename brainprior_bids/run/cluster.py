# SPDX-License-Identifier: Apache-2.0
"""Nipype's plugins for schedulers, with workarounds for their errors.

Problems of Nipype 1.11:

- The arguments of a workflow and of a node are joined without a space by some plugins, and
  ``-o`` and ``-e`` are looked for anywhere in them, so that ``--oversubscribe`` counts as one.
  Here every node gets its whole argument line, output files included, and Nipype joins nothing.
- LOGNAME must be set; batch jobs and containers often lack it.
- A job that the scheduler killed, or did not accept, ends the whole run with a TypeError or an
  IndexError. Here only its scan fails, and the others continue.
- The exit codes of sbatch and squeue are not checked: while Slurm does not answer, running jobs
  count as ended. Here the query is repeated.
- SLURMGraph returns once the jobs are submitted, and jobs whose predecessor failed wait forever.
  Here they are removed, and the run waits for the others.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipype.pipeline import engine as pe
from nipype.pipeline import plugins

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.failures import RecordsFailures, killed
from brainprior_bids.run.interrupt import check
from brainprior_bids.run.logs import LOG

LOST = (
    "The job of this step ended without a result: the scheduler killed it (memory, time), "
    "somebody cancelled it, or its machine failed."
)
REFUSED = "The scheduler did not accept the job of this step; check the arguments for it."
CANCEL = {"SLURM": "scancel", "SGE": "qdel", "PBS": "qdel", "LSF": "bkill", "OAR": "oardel"}
SILENCE_S = 600.0
"""How long a scheduler may fail to answer before its jobs count as lost."""
POLL_S = 2.0
RECORDS_GB = 0.4
MARGIN = 1.25
"""Ratio of requested to expected memory of a step; a job at its limit is killed."""


def make_batch_plugin(
    name: str,
    *,
    plugin_args: Mapping[str, Any],
    step_args: Mapping[str, Mapping[str, str]],
    workflow: pe.Workflow,
    status_callback: Any,
    tag: str,
) -> Any:
    """A plugin for ``workflow.run(plugin=...)``; sets the argument line of each node.

    Parameters
    ----------
    name : str
        SLURM, SLURMGraph, SGE, PBS, LSF or OAR.
    plugin_args, step_args : mappings
        Arguments from the plugin file.
    workflow : Workflow
        Its nodes' ``plugin_args`` are set.
    status_callback : function
        ``(node, event)``; SLURMGraph cannot call it.
    tag : str
        Label of this run, by which SLURMGraph finds its jobs.

    Raises
    ------
    UsageError
        If the work folder's name cannot be passed to a scheduler.
    """
    folder = Path(workflow.base_dir) / workflow.name / "batch"
    if set(str(folder)) & set(" \t\n'\"$&;()*?%"):
        raise UsageError(
            f"--work-dir {workflow.base_dir}: Nipype's plugin {name} does not quote paths; "
            "choose a folder without spaces and special characters."
        )
    if not os.environ.get("LOGNAME"):
        try:
            os.environ["LOGNAME"] = getpass.getuser()
        except (KeyError, OSError):  # a user id without a name
            os.environ["LOGNAME"] = f"uid{os.getuid()}"
    common = {key: str(value) for key, value in plugin_args.items() if key.endswith("_args")}
    own = {key: value for key, value in plugin_args.items() if key not in common}
    for node in workflow._get_all_nodes():
        extra = step_args.get(node.name, {})
        lines = {key: f"{common.get(key, '')} {extra.get(key, '')}" for key in {*common, *extra}}
        if name.startswith("SLURM"):
            line = lines.get("sbatch_args", "")
            lines["sbatch_args"] = _slurm(line, folder, tag=tag if "Graph" in name else None)
        elif "qsub_args" in lines:
            lines["qsub_args"] = _one_queue(lines["qsub_args"])
        filled = {key: _fill(value, node).strip() for key, value in lines.items()}
        node.plugin_args = {**filled, "overwrite": True}
    if name == "SLURMGraph":
        return WaitingGraph(plugin_args=own, tag=tag)
    base = getattr(plugins, f"{name}Plugin")
    plugin = (
        FaultTolerantSlurm
        if name == "SLURM"
        else type(f"FaultTolerant{name}", (_FaultTolerant, base), {})
    )
    return plugin(plugin_args={**own, "name": name, "status_callback": status_callback})


def _fill(line: str, node: pe.Node) -> str:
    mem_gb = MARGIN * (node.mem_gb if node.name != "records" else RECORDS_GB)
    for placeholder, value in {
        "{mem_mb}": f"{1024 * mem_gb:.0f}",
        "{mem_gb}": f"{mem_gb:.1f}",
        "{threads}": str(node.n_procs),
    }.items():
        line = line.replace(placeholder, value)
    return line


def _slurm(line: str, folder: Path, *, tag: str | None) -> str:
    """Add files for the output if the line names none, and the tag for a graph's jobs."""
    words = shlex.split(line)
    for short, long in (("-o", "--output"), ("-e", "--error")):
        given = any(
            word == long
            or word.startswith(f"{long}=")
            or (word.startswith(short) and not word.startswith("--"))
            for word in words
        )
        if not given:
            line += f" {short} {folder}/slurm-%j.out"
    if tag:
        line += f" --comment={tag} --kill-on-invalid-dep=yes"
    return line


def _one_queue(line: str) -> str:
    """Keep only the last of several queues: Grid Engine would use any of them."""
    return re.sub(r"(?<!\S)-q\s+\S+\s+(?=.*(?<!\S)-q\s)", "", line)


class _FaultTolerant(RecordsFailures):
    """Mix-in for Nipype's scheduler plugins: a lost job fails only its own scan."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__(plugin_args=plugin_args)
        self._name = plugin_args["name"]
        self._refused: dict[int, str] = {}

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        try:
            return super()._submit_job(node, updatehash=updatehash)
        except Exception as error:  # output of the scheduler's command
            LOG.warning("%s: %s", node.fullname, error)
            task = -1 - len(self._refused)
            self._refused[task] = f"{REFUSED} {' '.join(str(error).split())}"
            return task

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        if taskid in self._refused:
            return killed(self._refused[taskid])
        folder = self._pending.get(taskid)
        result = super()._get_result(taskid)
        if result is not None and isinstance(result["traceback"], str):
            return killed(f"{LOST} {_last_line(folder, taskid)}".strip())
        return result

    def _report_crash(self, node: Any, result: dict[str, Any] | None = None) -> str:
        if result is not None and isinstance(result["traceback"], str):
            result = {**result, "traceback": [result["traceback"]]}
        return super()._report_crash(node, result=result)

    def _clear_task(self, taskid: int) -> None:
        if taskid not in self._refused:
            super()._clear_task(taskid)

    def stop(self) -> None:
        """Cancel the jobs that are still known."""
        command = CANCEL[self._name]
        if self._pending:
            _quiet([command, *map(str, self._pending)])


class FaultTolerantSlurm(_FaultTolerant, plugins.SLURMPlugin):
    """SLURM that notices when sbatch or squeue fails."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__(plugin_args=plugin_args)
        self._silent_since: dict[int, float] = {}

    def _submit_batchtask(self, scriptfile: str, node: Any) -> int:
        name = ".".join(reversed(node.fullname.split(".")))
        line = [*shlex.split(node.plugin_args["sbatch_args"]), "-J", name, scriptfile]
        for tries_left in reversed(range(self._max_tries)):
            answer = _quiet(["sbatch", *line])
            if answer.returncode == 0:
                break
            if not tries_left:
                raise RuntimeError(answer.stderr.strip())
            time.sleep(self._retry_timeout)
        match = re.search(self._jobid_re, answer.stdout)
        if match is None:
            raise RuntimeError(f"expected a job number of sbatch, got {answer.stdout.strip()!r}")
        job = int(match[1])
        self._pending[job] = node.output_dir()
        return job

    def _is_pending(self, taskid: int) -> bool:
        answer = _quiet(["squeue", "-j", str(taskid)])
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            self._silent_since.pop(taskid, None)
            return str(taskid) in answer.stdout
        since = self._silent_since.setdefault(taskid, time.monotonic())
        LOG.debug("job %s: squeue: %s", taskid, answer.stderr.strip())
        return time.monotonic() - since < SILENCE_S


class WaitingGraph(RecordsFailures, plugins.SLURMGraphPlugin):
    """SLURMGraph that waits for its jobs."""

    def __init__(self, plugin_args: dict[str, Any], *, tag: str) -> None:
        # Nipype sets its default for this only if there are other arguments
        super().__init__(plugin_args={"dont_resubmit_completed_jobs": False, **plugin_args})
        self._tag = tag

    def _submit_graph(self, pyfiles: Any, dependencies: Any, nodes: Any) -> None:
        super()._submit_graph(pyfiles, dependencies, nodes)
        silent_since = None
        while True:
            check()
            jobs = self._jobs()
            if jobs is None:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > SILENCE_S:
                    raise RuntimeError(f"squeue has not answered for {SILENCE_S:.0f} s.")
            elif not jobs:
                return
            else:
                silent_since = None
            time.sleep(POLL_S)

    def _jobs(self) -> list[str] | None:
        """Numbers of this run's jobs that wait or run; None if Slurm does not answer."""
        answer = _quiet(["squeue", "--noheader", "--format=%A %k"])
        if answer.returncode:
            return None
        rows = [line.split() for line in answer.stdout.splitlines()]
        return [row[0] for row in rows if row[1:] == [self._tag]]

    def stop(self) -> None:
        """Cancel the remaining jobs."""
        jobs = self._jobs()
        if jobs:
            _quiet(["scancel", *jobs])


def _quiet(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(folder: str | None, taskid: int) -> str:
    """The last line that a job of Slurm or Grid Engine wrote: often the reason why it ended."""
    if folder is None:
        return ""
    for parent in Path(folder).parents:
        for pattern in (f"slurm-{taskid}.out", f"*.e{taskid}"):
            for output in (parent / "batch").glob(pattern):
                lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
                messages = [line.strip() for line in lines if line.strip()]
                return f"Its last output: {messages[-1]}" if messages else ""
    return ""
