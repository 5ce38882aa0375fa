# SPDX-License-Identifier: Apache-2.0
"""The part of the 1 mm grid that is computed, and the data voxels that correspond to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A box that starts and ends on voxel edges of both grids (along the slice axis: of the
    image alone)."""

    start: Triple  # of the image, 1 mm voxels
    stop: Triple
    data_start: Triple
    data_stop: Triple

    @property
    def shape(self) -> Triple:
        """Number of voxels of the image in the box, along each axis."""
        return _difference(self.stop, self.start)

    @property
    def data_shape(self) -> Triple:
        """Number of voxels of the data in the box, along each axis."""
        return _difference(self.data_stop, self.data_start)

    @property
    def image_slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in the whole image."""
        return _slices(self.start, self.stop)

    @property
    def data_slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in the whole scan."""
        return _slices(self.data_start, self.data_stop)


def _difference(a: Triple, b: Triple) -> Triple:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _slices(start: Triple, stop: Triple) -> tuple[slice, slice, slice]:
    return (slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2]))


def brain_box(
    mask: NDArray[np.bool_],
    data_shape: Triple,
    slice_axis: int,
    *,
    margin: int = 8,
    multiple: int = 16,
) -> Box:
    """The brain with a margin.

    Within a slice the k-space of image and data must stay commensurate: with n image and m data
    voxels over the same field of view the box grows in steps of ``n / gcd(n, m)``, up to the whole
    field of view if they have no common divisor. The chosen size is the one that costs the network
    least; the network pads to ``multiple``.
    """
    start, stop, data_start, data_stop = [], [], [], []
    for axis in range(3):
        n, m = mask.shape[axis], data_shape[axis]
        others = tuple(a for a in range(3) if a != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        first, last = int(inside[0]) - margin, int(inside[-1]) + 1 + margin
        step = 1 if axis == slice_axis else n // math.gcd(n, m)
        low, high = _interval(max(first, 0), min(last, n), n, step, multiple)
        start.append(low)
        stop.append(high)
        if axis == slice_axis:
            # slices whose centre lies in the box
            data_start.append(math.ceil(low * m / n - 0.5))
            data_stop.append(math.floor(high * m / n - 0.5 - 1e-9) + 1)
        else:
            data_start.append(low * m // n)
            data_stop.append(high * m // n)
    return Box(_triple(start), _triple(stop), _triple(data_start), _triple(data_stop))


def _triple(values: list[int]) -> Triple:
    return (values[0], values[1], values[2])


def _interval(first: int, last: int, n: int, step: int, multiple: int) -> tuple[int, int]:
    """The cheapest sequence of whole steps that covers [first, last)."""
    need = last // step * step + (step if last % step else 0) - first // step * step
    sizes = range(need, n + 1, step)
    best = min(sizes, key=lambda size: (-(-size // multiple), -size))
    start = first // step * step
    start = max(0, min(start - (best - need) // 2 // step * step, n - best))
    return start, start + best
