# SPDX-License-Identifier: Apache-2.0
"""Run every step in this process, one by one: for ``--debug``, or if no worker can start."""

from __future__ import annotations

from typing import Any

from nipype.pipeline.plugins.base import DistributedPluginBase

from brainprior_bids.run.failures import RecordsFailures
from brainprior_bids.run.pool import run_step


class InTurn(RecordsFailures, DistributedPluginBase):
    """Nipype's base for workers, whose only worker is this process."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__(plugin_args={**plugin_args, "max_jobs": 1})
        self._results: dict[int, dict[str, Any]] = {}

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        task = len(self._results)
        self._results[task] = run_step(node, updatehash, task)
        return task

    def _get_result(self, taskid: int) -> dict[str, Any]:
        return self._results[taskid]

    def _clear_task(self, taskid: int) -> None:
        self._results[taskid] = {}  # its number is not used again

    def stop(self) -> None:
        """Nothing to close: there are no other processes."""
