# SPDX-License-Identifier: Apache-2.0
"""The bias field of a scan: N4 inside the mask, and one gain per slice of a 2-D scan; log units.
Afterwards, the interleaves of a 2-D scan are compared: see ``anatomy.interleaves``.

The scan is averaged (not picked) to voxels of about 4 mm first; an axis whose voxels are already
that thick is not averaged, so thick slices lose nothing. The finest spline spacing is 50 mm:
inside a brain-only mask a finer field starts to follow the anatomy.

Tustison et al., N4ITK: improved N3 bias correction, IEEE TMI 2010.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import make_interp_spline

from brainprior_bids.anatomy.interleaves import InterleaveMotion, find_interleave_motion
from brainprior_bids.anatomy.slice_gains import SliceGains, find_slice_gains
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import AnatomyError, DivergenceError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid

FIT_SPACING_MM = 4.0
FIRST_KNOT_SPACING_MM = 200.0
ITERATIONS = (50, 50, 50)
"""One entry per level; each level halves the knot spacing: 200, 100, 50 mm."""
CONVERGENCE = 1e-4
MIN_VOLUME_MM3 = 50_000.0
"""With less brain than this (a twentieth of an adult's), the mask is wrong."""


@dataclass(frozen=True, eq=False)
class BiasField:
    """The natural logarithm of a scan's bias field.

    Attributes
    ----------
    log_bias : (i, j, k) float32 array
        Smooth field and slice gains together, on the scan's grid, mean 0 in the brain.
    gains : SliceGains or None
        None for a 3-D scan, and if they could not be estimated.
    warnings : list of str
    interleaves : InterleaveMotion or None
        None for a 3-D scan, and if there are too few slices.
    """

    log_bias: NDArray[np.float32]
    gains: SliceGains | None
    warnings: list[str]
    interleaves: InterleaveMotion | None = None


def find_bias(
    image: nib.Nifti1Image, mask: ArrayLike, acquisition: Acquisition, *, threads: int = 2
) -> BiasField:
    """``n4``, then the gains of the slices and the motion between the interleaves.

    Parameters and errors are those of ``n4``; ``acquisition`` is the scan's slice geometry.
    """
    share = np.ascontiguousarray(mask, np.float32)  # one order of summation for all callers
    log_bias = n4(image, share, threads=threads)
    values, grid = image.get_fdata(dtype=np.float32), Grid(image.shape, image.affine)
    gains, warnings = find_slice_gains(values, share, log_bias, grid, acquisition)
    if gains is not None and gains.applied:
        log_bias = log_bias + gains.along(acquisition.slice_axis)
        log_bias -= np.average(log_bias, weights=share * (share > 0.5))
    motion = find_interleave_motion(values, log_bias, share, grid, acquisition)
    warnings += [] if motion is None else motion.warnings
    return BiasField(log_bias, gains, warnings, motion)


def n4(image: nib.Nifti1Image, mask: ArrayLike, *, threads: int = 2) -> NDArray[np.float32]:
    """Estimate the bias field of a scan.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), scanner units.
    mask : (i, j, k) array
        Brain, in [0, 1], on the grid of ``image``.
    threads : int
        Threads that ITK may use.

    Returns
    -------
    (i, j, k) float32 array
        Natural log of the multiplicative field on the image's grid, smooth also outside the
        mask, its mean inside the mask 0.

    Raises
    ------
    ShapeMismatchError
        If mask and image disagree.
    AnatomyError
        If the mask holds too little tissue to fit a field to.
    DivergenceError
        If the field is not finite.
    """
    data = image.get_fdata(dtype=np.float32)
    weight = np.asarray(mask, dtype=np.float32)
    if weight.shape != data.shape:
        raise ShapeMismatchError(
            f"N4: expected a mask on the image's grid {data.shape}, got {weight.shape}."
        )
    grid = Grid(data.shape, image.affine)
    inside = weight > 0.5
    volume = float(inside.sum() * np.prod(grid.spacing_mm))
    bright = float(np.percentile(data[inside], 99)) if volume >= MIN_VOLUME_MM3 else 0.0
    if bright <= 0:
        raise AnatomyError(
            f"N4: expected at least {MIN_VOLUME_MM3 / 1000:g} ml of positive values in the mask, "
            f"got {volume / 1000:.1f} ml with a 99th percentile of {bright:g}. Look at the mask."
        )

    floor = 0.02 * bright  # the log of voxels darker than the noise would dominate the fit
    usable = inside & (data > floor)
    factors = [max(1, round(FIT_SPACING_MM / s)) for s in grid.spacing_mm]
    factors = [min(f, n) for f, n in zip(factors, data.shape, strict=True)]
    scan = _to_itk(np.maximum(data, floor), grid)
    coarse = sitk.BinShrink(scan, factors)
    coarse_mask = sitk.BinShrink(_to_itk(usable.astype(np.float32), grid), factors) > 0.5

    # its inner filters take the process' default, on which the rounding depends: what ran before
    # in this process must not matter
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(threads)
    corrector.SetMaximumNumberOfIterations(list(ITERATIONS))
    corrector.SetConvergenceThreshold(CONVERGENCE)
    corrector.SetSplineOrder(3)
    corrector.SetNumberOfControlPoints(
        [int(np.ceil(extent / FIRST_KNOT_SPACING_MM)) + 3 for extent in grid.extent_mm]
    )
    corrector.Execute(coarse, coarse_mask)
    field = _spread(
        sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(coarse)).T, factors, grid
    )
    log_bias = field - np.average(field, weights=weight * inside)
    if not np.isfinite(log_bias).all():
        raise DivergenceError("N4: the bias field is not finite. Look at the mask and the scan.")
    return np.ascontiguousarray(log_bias, dtype=np.float32)


def _spread(coarse: NDArray[np.float32], factors: list[int], grid: Grid) -> NDArray[np.float32]:
    """Interpolate the field of the averaged voxels to the scan's grid, axis by axis. ITK's own
    evaluation on a finer image stretches the lattice to that image's edges, which differ from
    those of the averaged image.
    """
    for axis, (factor, n) in enumerate(zip(factors, grid.shape, strict=True)):
        if factor == 1:
            continue
        old = np.arange(coarse.shape[axis]) * factor + (factor - 1) / 2
        basis = np.eye(len(old))
        spline = make_interp_spline(old, basis, k=min(3, len(old) - 1))
        weights = spline(np.clip(np.arange(n), old[0], old[-1]))  # (n, len(old))
        coarse = np.moveaxis(np.tensordot(weights, coarse, axes=(1, axis)), 0, axis)
    return coarse


def _to_itk(data: NDArray[np.float32], grid: Grid) -> sitk.Image:
    """ITK image with the grid's spacing; N4 does not depend on position and orientation."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    image.SetSpacing([float(s) for s in grid.spacing_mm])
    return image
