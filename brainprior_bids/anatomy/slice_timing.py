# SPDX-License-Identifier: Apache-2.0
"""The number of interleaves of a 2-D scan, from ``SliceTiming`` of its JSON.

Interleave p of n has the slices p, p + n, p + 2n, ..., and is measured before or after another
interleave, never at the same time. Reversing the slices does not change n, so that the direction
of the axis does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 8
"""Largest number of interleaves that is read from the times."""


def stated_interleaves(metadata: Mapping[str, Any], n_slices: int) -> tuple[int | None, str]:
    """The number of interleaves according to ``SliceTiming``.

    Parameters
    ----------
    metadata : Mapping
        The scan's BIDS metadata.
    n_slices : int
        Slices of the image.

    Returns
    -------
    int or None, str
        1 if the slices were measured in order; None if the times are missing, unusable or of
        another pattern. Then the reason why stated times are not used, "" without.
    """
    stated = metadata.get("SliceTiming")
    if stated is None:
        return None, ""
    try:
        times = np.asarray(stated, np.float64)
    except (TypeError, ValueError):
        return None, "SliceTiming must be a list of seconds; it is not used."
    if times.ndim != 1 or not np.isfinite(times).all():
        return None, "SliceTiming must be a list of seconds; it is not used."
    if len(times) != n_slices:
        return None, (
            f"SliceTiming has {len(times)} times, but the image has {n_slices} slices; it is not "
            "used."
        )
    if _in_order(times):
        return 1, ""
    for count in range(2, min(MOST, n_slices // 2) + 1):
        if _in_turn([times[first::count] for first in range(count)]):
            return count, ""
    return None, "SliceTiming does not show regular interleaves; it is not used to find them."


def _in_order(times: NDArray[np.float64]) -> bool:
    """Whether neighbouring slices were measured one after the other, or all at once."""
    steps = np.diff(times)
    return bool((steps >= 0).all() or (steps <= 0).all())


def _in_turn(groups: list[NDArray[np.float64]]) -> bool:
    """Whether each group was measured in order, before or after each of the others."""
    spans = sorted((float(group.min()), float(group.max())) for group in groups)
    apart = all(end < start for (_, end), (start, _) in pairwise(spans))
    return apart and all(_in_order(group) for group in groups)
