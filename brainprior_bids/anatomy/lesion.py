# SPDX-License-Identifier: Apache-2.0
"""A lesion mask, checked against its scan and brain, and the masks derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.anatomy.separable import resample_separable
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.grids import Grid

MOSTLY_INSIDE = 0.5
LITTLE_LEFT = 0.25
DEEP_MM = 15.0
"""A hole larger than this part of the brain, or deeper than this, is filled mostly by the
prior."""


@dataclass(frozen=True, eq=False)
class Lesion:
    """The masks of a lesion that the engine needs."""

    hidden: NDArray[np.uint8]  # on the scan's grid: 1 where the scan is treated as missing
    mask_1mm: NDArray[np.uint8]  # brain and lesion, 1 mm grid
    mask_scan: NDArray[np.float32]  # brain and lesion, on the scan's grid
    measured: NDArray[np.float32]  # the same without what is hidden: for N4
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def read_lesion(path: Path, grid: Grid) -> NDArray[np.bool_]:
    """The mask on the scan's closest-canonical grid.

    A scan that was interpolated is reduced to larger voxels (``anatomy.resolution``): a mask drawn
    on the stored scan has the same edges, and hides every voxel that it touches.

    Raises
    ------
    InputError
        If the file cannot be read, is not one volume, holds NaN, or is empty.
    GeometryError
        If it is on another grid than the scan.
    """
    try:
        image = nib.as_closest_canonical(open_image(path, path.name))
        values = np.asarray(image.dataobj, np.float32)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path.name}: the mask cannot be read ({error}). Repair it.") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    far = _apart_mm(values.shape, image.affine, grid)
    if far > 0.1 * float(grid.spacing_mm.min()):
        raise GeometryError(
            f"{path.name}: the mask is not on the scan's grid (mask {values.shape}, scan "
            f"{grid.shape}, both as RAS"
            + (f"; {far:.3g} mm apart). " if np.isfinite(far) else "). ")
            + "Resample it to the scan (nearest neighbour), or draw it on this scan."
        )
    if not np.isfinite(values).all():
        raise InputError(f"{path.name}: the mask holds NaN or infinite values. Repair it.")
    if not (values > 0).any():
        raise InputError(f"{path.name}: the mask is empty. Remove it, or draw the lesion.")
    lesion = torch.from_numpy(np.ascontiguousarray(values > 0)).float()
    return np.asarray(resample_separable(lesion, grid.shape).numpy() > 0, np.bool_)


def _apart_mm(shape: tuple[int, ...], affine: NDArray[np.float64], grid: Grid) -> float:
    """Largest distance between the corners of two fields of view; infinite where voxels of the
    first are larger."""
    if len(shape) != 3 or any(n < m for n, m in zip(shape, grid.shape, strict=True)):
        return float("inf")
    corners = np.array(list(np.ndindex(2, 2, 2)), float)
    first, second = (
        np.asarray(matrix)[:3, :3] @ (corners * size - 0.5).T + np.asarray(matrix)[:3, 3:]
        for matrix, size in ((affine, shape), (grid.affine, grid.shape))
    )
    return float(np.linalg.norm(first - second, axis=0).max())


def find_lesion(
    path: Path,
    grid: Grid,
    *,
    mask_1mm: NDArray[Any],
    mask_scan: NDArray[Any],
    dilate_mm: float = 0.0,
) -> Lesion:
    """``read_lesion``, then ``prepare_lesion``, with their parameters and errors."""
    return prepare_lesion(
        read_lesion(path, grid), grid, mask_1mm=mask_1mm, mask_scan=mask_scan, dilate_mm=dilate_mm
    )


def prepare_lesion(
    lesion: NDArray[np.bool_],
    grid: Grid,
    *,
    mask_1mm: NDArray[Any],
    mask_scan: NDArray[Any],
    dilate_mm: float = 0.0,
) -> Lesion:
    """Dilate the lesion inside the brain, and add it to the brain. A parcellation may exclude a
    lesion from the brain. The brain is therefore the union of both; otherwise x would be 0 there.
    The dilation does not extend beyond that union.

    Parameters
    ----------
    lesion, mask_scan : (i, j, k)
        On the scan's grid; ``mask_scan`` is the share of brain, 0 to 1.
    mask_1mm : array on ``grid.one_millimetre()``
    dilate_mm : float
        Distance from the mask's nearest voxel centre.

    Raises
    ------
    InputError
        If the lesion does not touch the brain, or leaves nothing of it.
    """
    brain = mask_scan > 0.5
    inside = float((lesion & brain).sum() / lesion.sum())
    if inside == 0:
        raise InputError(
            "the lesion mask does not touch the brain. Is it of this participant and this scan? "
            "Look at the brain mask in the work folder's parcellate node."
        )
    warnings = []
    if inside < MOSTLY_INSIDE:
        warnings.append(
            f"Only {inside:.0%} of the lesion mask is inside the brain mask; the rest was added "
            "to the brain. Check the lesion mask and the scan's parcellation."
        )
    whole = brain | lesion
    hidden = lesion
    if dilate_mm > 0:
        away = ndimage.distance_transform_edt(~lesion, sampling=tuple(grid.spacing_mm))
        hidden = lesion | ((away <= dilate_mm) & (mask_scan > 0))
    part = float((hidden & whole).sum() / whole.sum())
    if not (whole & ~hidden).any():
        raise InputError("the lesion mask covers the whole brain. Check the mask.")
    # the border of the field of view is no measurement
    depth = ndimage.distance_transform_edt(~(brain & ~hidden), sampling=tuple(grid.spacing_mm))[
        hidden
    ].max()
    if part > LITTLE_LEFT or depth > DEEP_MM:
        warnings.append(
            f"The mask hides {part:.0%} of the brain and reaches {depth:.0f} mm from the nearest "
            "measured voxel: few measurements are left, and the filled-in region is mostly "
            "determined by the prior."
        )
    fine = grid.one_millimetre()
    added = resample(hidden, grid, fine, order=1) >= 0.5
    union = np.maximum(np.asarray(mask_scan, np.float32), hidden)
    return Lesion(
        hidden=hidden.astype(np.uint8),
        mask_1mm=((np.asarray(mask_1mm) > 0) | added).astype(np.uint8),
        mask_scan=union,
        measured=np.where(hidden, 0, union).astype(np.float32),
        facts={
            "volume_ml": float(lesion.sum() * np.prod(grid.spacing_mm) / 1000),
            "hidden_ml": float(hidden.sum() * np.prod(grid.spacing_mm) / 1000),
            "share_inside_brain": inside,
            "share_of_brain": part,
            "depth_mm": float(depth),
            "dilate_mm": dilate_mm,
        },
        warnings=warnings,
    )
