# SPDX-License-Identifier: Apache-2.0
"""The rigid motion between two scans of one brain, and whether they show one brain at all.

Two scans of thick slices in different directions are blurred in different directions, which would
bias a registration. Therefore each is first blurred by the slice profile of the other: then both
have the same resolution, and their correlation is highest when they are aligned. Symbols:
millimetres are scanner RAS+ of each scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid

FWHM = 2.3548
"""Full width at half maximum of a Gaussian with SD 1."""
BINS = 32
"""Bins of the joint histogram, for the mutual information."""
AROUND_MM = 4
"""Margin around the brain that is compared too."""
THICK_MM = 1.5
"""Thinner slices cause no blur."""
SHARED = 0.5
"""At least this part of the smaller brain must be in both scans after alignment."""
ALIKE = 0.85
"""At least this correlation inside the brain; measured values are in docs/tasks/fuse.md."""

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PlacedScan:
    """One scan, divided by its bias field.

    Parameters
    ----------
    name : str
        For messages.
    data : (i, j, k)
        On ``grid``.
    acquisition : Acquisition
    mask : array on ``grid.one_millimetre()``
        Above 0.5 in the brain.
    hidden : (i, j, k), optional
        Above 0 in a lesion, on ``grid``: brain, but not compared with other scans.
    """

    name: str
    data: Image
    grid: Grid
    acquisition: Acquisition
    mask: NDArray[Any]
    hidden: NDArray[Any] | None = None

    @property
    def lesion(self) -> NDArray[np.bool_]:
        """The lesion on ``grid.one_millimetre()``."""
        grid = self.grid.one_millimetre()
        if self.hidden is None:
            return np.zeros(grid.shape, np.bool_)
        lesion = np.asarray(self.hidden) > 0
        return np.asarray(resample(lesion, self.grid, grid, order=1) >= 0.5)

    @property
    def across(self) -> NDArray[np.float64]:
        """Direction in which slices are stacked, (3,) RAS, length 1."""
        column = self.grid.affine[:3, self.acquisition.slice_axis]
        return np.asarray(column / np.linalg.norm(column), np.float64)

    @classmethod
    def from_scan(
        cls,
        name: str,
        values: NDArray[Any],
        log_bias: NDArray[Any],
        *,
        grid: Grid,
        acquisition: Acquisition,
        mask: NDArray[Any],
        hidden: NDArray[Any] | None = None,
    ) -> PlacedScan:
        """A scan as measured, divided by ``exp(log_bias)``; non-finite values become 0."""
        finite = np.nan_to_num(np.asarray(values, np.float32), nan=0, posinf=0, neginf=0)
        unbiased = (finite / np.exp(log_bias)).astype(np.float32)
        return cls(name, unbiased, grid, acquisition, mask, hidden)

    def fine(self, other: PlacedScan) -> Image:
        """The scan on its 1 mm grid, blurred by the other's slice profile. A lesion is filled with
        the nearest voxels, so that it is not blurred into its surroundings.
        """
        grid, data = self.grid.one_millimetre(), self.data
        if self.hidden is not None:
            nearest = ndimage.distance_transform_edt(
                np.asarray(self.hidden) > 0,
                sampling=tuple(self.grid.spacing_mm),
                return_distances=False,
                return_indices=True,
            )
            data = data[tuple(nearest)]
        data = resample(data, self.grid, grid, order=1)
        axes = grid.affine[:3, :3] / grid.spacing_mm
        thickness = other.acquisition.thickness_mm
        if thickness > THICK_MM and abs(float(self.across @ other.across)) < 0.7:
            axis = int(np.argmax(np.abs(axes.T @ other.across)))
            sd = thickness / FWHM / float(grid.spacing_mm[axis])
            data = ndimage.gaussian_filter1d(data, sd, axis=axis, mode="constant")
        return data


@dataclass(frozen=True, eq=False)
class Motion:
    """Position of a scan relative to the reference.

    Parameters
    ----------
    to_reference : (4, 4)
        Scanner RAS mm of the scan -> of the reference; rigid.
    gain : float
        Factor that scales the scan to the brightness of the reference.
    correlation : float
        Correlation of the two inside both brains, after alignment.
    shared : float
        Part of the smaller brain that both show.
    """

    to_reference: Matrix
    gain: float
    correlation: float
    shared: float

    @property
    def angle_deg(self) -> float:
        """Angle of the rotation in degrees."""
        cosine = (np.trace(self.to_reference[:3, :3]) - 1) / 2
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    def shift_mm(self, at: NDArray[np.float64]) -> float:
        """Displacement of the point ``at`` (mm of the scan)."""
        moved = self.to_reference[:3, :3] @ at + self.to_reference[:3, 3]
        return float(np.linalg.norm(moved - at))


def find_motion(reference: PlacedScan, scan: PlacedScan) -> Motion:
    """Rigid registration of a scan to the reference, by the tissue outside both lesions.

    Raises
    ------
    InputError
        If the two do not show one brain: the correlation inside it stays below ``ALIKE``, or too
        little of it is in both. Both are named.
    """
    fixed, moving = reference.fine(scan), scan.fine(reference)
    fine, moving_grid = reference.grid.one_millimetre(), scan.grid.one_millimetre()
    inside = (np.asarray(reference.mask) > 0.5) & ~reference.lesion
    there = (np.asarray(scan.mask) > 0.5) & ~scan.lesion
    for name, brain in ((reference.name, inside), (scan.name, there)):
        if not brain.any():
            raise InputError(f"{name}: the brain mask is empty; it cannot be aligned.")
    around = ndimage.binary_dilation(inside, iterations=AROUND_MM) & ~reference.lesion
    points = register_rigid(
        BrainImage(fixed, fine, inside),
        BrainImage(moving, moving_grid, there),
        around=around,
        metric=Metric.CORRELATION,
    )
    to_reference = np.linalg.inv(points)
    registered = resample(moving, moving_grid, fine, matrix=to_reference, order=1)
    moved = resample(there, moving_grid, fine, matrix=to_reference, order=1) > 0.5
    both = inside & moved
    shared = float(both.sum() / max(1, min(inside.sum(), there.sum())))
    if both.sum() < 100:
        correlation, gain = 0.0, 1.0
    else:
        a, b = fixed[both].astype(np.float64), registered[both].astype(np.float64)
        correlation = float(np.corrcoef(a, b)[0, 1])
        gain = float(a @ b / max(float(b @ b), 1e-30))
    if not (correlation >= ALIKE and shared >= SHARED and gain > 0):
        raise InputError(
            f"{scan.name} and {reference.name} do not show the same brain: after rigid alignment "
            f"their correlation inside it is {correlation:.2f} (at least {ALIKE} is needed), and "
            f"they overlap in {100 * shared:.0f} % of it (at least {100 * SHARED:.0f} %). Are "
            "both complete, and of the same participant and contrast? Exclude one with --run-id "
            "or --bids-filter-file."
        )
    return Motion(to_reference, gain, correlation, shared)


def common_mask(
    reference: PlacedScan, others: Sequence[tuple[PlacedScan, Motion]]
) -> NDArray[np.uint8]:
    """Majority vote of the scans that cover a voxel, on the reference's 1 mm grid. A thick slice
    does not resolve where within it the brain ends; a scan in another direction does. A lesion of
    any of them counts as brain.
    """
    grid = reference.grid.one_millimetre()
    votes = (np.asarray(reference.mask) > 0.5).astype(np.float32)
    coverage = np.ones(grid.shape, np.float32)
    lesion = reference.lesion
    for scan, motion in others:
        there = scan.grid.one_millimetre()
        if scan.hidden is not None:
            moved = resample(scan.lesion, there, grid, matrix=motion.to_reference, order=1)
            lesion = lesion | (moved >= 0.5)
        votes += resample(
            np.asarray(scan.mask) > 0.5, there, grid, matrix=motion.to_reference, order=1
        )
        whole = np.ones(there.shape, np.float32)
        coverage += resample(whole, there, grid, matrix=motion.to_reference, order=1)
    brain = (votes > 0.5 * coverage) | lesion
    labels, n = ndimage.label(brain)
    if n > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        brain = labels == sizes.argmax()
    return np.asarray(ndimage.binary_fill_holes(brain), np.uint8)


class Metric(StrEnum):
    """The metric of a registration."""

    CORRELATION = "correlation"
    """For images of one contrast."""
    INFORMATION = "mutual information"
    """For images of two contrasts."""


@dataclass(frozen=True, eq=False)
class BrainImage:
    """An image and its brain mask.

    Parameters
    ----------
    data : (i, j, k) float32
        On ``grid``.
    grid : Grid
    mask : (i, j, k) bool
    """

    data: Image
    grid: Grid
    mask: NDArray[np.bool_]


def register_rigid(
    fixed: BrainImage, moving: BrainImage, *, around: NDArray[np.bool_], metric: Metric
) -> Matrix:
    """Rigid registration: (4, 4) RAS mm of the fixed image -> RAS mm of the moving one.

    Parameters
    ----------
    around : (i, j, k) bool
        Voxels of the fixed image that are compared.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    a, b = _to_itk(fixed.data, fixed.grid), _to_itk(moving.data, moving.grid)
    centre = _centre(fixed.mask, fixed.grid)
    method = sitk.ImageRegistrationMethod()
    if metric is Metric.CORRELATION:
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=BINS)
    method.SetMetricFixedMask(_to_itk(around.astype(np.uint8), fixed.grid))
    method.SetInterpolator(sitk.sitkLinear)
    start = sitk.Euler3DTransform()
    start.SetCenter(_LPS @ centre)
    # start: scanner coordinates, or centre on centre, whichever fits better
    offsets = (np.zeros(3), _centre(moving.mask, moving.grid) - centre)
    values = []
    for offset in offsets:
        start.SetTranslation(_LPS @ offset)
        method.SetInitialTransform(start, inPlace=False)
        values.append(method.MetricEvaluate(a, b))
    start.SetTranslation(_LPS @ offsets[int(np.argmin(values))])
    method.SetInitialTransform(start, inPlace=False)
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-4, numberOfIterations=200, relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-8,
    )  # fmt: skip
    method.SetOptimizerScalesFromPhysicalShift()
    composite = sitk.CompositeTransform(method.Execute(a, b))
    rigid = sitk.Euler3DTransform(composite.GetBackTransform())
    rotation = np.array(rigid.GetMatrix()).reshape(3, 3)
    about = np.array(rigid.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = np.array(rigid.GetTranslation()) + about - rotation @ about
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    return np.asarray(flip @ matrix @ flip, np.float64)


_LPS = np.diag([-1.0, -1.0, 1.0])
"""RAS to LPS and back."""


def _centre(brain: NDArray[np.bool_], grid: Grid) -> NDArray[np.float64]:
    index = np.array(ndimage.center_of_mass(brain))
    return np.asarray((grid.affine @ np.append(index, 1))[:3], np.float64)


def _to_itk(data: NDArray[Any], grid: Grid) -> Any:
    """An ITK image of an array; ITK's millimetres are LPS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    axes = _LPS @ grid.affine[:3, :3]
    image.SetOrigin((_LPS @ grid.affine[:3, 3]).tolist())
    image.SetSpacing(grid.spacing_mm.tolist())
    image.SetDirection((axes / grid.spacing_mm).ravel().tolist())
    return image
