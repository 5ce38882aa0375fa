# SPDX-License-Identifier: Apache-2.0
"""One gain per slice of a 2-D scan whose slices differ in brightness.

Interleaved slices often alternate in brightness (cross-talk, slice order). Deconvolution along the
slice axis amplifies this into stripes, so the gains are part of the bias field b.

Symbols, all natural logarithms:

    l_k  scan divided by its smooth bias field, slice k
    g_k  gain of slice k
    r_k  median over voxels of l_k - (l_{k-1} + l_{k+1}) / 2
    e_k  standard error of r_k over blocks of the plane: a gain is common to all, anatomy is not

Only voxels deep in the brain whose two neighbours across the slices are alike are compared. Model:

    r = D g + t + e,    g_k = a (-1)^k + h_k,    h_k ~ N(0, s^2)

D is the second difference in the definition of r; t is the contribution of anatomy to r, a
straight line plus a Gaussian process that is smooth over ``TREND_SLICES``. Slow changes of gain
cannot be distinguished from t and remain part of the smooth field. s maximises the restricted
likelihood, a is the generalised least-squares estimate and h the posterior mean. a and h are each
applied only if they are large and significant; a scan without gains is not changed.

The thresholds were chosen on 89 scans without gains (twenty 3-D brains averaged to 3 and 5 mm
slices along three axes, and nine 2-D T2w heads) and the same scans with simulated gains; the
results are in ``docs/tasks/restore.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.sensing import is_3d

Array = NDArray[np.float64]

CORE = 0.95
"""A voxel with at least this share of brain is compared."""
DARK = 0.15
"""Voxels below this share of the brain's 99th percentile are not."""
ALIKE = 0.15
"""Largest difference of a voxel's two neighbours across the slices, log units."""
BLOCK_MM = 30.0
"""Edge of the blocks whose scatter gives e; smaller ones are correlated through the anatomy."""
FEWEST_IN_BLOCK, FEWEST_BLOCKS, FEWEST_SLICES = 15, 4, 7
LEAST_AREA = 0.25
"""Slices with a smaller share of the largest slice's voxels are too close to the ends of the
brain."""
MIDLINE_MM = 15.0
"""Sagittal slices this close to the middle show the fissure between different neighbours."""
OUTLIER = 0.2
"""|r| of a lost or corrupted slice: it and its neighbours are excluded."""
SPREAD_FACTOR, SPREAD_FLOOR = 1.2, 0.003
TREND_SLICES, TREND_SD = 3.0, 0.03
GAIN_SDS = (
    0, 0.003, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1,
)  # fmt: skip
"""Values of s that are compared."""
LEAST_ALTERNATION, SIGNIFICANT = 0.005, 4.0
"""Smallest a that is corrected, and its smallest ratio to its standard error."""
LEAST_GAIN_SD, EVIDENCE = 0.0075, 8.0
"""Smallest s that is corrected, and twice its smallest log likelihood ratio against s = 0."""


@dataclass(frozen=True, eq=False)
class SliceGains:
    """Gains of a scan's slices, and their significance.

    Attributes
    ----------
    log_gains : (n,) array
        Natural log of the gain to divide each slice by; all 0 where none is corrected.
    alternation : float
        Half of the difference in log gain between even and odd slices; negative if odd slices
        (counting from 0) are the brighter ones.
    alternation_se : float
        Its standard error.
    gain_sd : float
        s: SD of the random gains, 0 if not significant.
    evidence : float
        Twice the log likelihood ratio of s against 0.
    compared : (n,) bool array
        Slices that could be compared with both neighbours. The others follow the alternation.
    """

    log_gains: Array
    alternation: float
    alternation_se: float
    gain_sd: float
    evidence: float
    compared: NDArray[np.bool_]

    @property
    def applied(self) -> bool:
        """Whether any slice is corrected."""
        return bool(np.any(self.log_gains))

    @property
    def rms(self) -> float:
        """RMS of the log gains."""
        return float(np.sqrt(np.mean(self.log_gains**2)))

    def along(self, axis: int) -> NDArray[np.float32]:
        """The log gains in a shape that broadcasts over the scan: (1, 1, n) for axis 2."""
        shape = [1, 1, 1]
        shape[axis] = len(self.log_gains)
        return self.log_gains.reshape(shape).astype(np.float32)


@dataclass(frozen=True, eq=False)
class SliceSteps:
    """r and e of every slice; (n,) each, NaN where a slice cannot be compared."""

    r: Array
    e: Array
    used: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "used", np.flatnonzero(np.isfinite(self.r)))


def find_slice_gains(
    values: ArrayLike, mask: ArrayLike, log_bias: ArrayLike, grid: Grid, acquisition: Acquisition
) -> tuple[SliceGains | None, list[str]]:
    """Estimate the gains of a 2-D scan's slices.

    Parameters
    ----------
    values, mask, log_bias : (i, j, k) arrays
        The scan, the share of brain in its voxels (without lesions), and the natural log of its
        smooth bias field.
    grid : Grid
    acquisition : Acquisition

    Returns
    -------
    SliceGains or None
        None for a 3-D scan, and if too few slices can be compared.
    list of str
        A warning in the latter case.

    Raises
    ------
    ShapeMismatchError
        If an array is not on the grid.
    """
    scan, share, bias = (np.asarray(a, np.float32) for a in (values, mask, log_bias))
    for name, array in (("scan", scan), ("mask", share), ("log_bias", bias)):
        if array.shape != tuple(grid.shape):
            raise ShapeMismatchError(
                f"find_slice_gains: expected {name} on the grid {grid.shape}, got {array.shape}."
            )
    if is_3d(grid, acquisition):
        return None, []
    axis = acquisition.slice_axis
    flat = np.moveaxis(np.where(np.isfinite(scan), scan, 0) / np.exp(bias), axis, 0)
    steps = slice_steps(
        flat,
        np.moveaxis(share, axis, 0),
        in_plane_mm=np.delete(grid.spacing_mm, axis),
        midline_slices=MIDLINE_MM / grid.spacing_mm[axis] if axis == 0 else 0.0,
    )
    if len(steps.used) < FEWEST_SLICES:
        return None, [
            f"Slice gains were not estimated and none are corrected: {len(steps.used)} slices can "
            f"be compared with both neighbours inside the brain, {FEWEST_SLICES} are needed."
        ]
    return fit_gains(steps), []


def slice_steps(
    values: NDArray[np.float32],
    mask: NDArray[np.float32],
    *,
    in_plane_mm: ArrayLike,
    midline_slices: float = 0.0,
) -> SliceSteps:
    """Compare every slice along the first axis with its two neighbours.

    Slices within ``midline_slices`` of the middle of the mask are excluded.
    """
    n = len(values)
    r, e, counts = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n)
    if not (mask > 0.5).any():
        return SliceSteps(r, e)
    usable = (mask > CORE) & (values > DARK * np.percentile(values[mask > 0.5], 99))
    logs = np.log(np.where(usable, values, 1.0))
    blocks = _blocks(values.shape[1:], np.asarray(in_plane_mm, np.float64))
    for k in range(1, n - 1):
        here = usable[k - 1] & usable[k] & usable[k + 1]
        if not here.any():
            continue
        apart = logs[k + 1] - logs[k - 1]
        here &= np.abs(apart - np.median(apart[here])) < ALIKE
        step = (logs[k] - (logs[k - 1] + logs[k + 1]) / 2)[here]
        r[k], e[k] = _median_and_error(step, blocks[here])
        counts[k] = len(step)
    middle = np.average(np.arange(n), weights=mask.sum((1, 2)))
    left_out = (counts < LEAST_AREA * counts.max()) | (
        np.abs(np.arange(n) - middle) < midline_slices
    )
    left_out |= _near_outliers(np.where(left_out, np.nan, r))
    return SliceSteps(np.where(left_out, np.nan, r), np.where(left_out, np.nan, e))


def _blocks(shape: tuple[int, ...], in_plane_mm: Array) -> NDArray[np.intp]:
    """The number of the block that contains each voxel of a slice."""
    rows, columns = (
        (np.arange(size) * mm // BLOCK_MM).astype(np.intp)
        for size, mm in zip(shape, in_plane_mm, strict=True)
    )
    return rows[:, None] * (columns[-1] + 1) + columns


def _median_and_error(step: Array, block: NDArray[np.intp]) -> tuple[float, float]:
    """Median over voxels, and its standard error from the blocks; NaN from too few of them."""
    counts = np.bincount(block)
    blocks = np.flatnonzero(counts >= FEWEST_IN_BLOCK)
    if len(blocks) < FEWEST_BLOCKS:
        return np.nan, np.nan
    median = float(np.median(step))
    away = np.array([np.median(step[block == number]) for number in blocks]) - median
    limit = 3 * 1.4826 * float(np.median(np.abs(away)))
    weights = np.minimum(counts[blocks], 2 * np.median(counts[blocks])).astype(np.float64)
    total = np.sqrt(np.sum((weights * np.clip(away, -limit, limit)) ** 2))
    return median, float(total / weights.sum())


def _near_outliers(r: Array) -> NDArray[np.bool_]:
    """Slices that are far from what their neighbours predict, and those neighbours."""
    if not np.isfinite(r).any():
        return np.zeros(len(r), bool)
    away = np.abs(r - np.nanmedian(r))
    lost = away > max(OUTLIER, 4 * 1.4826 * float(np.nanmedian(away)))
    return np.convolve(lost, np.ones(3), "same") > 0


@dataclass(frozen=True, eq=False)
class _Fit:
    """The model with one value of s."""

    gain_sd: float
    log_likelihood: float
    alternation: float
    alternation_se: float
    others: Array  # h


def fit_gains(steps: SliceSteps) -> SliceGains:
    """Gains from r and e, those that are not large and significant set to 0."""
    fits = [_fit(steps, gain_sd) for gain_sd in GAIN_SDS]
    best = max(fits, key=lambda one: one.log_likelihood)
    evidence = 2 * (best.log_likelihood - fits[0].log_likelihood)
    if best.gain_sd < LEAST_GAIN_SD or evidence < EVIDENCE:
        best = fits[0]
    a, se = best.alternation, best.alternation_se
    gains = best.others
    # with s > 0, se mostly reflects chance alternation of random gains; a itself is well known
    if best.gain_sd > 0 or abs(a) >= max(LEAST_ALTERNATION, SIGNIFICANT * se):
        gains = gains + a * _signs(len(gains))
    if gains.any():
        gains = gains - gains[steps.used].mean()
    return SliceGains(gains, a, se, best.gain_sd, evidence, np.isfinite(steps.r))


def _signs(n: int) -> Array:
    return (-1.0) ** np.arange(n)


def _fit(steps: SliceSteps, gain_sd: float) -> _Fit:
    """Generalised least squares of the line and of a, and the posterior mean of h."""
    n, at = len(steps.r), steps.used
    rows = np.arange(len(at))
    difference = np.zeros((len(at), n))  # D
    difference[rows, at] = 1
    difference[rows, at - 1] = difference[rows, at + 1] = -0.5
    trend = TREND_SD**2 * np.exp(-(((at[:, None] - at) / TREND_SLICES) ** 2) / 2)
    noise = np.diag((SPREAD_FACTOR * steps.e[at]) ** 2 + SPREAD_FLOOR**2)
    covariance = trend + noise + gain_sd**2 * difference @ difference.T
    precision = np.linalg.inv(covariance)
    line = (at - at.mean()) / n
    design = np.stack([np.ones(len(at)), line, difference @ _signs(n)], 1)
    spread = np.linalg.inv(design.T @ precision @ design)
    estimate = spread @ design.T @ precision @ steps.r[at]
    rest = steps.r[at] - design @ estimate
    log_likelihood = -0.5 * (
        rest @ precision @ rest + np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(spread)[1]
    )
    return _Fit(
        gain_sd=float(gain_sd),
        log_likelihood=float(log_likelihood),
        alternation=float(estimate[2]),
        alternation_se=float(np.sqrt(spread[2, 2])),
        others=gain_sd**2 * difference.T @ precision @ rest,
    )
