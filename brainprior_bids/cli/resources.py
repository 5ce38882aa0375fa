# SPDX-License-Identifier: Apache-2.0
"""What this process may use: processors, memory, a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

from brainprior_bids.engine.errors import UsageError

_CGROUP = Path("/sys/fs/cgroup")
_UNITS_GB = {"K": 1 / 2**20, "M": 1 / 2**10, "G": 1.0, "T": 2.0**10}


def available_processors(cgroup: Path = _CGROUP) -> int:
    """Processors that this process may run on: its affinity, and its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            return max(1, min(count or 1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2: no quota known
    return count or 1


def available_memory_gb(cgroup: Path = _CGROUP) -> float:
    """Nine tenths of the machine's memory or of the container's limit, in GiB."""
    import psutil

    total = float(psutil.virtual_memory().total)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            total = min(total, float(limit))
    except (OSError, ValueError):
        pass  # no cgroup v2: no limit known
    return 0.9 * total / 2**30


def parse_memory_gb(text: str) -> float:
    """``8G``, ``8000M``, ``8000`` (MB, as in fMRIPrep) -> GiB.

    Raises
    ------
    ValueError
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"expected a size such as 8G, 8000M or 8000 (MB), got {text!r}")
    return float(match[1]) * _UNITS_GB[match[2] or "M"]


def resolve_device(asked: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu`` or ``cuda:N``.

    Raises
    ------
    UsageError
        If CUDA was asked for and this process sees no such GPU.
    """
    if asked == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda:0" if count else "cpu"
    index = int(asked.partition(":")[2] or 0)
    if index >= count:
        seen = f"{count} GPU(s)" if count else "no GPU"
        reason = "" if torch.version.cuda else " (this torch was built without CUDA)"
        raise UsageError(
            f"--device {asked}: this process sees {seen}{reason}. In a container pass "
            "`docker run --gpus all` or `apptainer run --nv`; or use --device cpu."
        )
    return f"cuda:{index}"
