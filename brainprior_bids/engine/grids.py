# SPDX-License-Identifier: Apache-2.0
"""Grids: voxels <-> millimetres.

``x_mm = affine @ (i, j, k, 1)``; millimetres are RAS+ of the scanner unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.engine.errors import GeometryError

PLANES = ("sagittal", "coronal", "axial")
"""Plane of slices that are stacked along the first, second, third closest-canonical axis."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A 3-D voxel grid.

    Parameters
    ----------
    shape : (i, j, k)
        Number of voxels along each axis, all >= 1.
    affine : (4, 4) float64 array
        Voxel index to mm (RAS+), homogeneous.

    Raises
    ------
    GeometryError
        If the shape is not three positive integers, or the affine is singular or not finite.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"Grid: shape must be three positive integers, got {self.shape}.")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"Grid: affine must be 4 x 4 and finite, got\n{affine}.")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise GeometryError(
                f"Grid: affine is singular, got\n{affine}. Repair the image's sform or qform."
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and self.shape == other.shape
            and bool(np.allclose(self.affine, other.affine, atol=1e-6))
        )

    __hash__ = None  # type: ignore[assignment]  # holds an array

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """(3,) voxel size in mm along i, j, k."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0), np.float64)

    @property
    def extent_mm(self) -> NDArray[np.float64]:
        """(3,) field of view in mm, from voxel edge to voxel edge."""
        return np.asarray(self.spacing_mm * np.array(self.shape), np.float64)

    def one_millimetre(self) -> Grid:
        """The grid of about 1 mm voxels with the same axes and the same edges.

        The spacing along each axis is extent / round(extent), so that it divides the field of
        view; the voxel edges of both grids meet at the border.
        """
        shape = np.maximum(np.round(self.extent_mm), 1).astype(int)
        return self.resized((int(shape[0]), int(shape[1]), int(shape[2])))

    def resized(self, shape: tuple[int, int, int]) -> Grid:
        """The grid with this many voxels along each axis, and the same axes and edges."""
        scale = np.array(self.shape) / shape
        affine = np.array(self.affine)
        affine[:3, :3] = self.affine[:3, :3] * scale
        first_centre = (scale - 1) / 2  # of the new first voxel, in old voxel indices
        affine[:3, 3] = (self.affine @ np.append(first_centre, 1.0))[:3]
        return Grid(shape, affine)

    def crop(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> Grid:
        """The part from voxel ``start`` up to, not including, ``stop``."""
        affine = np.array(self.affine)
        affine[:3, 3] = (self.affine @ np.append(np.array(start, float), 1.0))[:3]
        return Grid((stop[0] - start[0], stop[1] - start[1], stop[2] - start[2]), affine)

    def points_mm(self, to: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
        """(3, i, j, k) mm coordinates of every voxel centre, optionally mapped on by ``to``.

        Parameters
        ----------
        to : (4, 4) array, optional
            mm to mm, for example scanner RAS to MNI305.
        """
        matrix = self.affine if to is None else np.asarray(to, np.float64) @ self.affine
        i, j, k = (np.arange(n, dtype=np.float64) for n in self.shape)
        a = matrix[:3, :3]
        return (
            a[:, 0, None, None, None] * i[:, None, None]
            + a[:, 1, None, None, None] * j[:, None]
            + a[:, 2, None, None, None] * k
            + matrix[:3, 3, None, None, None]
        ).astype(np.float32)


MNI305 = Grid(
    (181, 217, 181),
    np.array([[1, 0, 0, -90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]], dtype=float),
)
"""The 1 mm grid of every ``space-MNI305`` output."""
