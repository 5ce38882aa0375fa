# SPDX-License-Identifier: Apache-2.0
"""The resources of this process: processors, memory, a GPU."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

CGROUP = Path("/sys/fs/cgroup")
"""Mount point of the control groups."""
PROC = Path("/proc/self/cgroup")
"""File that lists the control groups of this process."""
MAIN_GB = 1.0
"""Memory of a run in addition to its steps: the command (0.35 GiB) and idle workers (0.25
each)."""


def available_processors(cgroup: Path | None = None, proc: Path | None = None) -> int:
    """Processors that this process may run on: its affinity, and its container's quota.

    ``CGROUP`` and ``PROC`` are read unless other places are given.
    """
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


def memory_limit_gb(
    cgroup: Path | None = None,
    proc: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[float, str]:
    """GiB that this process and its children may use together, and what limits them.

    The smallest of the machine's memory, the limits of the control groups (versions 1 and 2) that
    this process is in, and what Slurm gave the job: not every site enforces that by groups.
    ``CGROUP`` and ``PROC`` are read unless other places are given.
    """
    import psutil

    limits = [(float(psutil.virtual_memory().total), "this machine has")]
    for folder in _groups("memory", cgroup, proc):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0] != "max":
                limits.append((float(words[0]), f"the container or job has ({folder / name})"))
    environ = os.environ if environ is None else environ
    job_mb = _slurm_mb(environ, "SLURM_MEM_PER_NODE") or (
        _slurm_mb(environ, "SLURM_MEM_PER_CPU") * _slurm_number(environ, "SLURM_CPUS_ON_NODE")
    )
    if job_mb:
        limits.append((job_mb * 2**20, "the Slurm job has"))
    bytes_, who = min(limits, key=lambda limit: limit[0])
    return bytes_ / 2**30, who


def _slurm_mb(environ: Mapping[str, str], name: str) -> float:
    """Megabytes, which Slurm writes without a unit; users also write ``8G``. 0 if unknown."""
    text = environ.get(name, "0")
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMGT]?)I?B?\s*", text.upper())
    if match is None:
        LOG.warning("%s is %.40r, not a size such as 8000 (MB) or 8G: ignored", name, text)
        return 0.0
    return float(match[1]) * {"K": 2**-10, "": 1, "M": 1, "G": 2**10, "T": 2**20}[match[2]]


def _slurm_number(environ: Mapping[str, str], name: str) -> int:
    """The first number of ``4`` or ``4(x2)``; 0 if there is none."""
    match = re.match(r"\s*([0-9]{1,6})", environ.get(name, ""))
    return int(match[1]) if match else 0


def memory_for_steps_gb(limit_gb: float) -> float:
    """Memory for the steps: all but a tenth, or all but ``MAIN_GB`` if that leaves less."""
    return max(0.0, min(0.9 * limit_gb, limit_gb - MAIN_GB))


def fit_memory(
    settings: Settings, *, largest_gb: float, largest_low_gb: float, limit: tuple[float, str]
) -> Settings:
    """Settings whose steps fit into the available memory; otherwise refuse before anything runs.

    Parameters
    ----------
    settings : Settings
        ``mem_gb`` is the value of ``--mem``, or the available memory.
    largest_gb, largest_low_gb : float
        Memory that the largest step reserves, without and with ``--low-mem``.
    limit : (float, str)
        Limit in GiB and its origin, from ``memory_limit_gb``.

    Raises
    ------
    UsageError
        With the required and the available memory.
    """
    limit_gb, who = limit
    available_gb = memory_for_steps_gb(limit_gb)
    steps_gb = min(settings.mem_gb, available_gb)
    if settings.mem_gb > available_gb + 0.01:
        LOG.warning(
            "--mem %.3g GiB is more than is available: %s %.3g GiB; the steps get %.3g",
            settings.mem_gb,
            who,
            limit_gb,
            available_gb,
        )
    needed_gb = largest_low_gb if settings.low_mem else largest_gb
    if steps_gb + 0.01 >= needed_gb:
        return replace(settings, mem_gb=steps_gb)
    if available_gb < needed_gb:
        available = f"{who} {limit_gb:.3g} GiB"
        give = f"Give it {needed_gb + MAIN_GB:.3g} GiB"
    else:
        available = f"--mem allows its steps {settings.mem_gb:.3g} GiB"
        give = f"Pass --mem {needed_gb:.3g}G"
    low = f", or pass --low-mem, with which {largest_low_gb + MAIN_GB:.3g} GiB are enough"
    raise UsageError(
        f"not enough memory: the largest step needs up to {needed_gb:.3g} GiB and the command "
        f"itself {MAIN_GB:.3g}; {available}. {give}{'' if settings.low_mem else low}."
    )


def _groups(controller: str, cgroup: Path | None, proc: Path | None) -> list[Path]:
    """Folders of this process's group and of those above it: version 2, and version 1.

    In a container the group's own path is often not visible; then its root is the group.
    """
    cgroup, proc = cgroup or CGROUP, proc or PROC
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
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no such version of cgroups here, or no Linux
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def resolve_device(requested: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu`` or ``cuda:N``; logs the reason.

    Raises
    ------
    UsageError
        If CUDA was requested and this process sees no such GPU.
    """
    if requested == "cpu":
        return "cpu"  # without importing torch
    from brainprior_bids.engine.device import choose_device

    device, why, unexpected = choose_device(requested)
    LOG.log(logging.WARNING if unexpected else logging.INFO, "device %s: %s", device, why)
    return device
