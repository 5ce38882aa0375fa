# SPDX-License-Identifier: Apache-2.0
"""Nipype's MultiProc, changed so that it does not hang and reruns a step whose worker died.

If the system kills a worker (usually because memory ran out), the whole pool breaks, and MultiProc
waits forever for a result that cannot come. Here, every node that was running is run once more,
alone, in a new pool. A node whose worker is killed again has failed; the other scans continue.

No worker outlives the run. If the run is interrupted, it ends them; if it is killed, they notice
this and end.

Of the nodes that can run, the one nearest to the end of its scan is run first, so that results
appear one by one, not all at the end.

If memory runs out, the kernel kills a worker, not the process that waits for it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from traceback import format_exception
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer

from brainprior_bids.records import FailureRecord
from brainprior_bids.run.environment import revive_tracker, use_utf8
from brainprior_bids.run.failures import RecordsFailures, killed
from brainprior_bids.run.logs import LOG

KILLED = (
    "The worker process of this step was killed, twice. Most often memory ran out: "
    "run it on a machine with more, or stop other programs."
)


WATCH_S = 2.0
EXPENDABLE = 500
"""``oom_score_adj`` of a worker: the kernel kills workers before the command."""


def start_server(context: str | None) -> None:
    """Start the process that starts the workers; it and the workers ignore Ctrl-C."""
    if context != "forkserver" or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def start_worker(cwd: str, main_pid: int) -> None:
    """Nipype's own initializer, and a thread that ends this worker when the run is gone."""
    use_utf8()
    process_initializer(cwd)
    with suppress(OSError):  # no Linux, or a sandbox: the kernel kills the largest process
        Path("/proc/self/oom_score_adj").write_text(str(EXPENDABLE))

    def watch() -> None:
        parent = mp.parent_process()
        sentinels: list[Any] = [] if parent is None else [parent.sentinel]
        while not wait(sentinels, timeout=WATCH_S):  # a worker started later may hold it open
            try:
                os.kill(main_pid, 0)
            except ProcessLookupError:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_step(node: Any, updatehash: bool, task: int) -> dict[str, Any]:
    """Run a node, as Nipype's ``run_node``; an error is also returned as a record."""
    try:
        return {"result": node.run(updatehash=updatehash), "traceback": None, "taskid": task}
    except Exception as error:
        return {
            "result": None,
            "traceback": format_exception(error),
            "failure": FailureRecord.of(error),
            "taskid": task,
        }


class SurvivingPool(RecordsFailures, MultiProcPlugin):
    """MultiProc whose pool is replaced when a worker is killed.

    Parameters
    ----------
    plugin_args : dict
        MultiProc's, and ``order``: the nodes' names from first to last.
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        start_server(plugin_args.get("mp_context"))
        super().__init__(plugin_args=plugin_args)
        self.pool.shutdown()  # Nipype's: no worker was started yet
        self.pool = self._new_pool()
        self._order = {name: rank for rank, name in enumerate(plugin_args["order"])}
        self._submitted: dict[int, tuple[Any, bool]] = {}
        self._broken: set[int] = set()

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        """Called by Nipype in a loop; see ``revive_tracker``."""
        revive_tracker()
        super()._send_procs_to_workers(updatehash=updatehash, graph=graph)

    def _sort_jobs(self, jobids: Any, scheduler: str = "tsort") -> list[int]:
        """Sort jobs by their rank in the order, highest first; jobs without a rank, which only
        gather results, are before all others.
        """
        last = len(self._order)
        return sorted(jobids, key=lambda job: (-self._order.get(self.procs[job].name, last), job))

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        task = self._taskid
        self._submitted[task] = (node, updatehash)
        try:
            future = self.pool.submit(run_step, node, updatehash, task)
        except BrokenProcessPool:
            self._renew()
            future = self.pool.submit(run_step, node, updatehash, task)
        self._watch_workers()
        self._task_obj[task] = future
        future.add_done_callback(lambda done: self._collect(done, task))
        return task

    def _collect(self, future: Future[dict[str, Any]], task: int) -> None:
        try:
            self._taskresult[task] = future.result()
        except BrokenProcessPool:
            self._broken.add(task)
        except BaseException as error:  # a result that cannot be sent, an interrupt, an exit
            self._taskresult[task] = {
                "result": None,
                "traceback": format_exception(error),
                "failure": FailureRecord.of(error),
            }

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        if taskid in self._broken:
            self._broken.remove(taskid)
            self._taskresult[taskid] = self._rerun(taskid)
        return self._taskresult.get(taskid)

    def _rerun(self, task: int) -> dict[str, Any]:
        """Run a task alone, in a new pool, and wait for it."""
        node, updatehash = self._submitted[task]
        LOG.warning("A worker was killed; %s is run again, alone.", node.fullname)
        self._renew()
        try:
            return self.pool.submit(run_step, node, updatehash, task).result()
        except BrokenProcessPool:
            self._renew()
            return killed(KILLED)

    def _clear_task(self, taskid: int) -> None:
        super()._clear_task(taskid)
        del self._submitted[taskid]

    def stop(self) -> None:
        """End the workers at once; unfinished work is lost."""
        revive_tracker()
        workers = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()

    def _watch_workers(self) -> None:
        """Have the pool watch the worker that it started last.

        ``submit`` wakes the pool's thread, which then waits for the existing workers, and only
        afterwards starts one more: the death of that one would not be noticed before the end of
        another task.
        """
        with self.pool._shutdown_lock:
            if (wakeup := self.pool._executor_manager_thread_wakeup) is not None:
                wakeup.wakeup()

    def _renew(self) -> None:
        revive_tracker()
        self.pool.shutdown(wait=False)
        self.pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=self.processors,
            initializer=start_worker,
            initargs=(self._cwd, os.getpid()),
            mp_context=mp.get_context(self.plugin_args.get("mp_context")),
        )
