# SPDX-License-Identifier: Apache-2.0
"""The voxel size with which an image was measured; recognises scans that were interpolated.

Scanners and earlier pipelines deliver slices of 5 mm as voxels of 1 mm, or 2 mm in plane as 0.5
mm. Nothing was measured in between: noise and detail are missing beyond the spatial frequency that
the measured voxels could hold. Along each axis, the power at low and at high frequencies is
therefore compared, for structure that is fine along another axis (where noise dominates anatomy).
The spectrum of a measured image falls slowly; that of an interpolated one ends in a cliff, after
zero-filling as well as linear or cubic interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid

Sizes = tuple[float, float, float]

SMALLEST = 24
"""Smallest number of voxels of the inner part along an axis for which the axis is judged."""
INNER = 0.55
"""Edge of the inner part relative to that of the head's box: inside a brain, away from cut
edges."""
GENTLE, SHEER = 0.16, 0.01
"""The cliff is where the power falls below ``GENTLE``: linear interpolation does so at the Nyquist
frequency of the measured voxels, splines within a tenth of it. If the slope is below ``SHEER``
(zero-filling), the cliff is where the power falls to half of that just before it."""
BEFORE, BEYOND = 0.8, 1.3
"""Frequencies relative to that of the cliff between which its slope is measured."""
LARGEST_LEFT, LARGEST_SLOPE = 0.012, 0.18
"""An image is interpolated if less power than this is left beyond the cliff, and less than this
share of the power before it. Heads and brains interpolated twofold and fivefold: at most 0.007 and
0.12; images with measured voxels exceed one of the two (docs/tasks/restore.md)."""
CLEARLY = 1.4
"""Smallest ratio of measured to stored voxel size that is reported."""
MIRRORED = 0.5
"""Smallest correlation at which the coefficients on both sides count as copies of each other."""
STEP = 3.0
"""Ratio of the power of neighbouring frequencies at the start of zero-filling."""
NEAR = 0.15
"""Relative uncertainty of the cliff's position."""
STRONGLY = 2.5
"""Smallest ratio at which the image is reduced to the measured voxels, if their size is exact or
stated, and not along all axes: an image that is smooth along all axes was smoothed or computed."""


@dataclass(frozen=True)
class Cliff:
    """The frequency at which the power along an axis ends.

    Parameters
    ----------
    factor : float
        Size of the measured voxels over that of the stored ones.
    left : float
        Power beyond, over that of low frequencies.
    slope : float
        Power just beyond over power just before.
    """

    factor: float
    left: float
    slope: float

    @property
    def interpolated(self) -> bool:
        """Whether the image was interpolated."""
        return self.factor >= CLEARLY and self.left < LARGEST_LEFT and self.slope < LARGEST_SLOPE


@dataclass(frozen=True)
class Resolution:
    """The voxel size with which an image was measured, and the one that is used.

    Parameters
    ----------
    stored_mm : 3 floats
        The voxels of the file, on closest-canonical axes.
    measured_mm : 3 floats
        The measured voxels; ``stored_mm`` if no interpolation is recognised.
    used_mm : 3 floats
        The voxels to which the image was reduced, or ``stored_mm``.
    source : str
        ``measured`` (from the image), ``option`` or ``off``.
    interpolant : 3 bools
        Whether the values in between are a smooth curve through those that were measured (linear,
        cubic …), which are then values of that curve.
    """

    stored_mm: Sizes
    measured_mm: Sizes
    used_mm: Sizes
    source: str
    interpolant: tuple[bool, bool, bool] = (False, False, False)

    @property
    def factor(self) -> float:
        """The largest ratio of measured and stored voxel size."""
        return max(m / s for m, s in zip(self.measured_mm, self.stored_mm, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def find_resolution(
    data: NDArray[np.float32],
    grid: Grid,
    asked: str | Sizes,
    *,
    step: float = 0.0,
    stated_mm: Sequence[float] = (),
) -> Resolution:
    """The voxel size with which an image was measured, and the one to use.

    Parameters
    ----------
    data : (i, j, k)
        A head or a brain on ``grid``; any unit.
    asked : "auto", "off" or 3 floats
        "auto": recognised from the image; ``STRONGLY`` interpolated axes are reduced. 3 floats:
        the measured voxel size in mm along each axis; 0 or a smaller one leaves an axis as it is.
    step : float
        Distance between stored values; 0 where they are floating-point.
    stated_mm : sequence of float
        Spacing and thickness of slices from the sidecars. If the image does not determine how many
        measured voxels fill the field of view, the first value within ``NEAR`` of the estimate
        replaces it.

    Raises
    ------
    UsageError
        If a requested voxel size leaves fewer than 4 voxels.
    """
    stored = _sizes(grid.spacing_mm)
    if asked == "off":
        return Resolution(stored, stored, stored, "off")
    if not isinstance(asked, str):
        wanted = _sizes(np.maximum(asked, stored))
        if any(extent / size < 4 for extent, size in zip(grid.extent_mm, wanted, strict=True)):
            raise UsageError(
                f"--effective-resolution: expected at least 4 voxels along each axis, got "
                f"{', '.join(f'{size:g}' for size in wanted)} mm for a field of view of "
                f"{', '.join(f'{extent:.0f}' for extent in grid.extent_mm)} mm. Give smaller "
                "voxels, or 0 for an axis that is to stay as it is."
            )
        return Resolution(stored, wanted, wanted, "option")
    cliffs = find_cliffs(data, step=step)
    factors = [
        _factor(data, axis, cliff, [known / stored[axis] for known in stated_mm])
        if cliff is not None and cliff.interpolated
        else _AS_STORED
        for axis, cliff in enumerate(cliffs)
    ]
    measured = _sizes([one.factor * s for one, s in zip(factors, stored, strict=True)])
    strong = [one.sure and one.factor >= STRONGLY for one in factors]
    if all(strong):  # no scanner does that: the image is smooth
        strong = [False] * 3
    used = _sizes([m if yes else s for m, s, yes in zip(measured, stored, strong, strict=True)])
    curves = factors[0].curve, factors[1].curve, factors[2].curve
    return Resolution(stored, measured, used, "measured", curves)


@dataclass(frozen=True)
class _Factor:
    """The ratio of measured and stored voxel size along an axis.

    ``curve``: the image is a curve through the measured values. ``sure``: the ratio is exact or
    stated, not only where the power ends.
    """

    factor: float
    curve: bool = False
    sure: bool = True


_AS_STORED = _Factor(1.0)


def reduce_to_measured(
    data: NDArray[np.float32], grid: Grid, resolution: Resolution
) -> tuple[NDArray[np.float32], Grid]:
    """The image with the voxels of ``used_mm``, on a grid with the same edges.

    It is evaluated from its cosine series at the centres of the larger voxels. The series
    continues the field of view by its mirror image, so that nothing wraps around. If the measured
    values are not known to lie on the curve, the series is first cropped to the frequencies of the
    larger voxels.
    """
    shape = list(data.shape)
    for axis, (extent, size, spacing) in enumerate(
        zip(grid.extent_mm, resolution.used_mm, grid.spacing_mm, strict=True)
    ):
        if size > 1.01 * spacing:
            shape[axis] = max(round(extent / size), 4)
    for axis, m in enumerate(shape):
        n = data.shape[axis]
        if m != n:
            terms = n if resolution.interpolant[axis] else m
            data = np.moveaxis(np.moveaxis(data, axis, -1) @ _values_at(n, m, terms).T, -1, axis)
    larger = grid.resized((shape[0], shape[1], shape[2]))
    rounded = larger.affine.astype(np.float32).astype(np.float64)  # as a NIfTI file stores it
    return np.ascontiguousarray(data, np.float32), Grid(larger.shape, rounded)


def _values_at(n: int, m: int, terms: int) -> NDArray[np.float32]:
    """(m, n): samples on a line -> the values of so many terms of their cosine series at the
    centres of ``m`` equal parts of the line."""
    frequency = np.arange(terms)
    at = np.cos(np.pi * np.outer((np.arange(m) + 0.5) / m, frequency))
    series = np.cos(np.pi * np.outer(frequency, (np.arange(n) + 0.5) / n)) * (2 / n)
    series[0] /= 2
    return np.asarray(at @ series, np.float32)


def find_cliffs(data: NDArray[np.float32], *, step: float = 0.0) -> list[Cliff | None]:
    """Where the power along each axis ends; None if this cannot be determined.

    ``data`` is (i, j, k); ``step`` is the distance between stored values.
    """
    inner = _inner(data)
    return [_cliff(inner, axis, step**2 / 12) for axis in range(3)]


def _sizes(values: Any) -> Sizes:
    i, j, k = (float(value) for value in values)
    return i, j, k


def _inner(data: NDArray[np.float32]) -> NDArray[np.float64]:
    """The middle of the head's box."""
    bright = (data > 0.2 * np.percentile(data, 98)).astype(np.int8)
    parts = []
    for extent, size in zip(ndimage.find_objects(bright)[0], data.shape, strict=True):
        middle, half = (extent.start + extent.stop) / 2, INNER * (extent.stop - extent.start) / 2
        parts.append(slice(max(int(middle - half), 0), min(int(middle + half) + 1, size)))
    return np.asarray(data[tuple(parts)], np.float64)


def _cliff(data: NDArray[np.float64], axis: int, rounding: float) -> Cliff | None:
    """Where the power along an axis ends; None if this cannot be determined."""
    spectrum = _spectrum(data, axis, rounding)
    if spectrum is None:
        return None
    frequencies = np.linspace(0, 0.5, len(spectrum))
    cut = _crossing(frequencies, spectrum, GENTLE)
    if cut is None or BEYOND * cut > frequencies[-2]:
        return None
    before, after = np.interp((BEFORE * cut, BEYOND * cut), frequencies, spectrum)
    left, slope = float(spectrum[frequencies >= BEYOND * cut].mean()), float(after / before)
    if slope < SHEER:
        cut = _crossing(frequencies, spectrum, 0.5 * float(before)) or cut
    return Cliff(1 / (2 * cut), left, slope)


def _factor(
    data: NDArray[np.float32], axis: int, cliff: Cliff, stated: Sequence[float]
) -> _Factor:
    """The exact factor, the stated one, or that of the cliff, in this order."""
    exact = _exact_factor(data, axis, cliff)
    if exact is not None:
        return exact
    near = [factor for factor in stated if abs(cliff.factor / factor - 1) < NEAR]
    return _Factor(near[0]) if near else _Factor(cliff.factor, sure=False)


def _exact_factor(data: NDArray[np.float32], axis: int, cliff: Cliff) -> _Factor | None:
    """As ``_factor``, if a whole number of measured voxels fills the field of view; otherwise
    None.

    Interpolation repeats the spectrum of the measured voxels, mirrored at their Nyquist frequency,
    and attenuates it: about the right number, cosine coefficients on both sides are copies of each
    other with opposite signs. Zero-filling leaves nothing to mirror, but its cliff is sheer.
    """
    x = fft.dctn(np.moveaxis(np.asarray(data, np.float64), axis, -1), axes=(0, 1), norm="ortho")
    x = x[x.shape[0] // 4 :, x.shape[1] // 4 :].reshape(-1, x.shape[-1])
    n, cosines = x.shape[-1], fft.dct(x, norm="ortho")
    near = np.arange(
        math.floor((1 - NEAR) * n / cliff.factor), math.ceil((1 + NEAR) * n / cliff.factor) + 1
    )
    counts = near[(near > 3) & (near < n - 2)]
    if not counts.size:
        return None
    mirrored = [_mirrored(cosines, m) for m in counts]
    if max(mirrored) > MIRRORED:
        return _Factor(n / float(counts[np.argmax(mirrored)]), curve=True)
    power = np.mean(np.abs(fft.rfft(x)) ** 2, 0)
    ends = np.unique(counts // 2 + 1)
    drops = power[ends - 1] / np.maximum(power[ends], 1e-30)
    if max(drops) < STEP:
        return None
    even = 2 * (int(ends[np.argmax(drops)]) - 1)  # with the Nyquist frequency; odd ones have none
    return _Factor(n / (even + 1 if n % (even + 1) == 0 and n % even else even))


def _mirrored(cosines: NDArray[np.float64], count: int) -> float:
    """Correlation of the coefficients before and after ``count``, signs changed."""
    reach = min(max(count // 8, 2), cosines.shape[-1] - 1 - count)
    before, after = cosines[:, count - reach : count][:, ::-1], cosines[:, count + 1 :][:, :reach]
    scale = float(np.sqrt(np.sum(before**2) * np.sum(after**2)))
    return -float(np.sum(before * after)) / max(scale, 1e-30)


def _crossing(
    frequencies: NDArray[np.float64], spectrum: NDArray[np.float64], level: float
) -> float | None:
    """The highest frequency at which the power is ``level``; None where it never falls below."""
    last = int(np.flatnonzero(spectrum >= level)[-1])
    if last == len(spectrum) - 1:
        return None
    high, low = np.log(np.maximum(spectrum[last : last + 2], 1e-12))
    part = (high - math.log(level)) / (high - low)
    return float(frequencies[last] + part * frequencies[1])


def _spectrum(data: NDArray[np.float64], axis: int, rounding: float) -> NDArray[np.float64] | None:
    """Power at 0 to 0.5 cycles per voxel of structure that is fine along another axis, relative to
    the lowest frequencies. Of the three combinations of other axes, the one with the most power is
    used: the others may be empty, if the image is interpolated along those axes too.
    """
    x = np.moveaxis(data, axis, -1)
    if x.shape[-1] < SMALLEST or min(x.shape[:2]) < 8:
        return None
    x = fft.dctn(x, axes=(0, 1), norm="ortho")
    window = np.hanning(x.shape[-1] + 2)[1:-1]
    window /= np.sqrt(np.mean(window**2))
    lines = np.abs(fft.rfft((x - x.mean(-1, keepdims=True)) * window)) ** 2 / x.shape[-1]
    fine = [slice(m // 2, None) for m in x.shape[:2]]
    coarse = [slice(m // 8, m // 2) for m in x.shape[:2]]
    low = slice(1, max(round(0.16 * lines.shape[-1]), 2))
    powers = [
        np.maximum(lines[part].mean((0, 1)) - rounding, 0)
        for part in ((fine[0], fine[1]), (fine[0], coarse[1]), (coarse[0], fine[1]))
    ]
    power = max(powers, key=lambda p: float(np.median(p[low])))
    plateau = float(np.median(power[low]))
    if not plateau > 10 * rounding:
        return None
    smooth: NDArray[np.float64] = ndimage.uniform_filter1d(
        power / plateau, max(len(power) // 16, 1), mode="nearest"
    )
    return smooth
