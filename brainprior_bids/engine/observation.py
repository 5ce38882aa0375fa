# SPDX-License-Identifier: Apache-2.0
"""The observations of a brain, validated and normalised once.

``Observation``: a scan, ``y = b * (A x) + n``. ``ImageObservation``: another tool's image of the
same brain, ``z = x + e`` with white e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import expm, logm
from torch import Tensor

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import (
    GeometryError,
    InputError,
    ShapeMismatchError,
    UsageError,
)
from brainprior_bids.engine.grids import Grid

IDENTITY = np.eye(4)
MEAN_STEPS = 5
"""Iterations of ``mean_position``; for motions of some degrees, two have an accuracy of 1e-12."""
QUANTILE_VALUES = 8_000_000
"""Maximum number of values in a quantile; the limit of ``torch.quantile`` is 2^24."""


@dataclass(frozen=True, eq=False)
class Observation:
    """One scan as measured, with the facts of its acquisition.

    Parameters
    ----------
    scan : (i, j, k)
        Closest-canonical (RAS) voxels in scanner units; neither skull-stripped nor divided by its
        bias field. Kept as float32; NaN outside the brain become 0.
    grid : Grid
        Grid of the scan: voxel -> scanner RAS mm.
    acquisition : Acquisition
        Slice axis, thickness, spacing and profile, on those axes.
    mask : (i, j, k) in [0, 1]
        Brain on the scan's grid; sets the intensity unit and the gain of the bias field.
    log_bias : (i, j, k), optional
        Natural logarithm of the bias field (N4); 0 by default. Kept with mean 0 in the brain.
    hidden : (i, j, k), optional
        Above 0 where the scan is excluded from the likelihood (a lesion): precision 0.
    noise_sd : float or (i, j, k), optional
        Noise SD of a scan voxel, in units of ``unit``, which is then fixed. None: estimated from
        the scan.
    to_reference : (4, 4)
        Rigid: scanner RAS mm of this scan -> those of the first one. Identity for the first.
    gain : float
        Factor that scales scan / bias to the brightness of the reference.
    interleave_motion : (n, 4, 4), optional
        Rigid: scanner RAS mm of each of n interleaves -> of the first, if the participant moved
        between them; of a 2-D scan of slices at least 1 mm apart. Interleave p has the slices p,
        p + n, p + 2n, ... See ``interleaves``.
    name : str
        For messages.

    Attributes
    ----------
    brain : (i, j, k) bool
        Inside the mask and not hidden.
    unit : float
        Scanner units of the 99th percentile of scan / bias in ``brain``.

    Raises
    ------
    ShapeMismatchError
        If an array is not on the scan's grid.
    GeometryError
        If a motion cannot be inverted, the slices do not match the field of view, or displaced
        interleaves have slices less than 1 mm apart.
    InputError
        If the mask is empty or wholly hidden, the brain is constant or not positive, NaN lies
        inside the brain, in the mask or in the bias, an array is complex, or the gain is not
        above 0.
    """

    scan: Tensor
    grid: Grid
    acquisition: Acquisition
    mask: Tensor
    log_bias: Tensor = None  # type: ignore[assignment]
    hidden: Tensor | None = None
    noise_sd: float | Tensor | None = None
    to_reference: NDArray[np.float64] = field(default_factory=lambda: IDENTITY)
    gain: float = 1.0
    interleave_motion: NDArray[np.float64] | None = None
    name: str = "scan"
    brain: Tensor = field(init=False)
    unit: float = field(init=False)
    warnings: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        def keep(**values: object) -> None:
            for name, value in values.items():
                object.__setattr__(self, name, value)

        shape, who = self.grid.shape, self.name
        scan = as_volume("scan", self.scan, shape, who)
        mask = as_volume("mask", self.mask, shape, who)
        bias = torch.zeros(shape)
        if self.log_bias is not None:
            bias = as_volume("log_bias", self.log_bias, shape, who)
        for name, values in (("mask", mask), ("log_bias", bias)):
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"{who}: {name} holds NaN or infinite values. Recreate it.")
        brain = mask > 0.5
        if not bool(brain.any()):
            raise InputError(
                f"{who}: the brain mask is empty. Check the parcellation, or pass another mask."
            )
        if self.hidden is not None:
            keep(hidden=as_volume("hidden", self.hidden, shape, who) > 0)
            brain = brain & ~self.hidden
        if not bool(brain.any()):
            raise InputError(f"{who}: the lesion mask covers the whole brain. Check the mask.")
        missing = ~torch.isfinite(scan)
        if bool((missing & brain).any()):
            raise InputError(
                f"{who}: {int((missing & brain).sum())} voxels inside the brain are NaN or "
                "infinite. Repair the image first."
            )
        scan = torch.where(missing, 0.0, scan)
        bias = bias - bias[brain].mean()
        keep(scan=scan, mask=mask, log_bias=bias, brain=brain, unit=_unit(scan, bias, brain, who))
        keep(to_reference=checked_matrix(self.to_reference, f"{who}: to_reference"))
        if self.interleave_motion is not None:
            keep(interleave_motion=self._checked_interleaves())
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise InputError(f"{who}: the gain must be above 0, got {self.gain}.")
        if isinstance(self.noise_sd, (int, float)):
            keep(noise_sd=float(self.noise_sd))
            if not (math.isfinite(self.noise_sd) and self.noise_sd > 0):
                raise InputError(
                    f"{who}: noise SD must be above 0, got {self.noise_sd}. "
                    "Pass a positive value or let it be estimated."
                )
        elif self.noise_sd is not None:
            keep(noise_sd=self._noise_map())
        keep(warnings=self._check_slices())

    @property
    def is_reference(self) -> bool:
        """Whether the scan is in the position of the reference."""
        return bool(np.array_equal(self.to_reference, IDENTITY))

    def interleaves(self) -> list[Observation]:
        """The scan itself; or, with ``interleave_motion``, each interleave as an observation of
        the brain in which the slices of the others are hidden.

        The brain is in the mean of their positions (of two: halfway), where mask, structures and
        affine have it, because they come from all slices. Each part has its own mean bias; the
        gains undo the difference.
        """
        if self.interleave_motion is None:
            return [self]
        to_brain = np.linalg.inv(mean_position(self.interleave_motion)) @ self.interleave_motion
        count = len(to_brain)
        parts: list[Observation] = []
        for first, motion in enumerate(to_brain):
            hidden = torch.ones(self.grid.shape, dtype=torch.bool)
            hidden.movedim(self.acquisition.slice_axis, 0)[first::count] = False
            part = replace(
                self,
                hidden=hidden if self.hidden is None else hidden | self.hidden,
                to_reference=self.to_reference @ motion,
                interleave_motion=None,
                name=f"{self.name}, slices {first}, {first + count}, ...",
            )
            if parts:
                shift = self.log_bias[parts[0].brain].mean() - self.log_bias[part.brain].mean()
                part = replace(part, gain=self.gain * float(shift.exp()))
            parts.append(part)
        return parts

    def _checked_interleaves(self) -> NDArray[np.float64]:
        who, motions = f"{self.name}: interleave_motion", np.asarray(self.interleave_motion)
        axis = self.acquisition.slice_axis
        if motions.shape[1:] != (4, 4) or not 2 <= len(motions) <= self.grid.shape[axis]:
            raise GeometryError(
                f"{who} must be (n, 4, 4) with one matrix for each of 2 to "
                f"{self.grid.shape[axis]} interleaves, got {motions.shape}."
            )
        if self.grid.spacing_mm[axis] < 1:
            raise GeometryError(f"{who} needs slices at least 1 mm apart. Leave it out.")
        return np.stack([checked_matrix(motion, who) for motion in motions])

    def _noise_map(self) -> Tensor:
        sd = as_volume("noise_sd", self.noise_sd, self.grid.shape, self.name)
        inside = sd[self.mask > 0.5]
        if not bool(torch.isfinite(inside).all()) or not bool((inside > 0).all()):
            raise InputError(
                f"{self.name}: the map of the noise SD must be finite and above 0 everywhere in "
                "the brain."
            )
        return sd

    def _check_slices(self) -> tuple[str, ...]:
        """The voxels' spacing is the header's; the metadata can only confirm it."""
        axis, extent = self.acquisition.slice_axis, self.grid.extent_mm
        spacing, stated = float(self.grid.spacing_mm[axis]), self.acquisition.spacing_mm
        thickness = self.acquisition.thickness_mm
        for what, value in (
            (f"slices of {thickness} mm", thickness),
            (f"slices {stated} mm apart", stated),
        ):
            if value > float(extent[axis]) * (1 + 1e-6):
                raise GeometryError(
                    f"{self.name}: {what} do not fit a field of view of {extent[axis]:.4g} mm. "
                    "Check SliceThickness and SpacingBetweenSlices."
                )
        if abs(stated - spacing) <= 0.05 * spacing:
            return ()
        return (
            f"Slices are {spacing:.3g} mm apart in the image but {stated:.3g} mm according to "
            "its metadata; the image header is used.",
        )


@dataclass(frozen=True, eq=False)
class ImageObservation:
    """Another tool's image of the brain: ``z = x + e``, ``e ~ N(0, sd^2)`` white.

    Parameters
    ----------
    image : (i, j, k)
        On the 1 mm grid of the reference, in any unit: it is scaled to the scan by the
        least-squares gain between A z and y / b inside the brain.
    sd : float
        SD of its error in a voxel, engine unit.

    Raises
    ------
    InputError
        If the SD is not above 0 or a value is not finite.
    """

    image: ArrayLike | Tensor
    sd: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sd) and self.sd > 0):
            raise InputError(f"image to refine: the trust must be above 0, got {self.sd}.")
        image = as_tensor("image", self.image, "image to refine")
        if not bool(torch.isfinite(image).all()):
            raise InputError("image to refine: it holds NaN or infinite values.")
        object.__setattr__(self, "image", image)


def as_tensor(name: str, values: ArrayLike | Tensor, who: str) -> Tensor:
    """A real float32 tensor on the CPU.

    Raises
    ------
    InputError
        If it is complex.
    """
    tensor = (
        values.detach().cpu()
        if isinstance(values, Tensor)
        else torch.from_numpy(np.ascontiguousarray(np.asarray(values)))
    )
    if tensor.is_complex():
        raise InputError(f"{who}: {name} is complex ({tensor.dtype}). Pass its magnitude.")
    return tensor.to(torch.float32)


def as_volume(
    name: str, values: ArrayLike | Tensor | None, shape: tuple[int, int, int], who: str
) -> Tensor:
    """``as_tensor`` with a check of the shape.

    Raises
    ------
    ShapeMismatchError
        If the shape is another one.
    """
    assert values is not None
    tensor = as_tensor(name, values, who)
    if tuple(tensor.shape) != shape:
        raise ShapeMismatchError(
            f"{who}: {name} must have shape {shape}, got {tuple(tensor.shape)}. scan, mask, "
            "log_bias and hidden lie on the scan's grid, mask_1mm on grid.one_millimetre()."
        )
    return tensor


def checked_matrix(values: ArrayLike, who: str) -> NDArray[np.float64]:
    """An invertible (4, 4) float64 matrix.

    Raises
    ------
    GeometryError
        If it is not one.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if (
        matrix.shape != (4, 4)
        or not np.isfinite(matrix).all()
        or abs(np.linalg.det(matrix[:3, :3])) < 1e-9
    ):
        raise GeometryError(f"{who} must be an invertible 4 x 4 matrix, got\n{matrix}.")
    return matrix


def mean_position(motions: ArrayLike) -> NDArray[np.float64]:
    """(4, 4) the mean of rigid motions, (n, 4, 4): the M for which the matrix logarithms of
    M^-1 M_p have the mean 0. That of the identity and M is halfway: H H = M.
    """
    each = np.asarray(motions, np.float64)
    mean = each[0]
    for _ in range(MEAN_STEPS):
        steps = [np.real(logm(np.linalg.inv(mean) @ one)) for one in each]
        mean = mean @ np.asarray(expm(np.mean(steps, axis=0)), np.float64)
    return np.asarray(mean, np.float64)


def observations_of(
    given: Observation | ImageObservation | Sequence[Observation | ImageObservation],
) -> tuple[list[Observation], list[ImageObservation]]:
    """Split observations into the scans, the reference first, and the other tools' images.

    Raises
    ------
    UsageError
        If there is no scan, or one that is not the first claims to be the reference's frame.
    """
    every = [given] if isinstance(given, (Observation, ImageObservation)) else list(given)
    scans = [one for one in every if isinstance(one, Observation)]
    images = [one for one in every if isinstance(one, ImageObservation)]
    if len(scans) + len(images) < len(every) or not scans:
        raise UsageError(
            "restore: expected at least one Observation (a scan), and ImageObservations beside "
            f"it, got {[type(one).__name__ for one in every]}."
        )
    if not scans[0].is_reference:
        raise UsageError(
            f"restore: {scans[0].name} comes first and is the reference; its to_reference must "
            "be the identity."
        )
    return scans, images


def _unit(scan: Tensor, log_bias: Tensor, brain: Tensor, who: str) -> float:
    values = scan[brain] / log_bias[brain].exp()
    values = values[:: max(1, -(-values.numel() // QUANTILE_VALUES))]
    unit = float(torch.quantile(values, 0.99))
    if not (math.isfinite(unit) and unit > 0):
        raise InputError(
            f"{who}: the 99th percentile inside the brain is {unit}, expected above 0. "
            "Is the image all zero, or negative?"
        )
    return unit
