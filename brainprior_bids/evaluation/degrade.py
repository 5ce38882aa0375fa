# SPDX-License-Identifier: Apache-2.0
"""Degrade a good scan, for evaluation.

The simulation is deliberately independent of the engine's operators: slice profile, noise
distribution and bias field differ from what the engine assumes, so that an evaluation does not
reward a method for inverting its own forward model.

Intensities are in the caller's unit; where a number is relative, ``unit`` is the intensity that
counts as 1 (the 99th percentile of the brain).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import GeometryError, UsageError
from brainprior_bids.engine.grids import Grid

_OVERSAMPLING = 20  # points per fine voxel at which the profile is evaluated


def _boxcar(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return (np.abs(u) <= 0.5).astype(float)


def _trapezoid(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip((0.7 - np.abs(u)) / 0.4, 0, 1)  # ramps from 0.3 to 0.7 of the thickness


def _raised_cosine(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(u) < 1, 0.5 * (1 + np.cos(np.pi * u)), 0.0)


def _truncated_pulse(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Magnitude response of a two-lobed Hamming sinc pulse: flat top, ramps, small side lobes."""
    t = np.linspace(-1, 1, 401)  # time, from the beginning to the end of the pulse
    pulse = np.sinc(2 * t) * (0.54 + 0.46 * np.cos(np.pi * t))
    response = np.abs(np.cos(4 * np.pi * np.multiply.outer(u, t)) @ pulse)
    at_zero = pulse.sum()
    return np.where(np.abs(u) < 2, response / at_zero, 0.0)


PROFILES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "boxcar": _boxcar,
    "trapezoid": _trapezoid,
    "cosine": _raised_cosine,
    "pulse": _truncated_pulse,
}
"""Shapes over distance / thickness; each has a full width at half maximum of about 1."""


def averaging_weights(
    n_fine: int,
    fine_mm: float,
    spacing_mm: float,
    thickness_mm: float,
    profile: str,
) -> NDArray[np.float64]:
    """Weight of every fine voxel in every slice.

    Parameters
    ----------
    n_fine, fine_mm : int, float
        Fine voxels along the slice axis and their size.
    spacing_mm, thickness_mm : float
        Spacing and thickness of the slices, which are centred at (k + 1/2) spacings from the
        first voxel's edge.
    profile : str
        A key of ``PROFILES``.

    Returns
    -------
    (slices, n_fine) float64 array
        Rows sum to 1; only whole slices inside the field of view.

    Raises
    ------
    UsageError
        For an unknown profile.
    GeometryError
        If no slice fits, or a size is not above 0.
    """
    if profile not in PROFILES:
        raise UsageError(
            f"averaging_weights: profile must be one of {sorted(PROFILES)}, got {profile!r}."
        )
    if min(fine_mm, spacing_mm, thickness_mm) <= 0 or n_fine * fine_mm < spacing_mm:
        raise GeometryError(
            f"averaging_weights: {n_fine} voxels of {fine_mm} mm are too few for a slice of "
            f"spacing {spacing_mm} and thickness {thickness_mm} mm."
        )
    slices = int(np.floor(n_fine * fine_mm / spacing_mm + 1e-6))
    centres = (np.arange(slices) + 0.5) * spacing_mm
    points = (np.arange(n_fine * _OVERSAMPLING) + 0.5) * fine_mm / _OVERSAMPLING
    response = PROFILES[profile]((points[None] - centres[:, None]) / thickness_mm)
    weights = response.reshape(slices, n_fine, _OVERSAMPLING).sum(-1)
    return weights / weights.sum(1, keepdims=True)


def thick_slices(
    data: NDArray[np.float32],
    grid: Grid,
    *,
    axis: int,
    spacing_mm: float,
    thickness_mm: float | None = None,
    profile: str = "trapezoid",
) -> tuple[NDArray[np.float32], Grid]:
    """Average the image to thick slices along one of its axes.

    Returns
    -------
    (data, grid)
        Fewer voxels along ``axis``; the first slice begins where the first voxel begins.

    Raises
    ------
    UsageError, GeometryError
        As ``averaging_weights``.
    """
    fine_mm = float(grid.spacing_mm[axis])
    thickness = spacing_mm if thickness_mm is None else thickness_mm
    weights = averaging_weights(grid.shape[axis], fine_mm, spacing_mm, thickness, profile)
    thick = np.moveaxis(np.tensordot(weights, data, axes=(1, axis)), 0, axis)
    ratio = spacing_mm / fine_mm
    affine = np.array(grid.affine)
    affine[:3, axis] *= ratio
    affine[:3, 3] += grid.affine[:3, axis] * (ratio - 1) / 2
    shape = list(grid.shape)
    shape[axis] = len(weights)
    return thick.astype(np.float32), Grid((shape[0], shape[1], shape[2]), affine)


def coarse_in_plane(
    data: NDArray[np.float32], grid: Grid, *, axis: int, spacing_mm: float
) -> tuple[NDArray[np.float32], Grid]:
    """Blur and resample the in-plane axes to about ``spacing_mm``, as for a low-field scan.

    The blur is Gaussian with a full width at half maximum of one coarse voxel; the coarse voxels'
    edges meet the fine ones' at the border.
    """
    affine = np.array(grid.affine)
    shape = list(grid.shape)
    scale, sigma = np.ones(3), np.zeros(3)
    for other in {0, 1, 2} - {axis}:
        shape[other] = max(1, round(grid.extent_mm[other] / spacing_mm))
        scale[other] = grid.shape[other] / shape[other]
        sigma[other] = np.sqrt(max(scale[other] ** 2 - 1, 0)) / 2.3548
    blurred = ndimage.gaussian_filter(data, sigma, mode="nearest")
    first = (scale - 1) / 2
    coarse = ndimage.affine_transform(
        blurred, np.diag(scale), offset=first, output_shape=tuple(shape), order=3, mode="nearest"
    )
    affine[:3, :3] = grid.affine[:3, :3] * scale
    affine[:3, 3] = (grid.affine @ np.append(first, 1))[:3]
    return coarse.astype(np.float32), Grid((shape[0], shape[1], shape[2]), affine)


def smooth_field(
    grid: Grid, rng: np.random.Generator, *, sd: float, knots_mm: float = 80.0
) -> NDArray[np.float32]:
    """A random smooth multiplicative field, like that of a receive coil.

    Parameters
    ----------
    grid : Grid
        Grid of the field.
    rng : numpy Generator
        Source of the random knots.
    sd : float
        Standard deviation of the natural logarithm over the field of view.
    knots_mm : float
        Distance between the random knots of a cubic spline.

    Returns
    -------
    (i, j, k) float32 array
        Factors on the signal.
    """
    knots = tuple(int(np.ceil(e / knots_mm)) + 3 for e in grid.extent_mm)
    coarse = rng.normal(size=knots)
    scale = grid.spacing_mm / knots_mm
    log_field = ndimage.affine_transform(
        coarse, np.diag(scale), offset=1.0, output_shape=grid.shape, order=3, mode="nearest"
    )
    log_field = (log_field - log_field.mean()) / log_field.std() * sd
    return np.exp(log_field).astype(np.float32)


def add_noise(
    data: NDArray[np.float32], rng: np.random.Generator, *, sd: float, rician: bool = True
) -> NDArray[np.float32]:
    """Noise of a magnitude image (Rician), or Gaussian noise; ``sd`` in the unit of ``data``."""
    real = data + rng.normal(0, sd, data.shape)
    if rician:
        real = np.hypot(real, rng.normal(0, sd, data.shape))
    return real.astype(np.float32)


@dataclass(frozen=True)
class Recipe:
    """How a scan is degraded; the defaults correspond to a clinical axial scan.

    Attributes
    ----------
    axis : int
        Slice axis.
    spacing_mm, thickness_mm : float
        Spacing and thickness of the slices.
    profile : str
        A key of ``PROFILES``.
    width : float
        True slice thickness divided by the thickness given to the method under test.
    in_plane_mm : float or None
        Coarser in-plane voxels; None leaves them unchanged.
    noise_sd, bias_sd : float
        SD of the noise, relative to ``unit``; SD of the log bias field.
    rician : bool
        Rician noise; Gaussian if False.
    """

    axis: int = 2
    spacing_mm: float = 5.0
    thickness_mm: float = 5.0
    profile: str = "trapezoid"
    width: float = 1.0
    in_plane_mm: float | None = None
    noise_sd: float = 0.01
    bias_sd: float = 0.0
    rician: bool = False


def degrade(
    data: NDArray[np.float32],
    grid: Grid,
    recipe: Recipe,
    rng: np.random.Generator,
    *,
    unit: float,
) -> tuple[NDArray[np.float32], Grid]:
    """A thick-slice, biased, noisy scan: bias field, slices, in-plane, noise, in this order.

    Parameters
    ----------
    data : (i, j, k) array
        The image on ``grid``.
    unit : float
        Intensity that counts as 1 for ``recipe.noise_sd``.

    Returns
    -------
    (data, grid)
        In the unit of the input.

    Raises
    ------
    UsageError, GeometryError
        As ``averaging_weights``.
    """
    if recipe.bias_sd > 0:
        data = data * smooth_field(grid, rng, sd=recipe.bias_sd)
    scan, scan_grid = thick_slices(
        data,
        grid,
        axis=recipe.axis,
        spacing_mm=recipe.spacing_mm,
        thickness_mm=recipe.thickness_mm * recipe.width,
        profile=recipe.profile,
    )
    if recipe.in_plane_mm is not None:
        scan, scan_grid = coarse_in_plane(
            scan, scan_grid, axis=recipe.axis, spacing_mm=recipe.in_plane_mm
        )
    return add_noise(scan, rng, sd=recipe.noise_sd * unit, rician=recipe.rician), scan_grid
