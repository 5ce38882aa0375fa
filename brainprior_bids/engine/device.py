# SPDX-License-Identifier: Apache-2.0
"""Which device is used, and why; a requested GPU that is missing stops the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from brainprior_bids.engine.errors import UsageError

HOW = "In a container pass `docker run --gpus all` or `apptainer run --nv`"
_DRIVER = Path("/proc/driver/nvidia/version")
_PROMISED = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES")


def visible_gpus() -> int:
    """How many CUDA devices this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if it exists for this machine and this torch.

    Raises
    ------
    UsageError
        If torch does not know the name, or the device does not exist.
    """
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: expected 'cpu' or 'cuda:N', got {device!r}.") from error
    if torch_device.type == "cuda":
        count = visible_gpus()
        if (torch_device.index or 0) >= count:
            raise UsageError(
                f"device: {torch_device} requested, but torch sees {count} CUDA device(s) here. "
                "Use 'cpu', or check the driver (in a container: --gpus all, --nv)."
            )
    return torch_device


def choose_device(
    asked: str, *, environ: Mapping[str, str] | None = None, driver: Path = _DRIVER
) -> tuple[str, str, bool]:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns
    -------
    device : ``cpu`` or ``cuda:N``
    why : one phrase for the log
    unexpected : True if a GPU was probably intended, and the CPU is used

    Raises
    ------
    UsageError
        If CUDA was requested and this process sees no such GPU, or cannot compute on it.
    """
    if asked == "cpu":
        return "cpu", "requested", False
    count = visible_gpus()
    build = "" if torch.version.cuda else "this torch was built without CUDA"
    if asked == "auto" and not count:
        return _no_gpu(build, os.environ if environ is None else environ, driver)
    index = int(asked.partition(":")[2] or 0)
    if index >= count:
        gpus = f"{count} GPU(s)" if count else "no GPU"
        raise UsageError(
            f"--device {asked}: this process sees {gpus}{f' ({build})' if build else ''}. "
            f"{HOW}; or use --device cpu."
        )
    device = f"cuda:{index}"
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        raise UsageError(
            f"--device {asked}: {device} is visible, but nothing can be computed on it "
            f"({str(error).splitlines()[0]}). Does this torch, built for CUDA "
            f"{torch.version.cuda}, fit the driver? Or use --device cpu."
        ) from error
    name = torch.cuda.get_device_name(device)
    return device, f"{'requested' if asked != 'auto' else 'found'}: {name}", False


def _no_gpu(build: str, environ: Mapping[str, str], driver: Path) -> tuple[str, str, bool]:
    """``auto`` without a GPU: the CPU, and whether that may be a mistake."""
    named = [name for name in _PROMISED if environ.get(name) not in (None, "", "-1")]
    sign = f"{named[0]}={environ[named[0]]}" if named else ""
    if not sign and driver.exists():
        sign = "this machine has NVIDIA's driver"
    if not sign:
        return "cpu", "no GPU found", False
    if build:
        return "cpu", f"{sign}, but {build}: use the CUDA variant for the GPU", True
    return "cpu", f"{sign}, but no GPU is visible. {HOW}", True
