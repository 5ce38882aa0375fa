# SPDX-License-Identifier: Apache-2.0
"""LPIPS (Zhang et al., CVPR 2018), if it is installed with its network's weights.

Nothing is downloaded: without the package ``lpips``, or without AlexNet's weights in torch's own
cache, there is no value.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)
BACKBONE = "alexnet-*.pth"
SLICES = 8


@cache
def _network() -> Any:
    """The metric, or None with a line in the log."""
    if find_spec("lpips") is None:
        log.info("LPIPS is omitted: the package lpips is not installed.")
        return None
    cached = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(cached.glob(BACKBONE)):
        log.info("LPIPS is omitted: %s has no %s; nothing is downloaded.", cached, BACKBONE)
        return None
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


@torch.no_grad()
def lpips_distance(
    image: NDArray[np.float32], truth: NDArray[np.float32], inside: NDArray[np.bool_]
) -> float | None:
    """Mean LPIPS over ``SLICES`` planes per axis; None if LPIPS is not available.

    Parameters
    ----------
    image, truth : (i, j, k) arrays
        Clipped to 0-1, set to 0 outside the mask, and mapped to -1 to 1.
    inside : (i, j, k) bool array
    """
    metric = _network()
    if metric is None:
        return None
    x, t = (
        torch.from_numpy(np.where(inside, np.clip(values, 0, 1), 0).astype(np.float32)) * 2 - 1
        for values in (image, truth)
    )
    scores = []
    for axis in range(3):
        used = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        for at in np.linspace(used[0], used[-1], SLICES + 2)[1:-1].astype(int):
            planes = [v.select(axis, int(at)).expand(1, 3, -1, -1) for v in (x, t)]
            scores.append(float(metric(*planes)))
    return float(np.mean(scores))
