# SPDX-License-Identifier: Apache-2.0
"""Whether a sample explains the scan: its residual in units of the noise, and tests for white
noise.

``z = (y - b A x) / s`` over the voxels that lie wholly in the brain. If x is a draw from the
posterior and the model of the scan is right, (x, y) are a draw from their joint law and z is white
with SD 1. Two deviations from this are tested:

- its RMS: above ``MAX_RATIO``, part of the scan is explained by no sample;
- its correlation between neighbours (lag one, along each axis). White noise has 0 with a standard
  error of ``1 / sqrt(pairs)``; a smooth misfit of half the noise's SD has 0.2. Above
  ``MAX_CORRELATION`` and four standard errors, the residual contains anatomy or a smooth field.
  The noise of a scanner that interpolates is itself correlated, which the warning mentions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

MAX_RATIO = 1.5
MAX_CORRELATION = 0.2
STANDARD_ERRORS = 4.0
AXES = ("left-right", "posterior-anterior", "inferior-superior")


@dataclass(frozen=True)
class Residual:
    """The residual of the scan for one sample.

    Parameters
    ----------
    ratio : float
        RMS divided by the SD expected from the noise estimated before sampling.
    ratio_final : float
        The same with the estimate after sampling.
    correlation : three floats
        Lag-one autocorrelation along i, j, k; 0 where no two neighbours are in the brain.
    standard_error : three floats
        Standard error of each correlation for white noise; infinite if there are no pairs.
    """

    ratio: float
    ratio_final: float
    correlation: tuple[float, float, float]
    standard_error: tuple[float, float, float]


def pooled(residuals: Sequence[Residual]) -> Residual:
    """One residual of parts of a scan with equally many voxels; the correlation of the worst."""
    if len(residuals) == 1:
        return residuals[0]
    worst = max(residuals, key=lambda r: max(r.correlation))
    return replace(
        worst,
        ratio=math.sqrt(sum(r.ratio**2 for r in residuals) / len(residuals)),
        ratio_final=math.sqrt(sum(r.ratio_final**2 for r in residuals) / len(residuals)),
    )


def residual_of(
    z: Tensor, where: Tensor, *, ratio: float | None = None, ratio_final: float | None = None
) -> Residual:
    """The ``Residual`` of a standardised residual z; the ratios default to its RMS.

    Parameters
    ----------
    z : (i, j, k) tensor
        Residual in SDs of the noise.
    where : (i, j, k) bool tensor
        Voxels that count.
    """
    ratio = float(z[where].square().mean().sqrt()) if ratio is None else ratio
    (ri, si), (rj, sj), (rk, sk) = (neighbour_correlation(z, where, axis) for axis in range(3))
    final = ratio if ratio_final is None else ratio_final
    return Residual(ratio, final, (ri, rj, rk), (si, sj, sk))


def neighbour_correlation(z: Tensor, where: Tensor, axis: int) -> tuple[float, float]:
    """Lag-one autocorrelation of z along an axis, and its standard error for white noise.

    Parameters
    ----------
    z : (i, j, k) tensor
        Its mean should be about 0; no mean is subtracted, because an offset is a misfit too.
    where : (i, j, k) bool tensor
        Voxels that count.
    """
    n = z.shape[axis]
    one, two = z.narrow(axis, 0, n - 1), z.narrow(axis, 1, n - 1)
    pairs = where.narrow(axis, 0, n - 1) & where.narrow(axis, 1, n - 1)
    count = int(pairs.sum())
    if count == 0:
        return 0.0, math.inf
    a, b = one[pairs].double(), two[pairs].double()
    power = float(0.5 * (a.square() + b.square()).mean())
    return (float((a * b).mean()) / power if power > 0 else 0.0), 1 / math.sqrt(count)


def judge(residuals: Sequence[Residual]) -> list[str]:
    """Warnings, if the samples do not explain the scan."""
    warnings = []
    ratios = [r.ratio for r in residuals]
    if max(ratios) > MAX_RATIO:
        warnings.append(
            f"The residual is {max(ratios):.2f} times the noise estimated before sampling "
            f"(expected about 1, at most {MAX_RATIO}): part of the scan is not explained by "
            "the result. Look at the residual map; check the slice thickness, the mask and motion."
        )
    n = len(residuals)
    correlations = []
    for axis, name in enumerate(AXES):
        rho = sum(r.correlation[axis] for r in residuals) / n
        error = max(r.standard_error[axis] for r in residuals)  # samples share the scan's noise
        if rho > MAX_CORRELATION and rho > STANDARD_ERRORS * error:
            correlations.append(f"{rho:.2f} {name}")
    if correlations:
        warnings.append(
            "The residual is spatially correlated (neighbouring voxels: "
            f"{', '.join(correlations)}; white noise: 0, warned above {MAX_CORRELATION}): anatomy "
            "or a smooth field is left in it, or the scanner interpolated the image. Look at the "
            "residual map."
        )
    return warnings
