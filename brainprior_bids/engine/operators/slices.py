# SPDX-License-Identifier: Apache-2.0
"""The slice profile: thick slices as weighted means of thin ones.

``y[k] = sum_j W[k, j] x[j]`` along one axis; W[k, j] is the fraction of the profile of slice k
that lies in thin voxel j. A Gaussian profile has the slice thickness as its full width at half
maximum (as in UniRes, Brudfors et al. 2018); a boxcar has it as its width; a trapezoid is
intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.operators.base import LinearOperator, Shape

_FWHM = 2 * math.sqrt(2 * math.log(2))  # of a Gaussian with SD 1


def gaussian_profile(thickness_mm: float) -> Callable[[Tensor], Tensor]:
    """The cumulative distribution of a Gaussian profile of that full width at half maximum."""
    return lambda distance_mm: (
        0.5 * torch.special.erfc(-distance_mm * _FWHM / (thickness_mm * math.sqrt(2)))
    )


def boxcar_profile(thickness_mm: float) -> Callable[[Tensor], Tensor]:
    """The cumulative distribution of a rectangular profile of that width."""
    return lambda distance_mm: (distance_mm / thickness_mm + 0.5).clamp(0, 1)


def trapezoid_profile(thickness_mm: float) -> Callable[[Tensor], Tensor]:
    """The cumulative distribution of a profile with straight flanks.

    Full width at half maximum ``thickness_mm``; the flanks fall between 0.2 and 0.8 of it on
    either side of the centre, like those of a short selective pulse.
    """
    at = torch.tensor([-0.8, -0.2, 0.2, 0.8], dtype=torch.float64) * thickness_mm
    return measured_profile(at, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def measured_profile(distance_mm: Tensor, sensitivity: Tensor) -> Callable[[Tensor], Tensor]:
    """The cumulative distribution of a profile that was measured at samples.

    Parameters
    ----------
    distance_mm : (n,) tensor
        Ascending distances from the slice's centre.
    sensitivity : (n,) tensor
        Response there, >= 0, any scale; linear between samples and 0 beyond them.
    """
    distance = torch.as_tensor(distance_mm, dtype=torch.float64)
    height = torch.as_tensor(sensitivity, dtype=torch.float64)
    if distance.ndim != 1 or distance.shape != height.shape or len(distance) < 2:
        raise ShapeMismatchError(
            f"measured_profile: expected two lists of the same length >= 2, got shapes "
            f"{tuple(distance.shape)} and {tuple(height.shape)}."
        )
    steps = distance.diff()
    areas = 0.5 * (height[1:] + height[:-1]) * steps
    if not bool((steps > 0).all()) or not bool((height >= 0).all()) or not float(areas.sum()) > 0:
        raise GeometryError(
            "measured_profile: distances must rise and sensitivities be >= 0 and not all 0."
        )
    total = torch.cat([areas.new_zeros(1), areas.cumsum(0)])

    def cumulative(at_mm: Tensor) -> Tensor:
        inside = at_mm.clamp(float(distance[0]), float(distance[-1]))
        i = (torch.searchsorted(distance, inside.contiguous()) - 1).clamp(0, len(steps) - 1)
        t = inside - distance[i]
        slope = (height[i + 1] - height[i]) / steps[i]
        return (total[i] + height[i] * t + 0.5 * slope * t * t) / total[-1]

    return cumulative


def slice_weights(
    cumulative: Callable[[Tensor], Tensor],
    *,
    n_slices: int,
    spacing_mm: float,
    n_thin: int,
    thin_mm: float,
) -> Tensor:
    """The matrix W of a stack whose outer edges meet those of the thin grid.

    Slice k is centred at ``(k + 0.5) spacing_mm``, thin voxel j spans ``[j, j + 1] thin_mm``.

    Parameters
    ----------
    cumulative : function
        The profile's cumulative distribution over the distance from the slice's centre in mm.

    Returns
    -------
    (n_slices, n_thin) float64 tensor
        Rows sum to 1, minus the part of a profile beyond the grid's edge.

    Raises
    ------
    GeometryError
        If a spacing is not positive, or the spacing is larger than the field of view.
    """
    if not (spacing_mm > 0 and thin_mm > 0):
        raise GeometryError(
            f"slice_weights: spacings must be above 0 mm, got {spacing_mm} and {thin_mm}."
        )
    if spacing_mm > n_thin * thin_mm * (1 + 1e-6):
        raise GeometryError(
            f"slice_weights: slices {spacing_mm} mm apart do not fit a field of view of "
            f"{n_thin * thin_mm} mm. Check the header's voxel size."
        )
    centre = (torch.arange(n_slices, dtype=torch.float64) + 0.5) * spacing_mm
    edge = torch.arange(n_thin + 1, dtype=torch.float64) * thin_mm
    return cumulative(edge[None, :] - centre[:, None]).diff(dim=1)


class SliceProfile(LinearOperator):
    """A matrix along one axis: ``y[..., k, ...] = sum_j W[k, j] x[..., j, ...]``.

    Parameters
    ----------
    slice_weights : (thick, thin) tensor
        Row k is the profile of slice k; dimensionless.
    in_shape : (i, j, k)
        Voxels of the image.
    axis : int
        The slice axis within ``in_shape``.

    Raises
    ------
    ShapeMismatchError
        If the two disagree on ``thin``.
    """

    def __init__(self, slice_weights: Tensor, in_shape: Shape, axis: int) -> None:
        if slice_weights.ndim != 2 or slice_weights.shape[1] != in_shape[axis]:
            raise ShapeMismatchError(
                f"SliceProfile: slice_weights must be (thick, {in_shape[axis]}) for an image "
                f"of shape {in_shape} and axis {axis}, got {tuple(slice_weights.shape)}."
            )
        self.slice_weights = slice_weights
        self.in_shape = tuple(in_shape)
        self.axis = axis - len(in_shape)
        out = list(in_shape)
        out[axis] = int(slice_weights.shape[0])
        self.out_shape = tuple(out)

    def _apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, 0)
        flat = matrix.to(x) @ moved.reshape(moved.shape[0], -1)
        return flat.reshape(-1, *moved.shape[1:]).movedim(0, self.axis)

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply(self.slice_weights, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply(self.slice_weights.mT, y)
