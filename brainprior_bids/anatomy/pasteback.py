# SPDX-License-Identifier: Apache-2.0
"""The restored brain inserted into its head, for programs that need a whole head.

Outside the brain nothing is restored: the scan is divided by the bias field (the smooth part held
within the range that it has in the brain, where it was measured, and one gain per slice, which is
never smoothed) and interpolated. Its brightness is matched to the restored brain, and the two are
blended over the outermost millimetres *inside* the mask, so that outside of it there is only the
scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import affine_transform, distance_transform_edt

from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.engine.grids import Grid

FEATHER_MM = 3.0
USUAL_GAIN = 1.2
"""With a gain beyond this, in either direction, restored brain and scan do not match."""


@dataclass(frozen=True)
class Pasted:
    """A whole head.

    Parameters
    ----------
    head : (i, j, k) float32 array
        On the grid of the restored image, in its units, not below 0.
    gain : float
        Factor that scales the scan to the restored brain.
    warnings : list of str
    """

    head: NDArray[np.float32]
    gain: float
    warnings: list[str]


def paste_back(
    scan: ArrayLike,
    restored: ArrayLike,
    *,
    scan_grid: Grid,
    grid: Grid,
    mask: ArrayLike,
    mask_scan: ArrayLike,
    log_bias: ArrayLike,
    log_gains: ArrayLike = 0.0,
) -> Pasted:
    """Blend the restored brain into the bias-corrected scan.

    Parameters
    ----------
    scan, mask_scan, log_bias : (a, b, c) arrays
        The scan, the share of brain in its voxels, and the natural log of its bias field, on
        ``scan_grid``.
    log_gains : array that broadcasts to (a, b, c)
        The part of ``log_bias`` that is constant within a slice and jumps between slices.
    restored, mask : (i, j, k) arrays
        The restored brain and its mask, on ``grid``.

    Raises
    ------
    AnatomyError
        If the brain is not brighter than 0 in both.
    """
    values = np.asarray(scan, np.float32)
    jumps = np.asarray(log_gains, np.float32)
    field = np.asarray(log_bias, np.float32) - jumps
    brain = np.asarray(restored, np.float32)
    measured = field[np.asarray(mask_scan) > 0.5]
    if measured.size == 0:
        raise AnatomyError("Paste back: the brain mask is empty. Look at the mask.")
    corrected = values / np.exp(np.clip(field, measured.min(), measured.max()) + jumps)
    index = np.linalg.inv(scan_grid.affine) @ grid.affine
    head = affine_transform(  # "nearest": the head continues to the edge of the outermost slices
        corrected,
        index[:3, :3],
        index[:3, 3],
        output_shape=grid.shape,
        output=np.float32,
        order=3,
        mode="nearest",
    )
    head = np.maximum(head, 0)
    depth_mm = distance_transform_edt(np.asarray(mask) > 0, sampling=grid.spacing_mm)

    deep = depth_mm > FEATHER_MM
    floor = 0.1 * np.percentile(brain[deep], 99) if deep.any() else 0.0
    both = deep & (brain > floor) & (head > floor)
    if floor <= 0 or not both.any():
        raise AnatomyError(
            "Paste back: expected positive values inside the brain, in the scan and in the "
            "restored image; got none. Look at both."
        )
    gain = float(np.median(brain[both] / head[both]))
    warnings = []
    if not 1 / USUAL_GAIN < gain < USUAL_GAIN:
        warnings.append(
            f"Whole head: the scan was multiplied by {gain:.2f} to be as bright as the restored "
            "brain; look at the border of the brain in it."
        )
    share = np.clip(depth_mm / FEATHER_MM, 0, 1)
    share = share * share * (3 - 2 * share)
    head = (1 - share) * gain * head + share * np.maximum(brain, 0)
    return Pasted(head.astype(np.float32), gain, warnings)
