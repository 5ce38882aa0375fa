# SPDX-License-Identifier: Apache-2.0
"""Nipype's MultiProc, made to end where it would hang.

A worker that the system kills (out of memory, most often) breaks the whole pool: MultiProc then
waits for ever for a result that cannot come. Here the nodes that were running are reported as
failed, a new pool is started, and the other scans go on.
"""

from __future__ import annotations

import multiprocessing as mp
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer, run_node

KILLED = (
    "A worker process was killed while this step, or one beside it, was running. Most often "
    "memory ran out: give --mem less than the machine has, or a smaller --nprocs."
)


class SurvivingPool(MultiProcPlugin):
    """MultiProc whose pool is replaced when a worker is killed."""

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        task = self._taskid
        try:
            future = self.pool.submit(run_node, node, updatehash, task)
        except BrokenProcessPool:
            self._renew()
            future = self.pool.submit(run_node, node, updatehash, task)
        future.add_done_callback(lambda done: self._collect(done, task))
        self._task_obj[task] = future
        return task

    def _collect(self, future: Future[dict[str, Any]], task: int) -> None:
        try:
            self._taskresult[task] = future.result()
        except BaseException as error:
            # future.result() raises what broke the pool; a node's own error comes as a result
            text = f"{KILLED} ({type(error).__name__}: {error})"
            self._taskresult[task] = {"result": None, "traceback": [text], "taskid": task}

    def _renew(self) -> None:
        self.pool.shutdown(wait=False)
        self.pool = ProcessPoolExecutor(
            max_workers=self.processors,
            initializer=process_initializer,
            initargs=(self._cwd,),
            mp_context=mp.get_context(self.plugin_args.get("mp_context")),
        )
