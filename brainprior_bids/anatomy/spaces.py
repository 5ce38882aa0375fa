# SPDX-License-Identifier: Apache-2.0
"""From one grid to another, and affines as ITK text.

An ITK file named ``from-T1w_to-MNI305`` maps *points* the other way, from MNI305 to the T1w, as
fMRIPrep's and ANTs' do: it is what resampling the T1w on the MNI305 grid needs, so that
``antsApplyTransforms -i T1w -r MNI305 -t from-T1w_to-MNI305_mode-image_xfm.txt`` does what the
name says. ITK's millimetres are LPS, ours RAS.
"""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.grids import MNI305, Grid

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
        Where the values are, and where they are wanted.
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
    """Refuse an image whose header does not say where it lies: nibabel would guess.

    Raises
    ------
    GeometryError
        If it is a NIfTI file with neither sform nor qform.
    """
    if not isinstance(image, nib.Nifti1Image):
        return
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise GeometryError(
            f"{who}: its header has neither sform nor qform, so that neither its place nor left "
            "and right are known. Write it again with the affine of the scan that it belongs to."
        )


def to_mni305(image: nib.Nifti1Image, matrix: ArrayLike, *, order: int = 3) -> nib.Nifti1Image:
    """The image on the 1 mm MNI305 grid; a skull-stripped one stays so.

    A voxel is 0 where most of what it is made of is exactly 0: a cubic spline rings beyond the
    edge of a mask.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k) in scanner space.
    matrix : (4, 4) array
        Scanner RAS mm to MNI305 RAS mm.
    order : int
        As in ``resample``.
    """
    source = Grid(image.shape, image.affine)
    values = image.get_fdata(dtype=np.float32)
    moved = resample(values, source, MNI305, matrix=matrix, order=order)
    inside = resample(values != 0, source, MNI305, matrix=matrix, order=1)
    moved[inside < 0.5] = 0
    result = nib.Nifti1Image(moved, np.array(MNI305.affine))
    result.set_sform(MNI305.affine, NIFTI_ALIGNED)
    result.set_qform(MNI305.affine, NIFTI_ALIGNED)
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
    points = _LPS @ np.linalg.inv(_checked(matrix)) @ _LPS
    parameters = [*points[:3, :3].ravel(), *points[:3, 3]]
    text = (
        "#Insight Transform File V1.0\n"
        "#Transform 0\n"
        "Transform: AffineTransform_double_3_3\n"
        f"Parameters: {' '.join(f'{p + 0.0:.17g}' for p in parameters)}\n"
        "FixedParameters: 0 0 0\n"
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)
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
