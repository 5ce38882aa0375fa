# SPDX-License-Identifier: Apache-2.0
"""Images as the pictures need them: closest-canonical arrays, and plane sections through them.

Display convention, everywhere: neurological. In coronal and axial sections the left of the
picture is the participant's left; in sagittal sections anterior is on the right. Sections follow
the scan's own axes (voxel axes i, j, k, which point about right, anterior, superior).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nb
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

PLANES = ("sagittal", "coronal", "axial")
EDGES = ("PAIS", "LRIS", "LRPA")
"""Letters at the left, right, lower and upper edge of a section perpendicular to i, j, k."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and one past the last, along i, j and k."""


@dataclass(frozen=True)
class Volume:
    """A 3-D image on closest-canonical (RAS) axes.

    Parameters
    ----------
    data : (i, j, k) float32 array
        Finite; NaN and infinite values of the file are set to 0.
    affine : (4, 4) float64 array
        Voxel index to mm RAS+.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """(3,) voxel size along i, j, k."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def tilt_degrees(self) -> float:
        """Largest angle between a voxel axis and the scanner axis of the same name."""
        cosines = np.abs(np.diag(self.affine[:3, :3])) / self.spacing_mm
        return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())

    def like(self, data: NDArray[np.float32]) -> Volume:
        """Other values on the same grid."""
        return Volume(np.asarray(data, np.float32), self.affine)

    def regrid(self, target: Volume, order: int, *, extend: bool = True) -> Volume:
        """This image at the voxel centres of ``target``; order 0 is nearest, 1 linear.

        Beyond the border, it has the value of the nearest voxel, or 0 without ``extend``.
        """
        matrix = np.linalg.inv(self.affine) @ target.affine  # voxel of the target -> own voxel
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(matrix[:3, :3].ravel().tolist())
        transform.SetTranslation(matrix[:3, 3].tolist())
        resampled = sitk.Resample(
            sitk.GetImageFromArray(self.data.T),  # ITK's arrays are (k, j, i)
            target.data.shape,
            transform,
            sitk.sitkLinear if order else sitk.sitkNearestNeighbor,
            useNearestNeighborExtrapolator=extend,
        )
        return target.like(sitk.GetArrayFromImage(resampled).T)


@dataclass(frozen=True)
class Section:
    """A plane section, ready to be drawn: row 0 is the upper edge, column 0 the left.

    Parameters
    ----------
    image : (v, h) float32 array
        Values.
    axis : 0, 1 or 2
        The voxel axis that the section is perpendicular to.
    position_mm : float
        Coordinate of the section along the scanner axis nearest to ``axis``; for a tilted grid at
        the centre of the section.
    pixel_mm : (v, h)
        Size of a pixel.
    """

    image: NDArray[np.float32]
    axis: int
    position_mm: float
    pixel_mm: tuple[float, float]

    @property
    def height_mm(self) -> float:
        """Upper to lower edge."""
        return self.image.shape[0] * self.pixel_mm[0]

    @property
    def width_mm(self) -> float:
        """Left to right edge."""
        return self.image.shape[1] * self.pixel_mm[1]

    @property
    def label(self) -> str:
        """Plane and coordinate, as written on the picture."""
        rounded = round(self.position_mm)
        sign = "+" if rounded > 0 else "\N{MINUS SIGN}" if rounded < 0 else ""
        return f"{PLANES[self.axis]}  {'xyz'[self.axis]} = {sign}{abs(rounded)} mm"


def load_volume(path: Path) -> Volume:
    """The image at ``path`` on closest-canonical axes, a single volume."""
    image = nb.as_closest_canonical(nb.load(path))
    data = np.asarray(image.dataobj, dtype=np.float32)
    data = data.reshape(data.shape[:3])
    return Volume(np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0), image.affine)


def section(volume: Volume, axis: int, index: int, box: Box | None = None) -> Section:
    """The section through voxel ``index`` along ``axis``, cut down to ``box``.

    Parameters
    ----------
    index : int
        Voxel index in the whole volume, not in the box.
    """
    if box is None:
        box = tuple((0, n) for n in volume.data.shape)  # type: ignore[assignment]
    horizontal, vertical = (a for a in range(3) if a != axis)
    window: list[slice | int] = [slice(*limits) for limits in box]
    window[axis] = index
    centre = (np.array(volume.data.shape) - 1) / 2
    centre[axis] = index
    spacing = volume.spacing_mm
    return Section(
        image=volume.data[tuple(window)].T[::-1],
        axis=axis,
        position_mm=float((volume.affine @ np.append(centre, 1.0))[axis]),
        pixel_mm=(float(spacing[vertical]), float(spacing[horizontal])),
    )


def bounding_box(mask: Volume, margin_mm: float) -> Box:
    """The smallest box around ``mask > 0.5``, widened by ``margin_mm`` inside the volume.

    An empty mask gives the whole volume.
    """
    inside = mask.data > 0.5
    if not inside.any():
        return tuple((0, n) for n in inside.shape)  # type: ignore[return-value]
    limits = []
    for axis, (n, spacing) in enumerate(zip(inside.shape, mask.spacing_mm, strict=True)):
        along = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(margin_mm / spacing))
        limits.append((max(int(along[0]) - margin, 0), min(int(along[-1]) + 1 + margin, n)))
    return tuple(limits)  # type: ignore[return-value]


def spread(mask: Volume, axis: int, count: int) -> list[int]:
    """``count`` slice indices along ``axis`` that divide ``mask > 0.5`` evenly.

    A single slice is the middle one; two slices are at a third and two thirds, and so on.
    """
    low, high = bounding_box(mask, 0.0)[axis]
    shares = np.arange(1, count + 1) / (count + 1)
    return [int(low + (high - low) * share) for share in shares]
