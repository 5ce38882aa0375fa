# SPDX-License-Identifier: Apache-2.0
"""Devices, checked before work starts."""

from __future__ import annotations

import torch

from brainprior_bids.engine.errors import UsageError


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this machine and this torch have it.

    Raises
    ------
    UsageError
        If the name is none of torch's, or the device is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: expected 'cpu' or 'cuda:N', got {device!r}.") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise UsageError(
                f"device: {found} asked for, but torch sees {count} CUDA device(s) here. Use "
                "'cpu', or check the driver (in a container: --gpus all, --nv)."
            )
    return found
