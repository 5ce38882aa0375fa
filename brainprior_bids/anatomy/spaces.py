# SPDX-License-Identifier: Apache-2.0
"""Resampling between grids, and affines as ITK text.

An ITK file named ``from-T1w_to-MNI305`` maps *points* the other way, from MNI305 to the T1w, as in
fMRIPrep and ANTs. This is the direction needed to resample the T1w on the MNI305 grid, so that
``antsApplyTransforms -i T1w -r MNI305 -t from-T1w_to-MNI305_mode-image_xfm.txt`` does what the
name says. ITK's millimetres are LPS, ours RAS.
"""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
NIFTI_ALIGNED = 2  # sform code "aligned to another scan or template"; 4 would mean MNI152


def resample(
    data: ArrayLike,
    source: Grid,
    target: Grid,
    *,
    matrix: ArrayLike | None = None,
    order: int = 3,
) -> NDArray[np.float32]:
    """Interpolate an image on another grid.

    Parameters
    ----------
    data : (i, j, k) array
        On ``source``.
    source, target : Grid
        Grids of the values and of the result.
    matrix : (4, 4) array, optional
        mm of ``source`` to mm of ``target``; default identity.
    order : int
        Spline order: 3 for images, 1 for masks and spreads, 0 for labels.

    Returns
    -------
    (I, J, K) float32 array
        On ``target``; 0 outside the source, and never below both 0 and the lowest value of
        ``data`` (a cubic spline undershoots at edges).

    Raises
    ------
    ShapeMismatchError
        If the data are not on ``source``.
    GeometryError
        If the matrix is singular.
    """
    values = np.asarray(data, dtype=np.float32)
    if values.shape != source.shape:
        raise ShapeMismatchError(
            f"resample: expected data on its grid of {source.shape}, got {values.shape}."
        )
    mm_to_mm = np.linalg.inv(_checked(np.eye(4) if matrix is None else matrix))
    index = np.linalg.inv(source.affine) @ mm_to_mm @ target.affine  # target voxel -> source voxel
    out = ndimage.affine_transform(
        values,
        index[:3, :3],
        offset=index[:3, 3],
        output_shape=target.shape,
        output=np.float32,
        order=order,
        mode="grid-constant",
        cval=0.0,
    )
    return np.maximum(out, min(float(values.min()), 0.0), out=out)


def check_placed(image: nib.spatialimages.SpatialImage, who: str) -> None:
    """Refuse an image whose header does not state its position: nibabel would guess.

    Raises
    ------
    GeometryError
        If it is a NIfTI file with neither sform nor qform.
    """
    if not isinstance(image, nib.Nifti1Image):
        return
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise GeometryError(
            f"{who}: its header has neither sform nor qform, so its position, left and right are "
            "unknown. Write it again with the affine of the scan to which it belongs."
        )


class Kind(StrEnum):
    """The content of an image, which determines its interpolation."""

    IMAGE = "image"
    """Intensities: cubic splines."""
    SPREAD = "spread"
    """A standard deviation: linear, so that it stays within its neighbours' values."""
    MASK = "mask"
    """0 and 1: linear, then cut at one half."""
    LABELS = "labels"
    """Labels of structures: the one with the largest linear weight."""


def resample_labels(
    labels: ArrayLike, source: Grid, target: Grid, *, matrix: ArrayLike | None = None
) -> NDArray[np.int16]:
    """Labels on another grid: the label with the largest weight of the eight voxels around a
    point. If two have the same weight, the larger value is used, so that brain takes precedence
    over background.

    Parameters
    ----------
    labels : (i, j, k) array
        Integers on ``source``; 0 is none.
    source, target, matrix
        As in ``resample``.

    Returns
    -------
    (I, J, K) int16 array
        On ``target``; 0 outside the source.
    """
    values = np.pad(np.asarray(labels, np.int16), 1)
    result = np.zeros(target.shape, np.int16)
    near = resample(values[1:-1, 1:-1, 1:-1] != 0, source, target, matrix=matrix, order=1) > 0
    voxels = np.argwhere(near)
    mm_to_mm = np.linalg.inv(_checked(np.eye(4) if matrix is None else matrix))
    index = np.linalg.inv(source.affine) @ mm_to_mm @ target.affine
    points = voxels @ index[:3, :3].T + index[:3, 3]
    low = np.floor(points).astype(int)
    share = points - low
    corners, weights = [], []
    for corner in product((0, 1), repeat=3):
        at = np.clip(low + np.array(corner) + 1, 0, np.array(values.shape) - 1)
        corners.append(values[tuple(at.T)])
        weights.append(np.where(corner, share, 1 - share).prod(1))
    most = np.zeros(len(voxels))
    winner = np.zeros(len(voxels), np.int16)
    for label in corners:
        total = sum(w * (other == label) for w, other in zip(weights, corners, strict=True))
        better = (total > most) | ((total == most) & (label > winner))
        most, winner = np.where(better, total, most), np.where(better, label, winner)
    result[tuple(voxels.T)] = winner
    return result


def move(
    image: nib.Nifti1Image, target: Grid, matrix: ArrayLike, *, kind: Kind = Kind.IMAGE
) -> nib.Nifti1Image:
    """The image on another grid, interpolated once; a skull-stripped one stays so.

    A voxel of an image or an SD is 0 if most of the voxels around it are exactly 0, because a
    cubic spline rings beyond the edge of a mask.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k) in scanner space.
    target : Grid
    matrix : (4, 4) array
        Scanner RAS mm of the image to RAS mm of the target.
    kind : Kind

    Returns
    -------
    Nifti1Image
        float32; of a mask uint8, of labels int16. Its forms' code is "aligned".
    """
    source = Grid(image.shape, image.affine)
    values = image.get_fdata(dtype=np.float32)
    if kind is Kind.LABELS:
        moved = resample_labels(values, source, target, matrix=matrix)
    elif kind is Kind.MASK:
        moved = (resample(values > 0, source, target, matrix=matrix, order=1) >= 0.5).astype("u1")
    else:
        order = 3 if kind is Kind.IMAGE else 1
        moved = resample(values, source, target, matrix=matrix, order=order)
        moved[resample(values != 0, source, target, matrix=matrix, order=1) < 0.5] = 0
    return aligned_image(moved, target)


def aligned_image(data: NDArray[Any], grid: Grid) -> nib.Nifti1Image:
    """An image on a grid that another image or a template gave; both forms' code is "aligned"."""
    result = nib.Nifti1Image(data, np.array(grid.affine))
    result.set_sform(grid.affine, NIFTI_ALIGNED)
    result.set_qform(grid.affine, NIFTI_ALIGNED)
    result.header.set_slope_inter(1, 0)
    result.header.set_xyzt_units("mm", "sec")
    return result


def write_itk_affine(path: Path, matrix: ArrayLike) -> Path:
    """Write an affine as ITK text, for antsApplyTransforms, nitransforms, Slicer and fMRIPrep.

    Parameters
    ----------
    path : Path
        ``…from-A_to-B_mode-image_xfm.txt``.
    matrix : (4, 4) array
        RAS mm of A to RAS mm of B: where a point of the *image* goes. The file holds its inverse
        in LPS, which is what resampling A on the grid of B needs.

    Raises
    ------
    GeometryError
        If the matrix is singular or no affine.
    """
    points = _LPS @ np.linalg.inv(_checked(matrix)) @ _LPS + 0.0  # no -0
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(points[:3, :3].ravel().tolist())
    transform.SetTranslation(points[:3, 3].tolist())
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")  # ITK needs the extension
    try:
        sitk.WriteTransform(transform, str(partial))
        if not partial.read_text(encoding="ascii").endswith("FixedParameters: 0 0 0\n"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))  # ITK says nothing
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _checked(matrix: ArrayLike) -> NDArray[np.float64]:
    affine = np.asarray(matrix, dtype=np.float64)
    if (
        affine.shape != (4, 4)
        or not np.isfinite(affine).all()
        or not np.allclose(affine[3], (0, 0, 0, 1))
        or abs(np.linalg.det(affine[:3, :3])) < 1e-9
    ):
        raise GeometryError(f"Expected an invertible 4 x 4 affine, got\n{affine}.")
    return affine
