# SPDX-License-Identifier: Apache-2.0
"""Regions of an image that were padded with one value, so that nothing was measured there.

A scan whose field of view ends in the brain may have been padded, or resampled onto another grid.
The padding is not background: the brain continues there, as it does beyond the border of the field
of view. Its neighbours distinguish it from background: between brain and air there are always
skull and scalp.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.separable import resample_separable
from brainprior_bids.engine.grids import Grid

Mask = NDArray[np.bool_]

WORK_MM = 2.0
FLAT = 0.002
"""Largest difference from the value of the padding, relative to the bright end: splines cause
small rings."""
OPEN_MM = 6.0
"""Half of the smallest width of a padded region inside the image: a dark skull is thinner."""
NEAR_MM = 1.0
"""A brain that is cut is at most this far from the padding. Scalp and skull are thicker; the roof
of an orbit that defacing has emptied is not much thicker."""
STRIPPED_SHARE, STRIPPED_MM = 0.03, 5.0
"""With less than this share of a brain's volume beyond this distance from it, there is no head."""
FLAT_CM2, FLAT_RATIO, DEEPER_MM = 10.0, 0.75, 6.0
"""A brain ends flat if its last plane has at least this area, and at least this share of the area
at that depth inside. A round end has half of it in slices of 6 mm."""


def unmeasured(image: nib.Nifti1Image, brain: NDArray[np.generic]) -> Mask:
    """Where the image was padded with one value.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), any axes.
    brain : array
        Above 0.5 in the brain, on a grid with the axes and the edges of the image's.

    Returns
    -------
    bool array
        On the grid of ``brain``. In a skull-stripped scan all surroundings of the brain have one
        value; there, True only where the brain ends flat, across an axis of the image.
    """
    data = image.get_fdata(dtype=np.float32)
    spacing = Grid(image.shape, image.affine).spacing_mm
    work = tuple(max(round(n * s / WORK_MM), 1) for n, s in zip(data.shape, spacing, strict=True))
    work_mm = spacing * data.shape / np.array(work)
    flat = _flat(data)
    region = _at_border(_resampled(flat, work) > 0.99, work_mm)
    inside = _resampled(np.asarray(brain) > 0.5, work) > 0.5
    if not region.any() or not inside.any():
        return np.zeros(brain.shape, bool)
    away = ndimage.distance_transform_edt(~inside, sampling=tuple(work_mm))
    if (~region & (away > STRIPPED_MM)).sum() < STRIPPED_SHARE * inside.sum():
        region &= _behind_flat_ends(inside, work_mm)
    grown = ndimage.binary_dilation(region, iterations=2)  # up to the edge of the flat voxels
    return _nearest(grown, brain.shape) & _nearest(flat, brain.shape)


def beyond(
    unmeasured: Mask, brain: Mask, spacing_mm: NDArray[np.float64], *, near_mm: float = NEAR_MM
) -> Mask:
    """Voxels outside the brain, so close to an unmeasured region that the brain is cut there."""
    size = [2 * max(round(near_mm / s), 1) + 1 for s in spacing_mm]
    near: Mask = ndimage.maximum_filter(unmeasured.astype(np.uint8), size) > 0
    return near & ~brain


def touching(
    values: NDArray[np.generic], beyond: Mask, axis: int
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """The values of voxels whose neighbour along an axis, forwards or backwards, is beyond."""
    first, last = np.arange(values.shape[axis] - 1), np.arange(1, values.shape[axis])
    return (
        values.take(first, axis)[beyond.take(last, axis)],
        values.take(last, axis)[beyond.take(first, axis)],
    )


def _flat(data: NDArray[np.float32]) -> Mask:
    """Voxels with the value of a corner, or with that of a fifth of a face."""
    values = {float(value) for value in data[:: data.shape[0] - 1, :: data.shape[1] - 1,
                                             :: data.shape[2] - 1].ravel()}  # fmt: skip
    for axis in range(3):
        for end in (0, -1):
            values_there, counts = np.unique(data.take(end, axis), return_counts=True)
            if counts.max() > 0.2 * counts.sum():
                values.add(float(values_there[counts.argmax()]))
    limit = FLAT * float(np.percentile(data, 99.5) - data.min())
    flat = np.zeros(data.shape, bool)
    for value in values:
        flat |= np.abs(data - np.float32(value)) <= limit
    return flat


def _at_border(flat: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """The wide parts of a region that reach the border, beyond which it is assumed to continue."""
    margin = [int(np.ceil(OPEN_MM / s)) + 1 for s in spacing_mm]
    wide = np.pad(flat, [(n, n) for n in margin], constant_values=True)
    sampling = tuple(spacing_mm)
    core = ndimage.distance_transform_edt(wide, sampling=sampling) > OPEN_MM
    core[[0, -1]] = core[:, [0, -1]] = core[:, :, [0, -1]] = True
    opened = wide & (ndimage.distance_transform_edt(~core, sampling=sampling) <= OPEN_MM)
    labels, _ = ndimage.label(opened)
    joined: Mask = (labels == labels[0, 0, 0])[tuple(slice(n, -n) for n in margin)]
    return joined & flat


def _behind_flat_ends(inside: Mask, spacing_mm: NDArray[np.float64]) -> Mask:
    """The planes of the image beyond a flat end of the brain."""
    behind = np.zeros(inside.shape, bool)
    for axis, step in enumerate(spacing_mm):
        face_cm2 = float(np.prod(np.delete(spacing_mm, axis))) / 100
        area = inside.sum(tuple(a for a in range(3) if a != axis)) * face_cm2
        deeper = max(round(DEEPER_MM / step), 1)
        for planes, areas in ((np.moveaxis(behind, axis, 0), area),
                              (np.moveaxis(behind, axis, 0)[::-1], area[::-1])):  # fmt: skip
            end = int(np.flatnonzero(areas)[0])
            if areas[end] > max(FLAT_CM2, FLAT_RATIO * areas[min(end + deeper, len(areas) - 1)]):
                planes[:end] = True
    return behind


def _resampled(mask: Mask, shape: tuple[int, ...]) -> NDArray[np.float32]:
    share: NDArray[np.float32] = resample_separable(torch.from_numpy(mask).float(), shape).numpy()
    return share


def _nearest(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """The mask on a grid with the same axes and edges."""
    index = [
        ((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(mask.shape, shape, strict=True)
    ]
    return mask[np.ix_(*index)]
