# SPDX-License-Identifier: Apache-2.0
"""Base class of every node: threads, measured time and memory, and a readable failure.

A node writes ``node.json`` into its folder (time, peak memory, threads, warnings), which the last
node copies into the provenance. A node that fails writes ``failure.json``, from which the command
reports in one sentence why the scan failed; the traceback is in Nipype's crash file.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from brainprior_bids.background import Background
from brainprior_bids.bids.files import write_json
from brainprior_bids.bids.fingerprint import code_version
from brainprior_bids.records import FailureRecord, NodeRecord

RECORD = "node.json"
FAILURE = "failure.json"


class MeasuredInputSpec(BaseInterfaceInputSpec):
    """Inputs of every node."""

    num_threads = traits.Range(
        low=1, value=1, usedefault=True, nohash=True, desc="threads the node may use"
    )
    code_version = traits.Str(
        code_version(),
        usedefault=True,
        desc="results of another version of the code are not reused",
    )


class MeasuredOutputSpec(TraitedSpec):
    """Outputs of every node."""

    record = File(desc="time, peak memory, threads and warnings of this node, JSON")


class MeasuredInterface(SimpleInterface):
    """An interface whose work is one method, ``_work``."""

    input_spec = MeasuredInputSpec
    output_spec = MeasuredOutputSpec

    _work: Callable[[Path], list[str]]
    """Do the work in the node's folder, put the paths of the outputs into ``self._results``, and
    return the warnings. Defined by every interface."""

    def _run_interface(self, runtime: Any) -> Any:
        import torch

        folder = Path(runtime.cwd)
        torch.set_num_threads(int(self.inputs.num_threads))
        meter = Meter()
        try:
            with meter:
                warnings = self._work(folder)
        except Exception as error:
            failure = FailureRecord.of(error, node=type(self).__name__, **meter.facts())
            with suppress(OSError):  # perhaps a full disk: the original error is the important one
                write_json(folder / FAILURE, failure.to_json())
            raise
        finally:
            release_memory()
        record = NodeRecord(
            node=type(self).__name__,
            threads=int(self.inputs.num_threads),
            warnings=tuple(warnings),
            **meter.facts(),
        )
        self._results["record"] = str(write_json(folder / RECORD, record.to_json()))
        return runtime


def release_memory() -> None:
    """Return free memory to the system, because a worker may wait long for its next node.

    glibc keeps freed memory: 1.5 GiB in a worker that had restored a head, 0.4 after this.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class Meter:
    """Wall time, processor time and peak memory of a block, measured while it runs.

    The resident memory of this process is read every 50 ms: a worker is used for many nodes, so
    the system's own high-water mark would show the largest of them. GPU memory is the maximum of
    torch's allocator.
    """

    interval_s = 0.05

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._thread = Background(self._watch)
        self._peak = 0
        self._gpu = 0
        self._seconds = 0.0
        self._cpu = 0.0

    def __enter__(self) -> Meter:
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._clock = time.monotonic()
        self._cpu_clock = time.process_time()
        self._baseline = self._peak = self._process.memory_info().rss
        self._reset_gpu()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.end()
        self._peak = max(self._peak, self._process.memory_info().rss)
        self._seconds = time.monotonic() - self._clock
        self._cpu = time.process_time() - self._cpu_clock
        self._gpu = self._gpu_peak()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self.interval_s):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @staticmethod
    def _reset_gpu() -> None:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    @staticmethod
    def _gpu_peak() -> int:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0

    def facts(self) -> dict[str, Any]:
        """Start (UTC), seconds, processor seconds, peak and added memory in GiB."""
        gib = 2**30
        return {
            "started": self.started,
            "seconds": round(self._seconds, 3),
            "cpu_seconds": round(self._cpu, 3),
            "peak_memory_gb": round(self._peak / gib, 3),
            "added_memory_gb": round((self._peak - self._baseline) / gib, 3),
            "gpu_memory_gb": round(self._gpu / gib, 3),
        }
