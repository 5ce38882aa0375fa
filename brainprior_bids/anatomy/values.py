# SPDX-License-Identifier: Apache-2.0
"""The values of a scan: checks and corrections."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid

DEEPEST_NEGATIVE = 0.1
"""An image whose darkest hundredth lies deeper below 0 than this share of its bright end has no
zero of its own. The rings of an interpolation and the noise of real-valued images are less."""
LARGEST_VALUE = 1e15
"""Sums of squares of larger values do not fit float32."""
EMPTY_EDGE = 0.5
"""If a larger share of the outermost voxels has one value, that is the background."""


def check_values(
    data: NDArray[np.float32], grid: Grid, name: str, warnings: list[str]
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Values as the model needs them: finite, and with a zero.

    Parameters
    ----------
    data : (i, j, k) array
    grid : Grid
        Grid of ``data``.
    name : str
        Name of the scan, for messages.
    warnings : list of str
        Receives a sentence for every correction.

    Returns
    -------
    data : (i, j, k) array
    facts : dict
        As ``records.ValuesRecord``, for the original values.

    Raises
    ------
    InputError
        A constant image, values without bounds, non-finite voxels inside the head, or outliers
        far below the image.
    """
    finite = np.isfinite(data)
    bad = int(data.size - finite.sum())
    if bad == data.size:
        raise InputError(
            f"{name}: expected an image, every voxel is NaN or infinite. Check its scale factor "
            "in the header, or export it again."
        )
    if bad:
        data = np.where(finite, data, np.float32(0))
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise InputError(
            f"{name}: expected an image, every voxel is {low:g}. The export or an earlier step "
            "failed."
        )
    if max(-low, high) > LARGEST_VALUE:
        raise InputError(
            f"{name}: expected values up to {LARGEST_VALUE:g}, got {low:g} to {high:g}. Check the "
            "scale factor in the header, or export the image again."
        )
    inside = int((_head(data, grid) & ~finite).sum()) if bad else 0
    if inside:
        raise InputError(
            f"{name}: {inside} voxels inside the head are NaN or infinite ({bad} in all). "
            "Nothing can be assumed there; repair the image or its export."
        )
    if bad:
        warnings.append(f"{name}: {bad} voxels outside the head are NaN or infinite; set to 0.")
    negative = int((data < 0).sum())
    shift = _shift(data, name)
    if shift:
        data = _shifted(data, shift)
        warnings.append(
            f"{name}: the image has no zero of its own (values from {low:g} to {high:g}, as "
            f"MP2RAGE's UNI or a z-scored image); {shift:g} was added to it, and all results have "
            "the values of that image. Give the magnitude image if there is one."
        )
    elif negative > 0.001 * data.size:
        warnings.append(
            f"{name}: {negative} voxels ({100 * negative / data.size:.1f} %) are negative, down "
            f"to {low:g}; kept as they are."
        )
    facts = {
        "min": low,
        "max": high,
        "non_finite_voxels_set_to_0": bad,
        "negative_voxels": negative,
    }
    return data, facts | ({"shift": shift} if shift else {})


def _shift(data: NDArray[np.float32], name: str) -> float:
    """The constant to add to an image without a zero of its own; 0 for others.

    The model of a scan is multiplicative: bias field and brightness scale what is above zero.

    Raises
    ------
    InputError
        If a few voxels lie so far below all others that the rest would be flat above them.
    """
    dark, bright = (float(value) for value in np.percentile(data, (1, 99.5)))
    if dark >= -DEEPEST_NEGATIVE * abs(bright):
        return 0.0
    low = float(data.min())
    if dark - low > bright - dark:
        raise InputError(
            f"{name}: 99 % of the voxels are above {dark:g}, but some reach down to {low:g}, so "
            "that the image's zero is not known. Remove these outliers, or give the magnitude "
            "image."
        )
    return -low


def _shifted(data: NDArray[np.float32], shift: float) -> NDArray[np.float32]:
    """The image with the constant added; if most of its faces have one value, this background
    becomes 0.
    """
    faces = np.concatenate([data.take(i, a).ravel() for a in range(3) for i in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    empty = values[counts.argmax()] if counts.max() > EMPTY_EDGE * faces.size else np.nan
    moved: NDArray[np.float32] = np.where(data == empty, np.float32(0), data + np.float32(shift))
    return moved


def _head(data: NDArray[np.float32], grid: Grid) -> NDArray[np.bool_]:
    """The head, generously: above a tenth of the bright end, closed by 10 mm, holes filled."""
    positive = data[data > 0]
    if not positive.size:  # an image without positive values has no background to speak of
        return np.ones(data.shape, dtype=bool)
    bright = data > 0.1 * np.percentile(positive, 95)
    steps = np.maximum(np.ceil(3 / grid.spacing_mm).astype(int), 1)
    labels, count = ndimage.label(bright)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        bright = labels == sizes.argmax()
    margin = [(int(n), int(n)) for n in np.ceil(10 / grid.spacing_mm).astype(int) + steps]
    padded = np.pad(bright, margin)
    spacing = tuple(grid.spacing_mm)
    dilated = ndimage.distance_transform_edt(~padded, sampling=spacing) <= 10
    closed = ndimage.distance_transform_edt(dilated, sampling=spacing) > 10
    closed |= padded
    for axis in range(3):  # a hole that is open along one axis is closed in the planes across it
        for plane in np.moveaxis(closed, axis, 0):
            plane[:] = ndimage.binary_fill_holes(plane)
    inner = tuple(slice(a, -b) for a, b in margin)
    return closed[inner]
