# SPDX-License-Identifier: Apache-2.0
"""Whether the slices of a scan fit together: a lost one, interleaves that moved or differ in gain.

The model of a scan takes its slices for one still brain. Where they are not, 1 mm of unknowns
explain them nevertheless, so that no residual tells.

Symbols: s_k, slice k inside the brain, smoothed in its plane; m_k, its median.

    mismatch = RMS_k(s_k - (s_{k-1} + s_{k+1}) / 2) / RMS_k(s_{k+1} - s_{k-1})

A slice of a still brain lies between its neighbours: white noise would have 0.87, anatomy less.
Where every second slice was measured at another place or with another gain, its neighbours are
alike and it is not: more than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from brainprior_bids.engine.acquisition import PLANES
from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.grids import Grid

SMOOTH_MM = 2.5
"""SD of the smoothing: noise and detail of the plane hardly count."""
INSIDE = 0.9
"""A voxel with this share of brain counts."""
LEAST_CM2 = 30.0
"""Of brain, in a slice and in its neighbours; less is too near the border to be judged."""
FEWEST = 3
FAINTEST = 0.6
"""Brightness of a slice over its neighbours' below which its signal is taken to be lost."""
LARGEST_MISMATCH = 0.7
"""Mismatch above which the slices do not show one still brain."""
ENDS = ("left", "back", "bottom")
"""Where each closest-canonical axis begins."""


@dataclass(frozen=True)
class SliceFit:
    """How the slices of a scan fit together.

    Attributes
    ----------
    mismatch : float
        See above; 0.4 to 0.6 of a still brain.
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
    SliceFit, or None where fewer than three slices hold enough brain.

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
    judged = [k for k in range(1, len(slices) - 1) if area_cm2[k - 1 : k + 2].min() >= LEAST_CM2]
    if len(judged) < FEWEST:
        return None
    within = apart = 0.0
    ratios = []
    for k in judged:
        here = brain[k - 1] & brain[k] & brain[k + 1]
        before, this, after = (slices[n][here].astype(np.float64) for n in (k - 1, k, k + 1))
        within += float(np.sum((this - (before + after) / 2) ** 2))
        apart += float(np.sum((after - before) ** 2))
        beside = sum(float(np.median(slices[n][brain[n]])) for n in (k - 1, k + 1)) / 2
        ratios.append(float(np.median(slices[k][brain[k]])) / beside if beside > 0 else 1.0)
    if apart <= 0:
        return None
    faintest = int(np.argmin(ratios))
    return SliceFit(
        mismatch=round(float(np.sqrt(within / apart)), 4),
        faintest=round(ratios[faintest], 4),
        faintest_slice=judged[faintest],
    )


def check_slices(
    image: nib.Nifti1Image, mask: ArrayLike, *, axis: int
) -> tuple[SliceFit | None, list[str]]:
    """``slice_fit`` and a warning for each of its limits that is exceeded.

    Parameters and errors are those of ``slice_fit``.

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
    if fit.faintest < FAINTEST:
        warnings.append(
            f"Slice {fit.faintest_slice + 1} of {image.shape[axis]} ({PLANES[axis]}, counted "
            f"from the {ENDS[axis]}) has {100 * fit.faintest:.0f} % of its neighbours' "
            "brightness: a loss of signal is restored as if it were anatomy."
        )
    if fit.mismatch > LARGEST_MISMATCH:
        warnings.append(
            f"Neighbouring slices are inconsistent (mismatch {fit.mismatch:.2f}, usually 0.4 to "
            "0.6): motion between slices, alternating brightness, or a lost slice. The result "
            "reproduces this."
        )
    return fit, warnings
