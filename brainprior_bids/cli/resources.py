# SPDX-License-Identifier: Apache-2.0
"""What this process may use: processors, memory, a GPU."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

LOG = logging.getLogger("brainprior")
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
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu`` or ``cuda:N``; says which, and why.

    Raises
    ------
    UsageError
        If CUDA was asked for and this process sees no such GPU.
    """
    if asked == "cpu":
        return "cpu"  # without importing torch
    from brainprior_bids.engine.device import choose_device

    device, why, doubtful = choose_device(asked)
    LOG.log(logging.WARNING if doubtful else logging.INFO, "device %s: %s", device, why)
    return device
