# SPDX-License-Identifier: Apache-2.0
"""What this process may use: processors, memory, a GPU."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

LOG = logging.getLogger("brainprior")
_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self/cgroup")
_UNITS_GB = {"K": 1 / 2**20, "M": 1 / 2**10, "G": 1.0, "T": 2.0**10}


def available_processors(cgroup: Path = _CGROUP, proc: Path = _PROC) -> int:
    """Processors that this process may run on: its affinity, and its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [float(count or 1)]
    for folder in _groups("cpu", cgroup, proc):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) // int(words[1]))
    return max(1, int(min(quotas)))


def available_memory_gb(cgroup: Path = _CGROUP, proc: Path = _PROC) -> float:
    """Nine tenths of the machine's memory or of the container's or job's limit, in GiB."""
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for folder in _groups("memory", cgroup, proc):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0] != "max":
                limits.append(float(words[0]))
    return 0.9 * min(limits) / 2**30


def _groups(controller: str, cgroup: Path, proc: Path) -> list[Path]:
    """Folders of this process's group and of those above it: version 2, and version 1.

    In a container the group's own path is often not visible; then its root is the group.
    """
    folders = []
    for line in _lines(proc):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = cgroup
        elif controller in controllers.split(","):
            top = cgroup / controller
        else:
            continue
        own = top / path.strip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return folders or [cgroup, cgroup / controller]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no such version of cgroups here, or no Linux
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


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
