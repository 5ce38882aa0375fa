# SPDX-License-Identifier: Apache-2.0
"""Consistency of the slices of a scan: lost slices, interleaves that moved or differ in gain.

The model of a scan assumes that its slices show one brain at rest. If they do not, a 1 mm image
can explain them nevertheless, so that the residual does not reveal it.

Symbols: s_k, slice k inside the brain, smoothed in its plane; m_k, its median.

    mismatch = RMS_k(s_k - (s_{k-1} + s_{k+1}) / 2) / RMS_k(s_{k+1} - s_{k-1})

A slice of a brain at rest is similar to the mean of its neighbours: white noise would have 0.87,
anatomy less. If every second slice was measured in another position or with another gain, its
neighbours are alike but it differs: the value is higher.

Slices that lost their signal are detected before there is a mask, and are not used: for mask and
structures they are replaced by their neighbours, for bias field and likelihood they are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.grids import PLANES, Grid

SMOOTH_MM = 2.5
"""SD of the in-plane smoothing, which suppresses noise and detail."""
INSIDE = 0.9
"""Smallest share of brain in a voxel that is compared."""
LEAST_CM2 = 30.0
"""Smallest area of brain in a slice and in its neighbours; with less, it is too close to the
border."""
FEWEST = 3
FAINTEST = 0.6
"""Brightness of a slice relative to its neighbours below which its signal counts as lost."""
LARGEST_MISMATCH = 0.7
"""Mismatch above which the slices are inconsistent."""
BRIGHT = 0.25
"""Voxels above this share of the image's 99th percentile show the head."""
ENDS = ("left", "back", "bottom")
"""Where each closest-canonical axis begins."""


@dataclass(frozen=True)
class SliceFit:
    """Consistency of the slices of a scan.

    Attributes
    ----------
    mismatch : float
        See above; 0.4 to 0.6 for a brain at rest.
    faintest : float
        Smallest m_k over the mean of m_{k-1} and m_{k+1}.
    faintest_slice : int
        Its k, from 0, on the axes of the scan.
    """

    mismatch: float
    faintest: float
    faintest_slice: int


def slice_fit(image: nib.Nifti1Image, mask: ArrayLike, *, axis: int) -> SliceFit | None:
    """Compare every slice with its neighbours, inside the brain.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), scanner units.
    mask : (i, j, k) array
        Share of brain in every voxel.
    axis : {0, 1, 2}
        Slice axis.

    Returns
    -------
    SliceFit, or None if fewer than three slices contain enough brain.

    Raises
    ------
    ShapeMismatchError
        If mask and image disagree.
    """
    spacing = Grid(image.shape, image.affine).spacing_mm
    share = np.asarray(mask, np.float32)
    if share.shape != image.shape:
        raise ShapeMismatchError(
            f"slice_fit: expected a mask on the image's grid {image.shape}, got {share.shape}."
        )
    inside = share > INSIDE
    widths = [0.0 if a == axis else SMOOTH_MM / spacing[a] for a in range(3)]
    weight = ndimage.gaussian_filter(inside.astype(np.float32), widths)
    data = image.get_fdata(dtype=np.float32) * inside
    smooth = ndimage.gaussian_filter(data, widths) / np.maximum(weight, 1e-3)
    slices, brain = np.moveaxis(smooth, axis, 0), np.moveaxis(inside, axis, 0)
    area_cm2 = brain.sum((1, 2)) * float(np.prod(np.delete(spacing, axis))) / 100
    compared = [k for k in range(1, len(slices) - 1) if area_cm2[k - 1 : k + 2].min() >= LEAST_CM2]
    if len(compared) < FEWEST:
        return None
    within = apart = 0.0
    ratios = []
    for k in compared:
        here = brain[k - 1] & brain[k] & brain[k + 1]
        before, this, after = (slices[n][here].astype(np.float64) for n in (k - 1, k, k + 1))
        within += float(np.sum((this - (before + after) / 2) ** 2))
        apart += float(np.sum((after - before) ** 2))
        around = sum(float(np.median(slices[n][brain[n]])) for n in (k - 1, k + 1)) / 2
        ratios.append(float(np.median(slices[k][brain[k]])) / around if around > 0 else 1.0)
    if apart <= 0:
        return None
    faintest = int(np.argmin(ratios))
    return SliceFit(
        mismatch=round(float(np.sqrt(within / apart)), 4),
        faintest=round(ratios[faintest], 4),
        faintest_slice=compared[faintest],
    )


def lost_slices(image: nib.Nifti1Image, *, axis: int) -> tuple[int, ...]:
    """Slices that are much darker than those on both sides.

    A slice must be darker than both sides, because brightness falls from slice to slice at the
    ends of the head. The mean, and the median of the voxels that show the head on both sides, are
    compared with the brighter one of the two nearest slices of each side, so that two lost slices
    in a row are detected.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), scanner units.
    axis : {0, 1, 2}
        Slice axis.

    Returns
    -------
    tuple of int
        Their numbers from 0 on the axes of the scan; the outermost slices are not tested.
    """
    data = np.moveaxis(np.nan_to_num(image.get_fdata(dtype=np.float32)), axis, 0)
    spacing = np.delete(Grid(image.shape, image.affine).spacing_mm, axis)
    fewest = LEAST_CM2 * 100 / float(np.prod(spacing))
    head = data > BRIGHT * np.percentile(data, 99)
    means = data.mean((1, 2))
    lost = []
    for k in range(1, len(data) - 1):
        below, above = (
            max(near, key=lambda n: means[n])
            for near in (range(max(k - 2, 0), k), range(k + 1, min(k + 3, len(data))))
        )
        here = head[below] & head[above]
        if here.sum() < fewest:
            continue
        darker = all(
            np.median(data[k][here]) < FAINTEST * np.median(data[n][here])
            and means[k] < FAINTEST * means[n]
            for n in (below, above)
        )
        if darker:
            lost.append(k)
    return tuple(lost)


def bridged(image: nib.Nifti1Image, lost: Sequence[int], *, axis: int) -> nib.Nifti1Image:
    """A float32 copy in which lost slices are interpolated between the nearest others."""
    data = np.moveaxis(image.get_fdata(dtype=np.float32).copy(), axis, 0)
    intact = np.setdiff1d(np.arange(len(data)), lost)
    for k in lost:
        below, above = intact[intact < k].max(), intact[intact > k].min()
        share = np.float32((k - below) / (above - below))
        data[k] = (1 - share) * data[below] + share * data[above]
    return nib.Nifti1Image(np.moveaxis(data, 0, axis), image.affine)


def without_slices(values: ArrayLike, lost: Sequence[int], *, axis: int) -> NDArray[Any]:
    """A copy of a mask on the scan's grid that is 0 in lost slices."""
    copy = np.array(values)
    np.moveaxis(copy, axis, 0)[list(lost)] = 0
    return copy


def hidden_voxels(
    lesion: ArrayLike | None, lost: Sequence[int], shape: tuple[int, int, int], *, axis: int
) -> NDArray[np.uint8] | None:
    """1 where a scan is treated as missing: where the lesion is above 0, and in lost slices.

    ``lesion`` has the scan's ``shape``, (i, j, k). None where nothing is missing.
    """
    if not lost:
        return None if lesion is None else (np.asarray(lesion) > 0).astype(np.uint8)
    measured = np.ones(shape, bool) if lesion is None else ~(np.asarray(lesion) > 0)
    return (~without_slices(measured, lost, axis=axis)).astype(np.uint8)


def name_lost(lost: Sequence[int], n: int, *, axis: int) -> list[str]:
    """The warning about lost slices."""
    if not lost:
        return []
    which = ", ".join(str(k + 1) for k in lost)
    one = len(lost) == 1
    return [
        f"Slice{'' if one else 's'} {which} of {n} ({PLANES[axis]}, counted from the "
        f"{ENDS[axis]}) {'has' if one else 'have'} lost {'its' if one else 'their'} signal "
        f"(below {100 * FAINTEST:.0f} % of the neighbours' brightness) and "
        f"{'is' if one else 'are'} not used: what the result shows there is predicted from the "
        "neighbouring slices."
    ]


def check_slices(
    image: nib.Nifti1Image, mask: ArrayLike, *, axis: int, lost: Sequence[int] = ()
) -> tuple[SliceFit | None, list[str]]:
    """``slice_fit`` and a warning for each of its limits that is exceeded.

    Parameters and errors are those of ``slice_fit``; ``lost`` slices have had their warning.

    Returns
    -------
    fit : SliceFit or None
    warnings : list of str
        Empty if the slices fit together, or too few can be compared.
    """
    fit = slice_fit(image, mask, axis=axis)
    warnings: list[str] = []
    if fit is None:
        return fit, warnings
    if fit.faintest < FAINTEST and fit.faintest_slice not in lost:
        warnings.append(
            f"Slice {fit.faintest_slice + 1} of {image.shape[axis]} ({PLANES[axis]}, counted "
            f"from the {ENDS[axis]}) has {100 * fit.faintest:.0f} % of its neighbours' "
            "brightness: a loss of signal is restored as if it were anatomy."
        )
    if fit.mismatch > LARGEST_MISMATCH:
        warnings.append(
            f"Neighbouring slices are inconsistent (mismatch {fit.mismatch:.2f}, usually 0.4 to "
            "0.6): motion between slices, alternating brightness, or a lost slice. The result "
            "reproduces whatever is not corrected."
        )
    return fit, warnings
