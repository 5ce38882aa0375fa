# SPDX-License-Identifier: Apache-2.0
"""The noise level of a scan, estimated inside the brain: a stripped scan has no background."""

from __future__ import annotations

from torch import Tensor

_MAD = 1.4826  # SD of a Gaussian over its median absolute deviation


def estimate_noise_sd(scan: Tensor, inside: Tensor, slice_axis: int) -> float | None:
    """SD of white noise from the highest in-plane frequencies (Immerkaer 1996, with the MAD).

    The 3 x 3 mask ``[1 -2 1]^T [1 -2 1]`` removes everything that is constant or linear in either
    direction. The estimate uses the half of the voxels with the smoothest surroundings, so that
    edges count less. An interpolated image has less noise at these frequencies, so that the
    estimate is too low; the floor in ``restore`` limits this.

    Parameters
    ----------
    scan : (i, j, k) tensor
        In any unit, which is also that of the result.
    inside : (i, j, k) bool tensor
        Voxels of the brain.

    Returns
    -------
    float or None
        None where fewer than 100 voxels have all their in-plane neighbours in the brain.
    """
    y = scan.movedim(slice_axis, 0)
    brain = inside.movedim(slice_axis, 0)
    if min(y.shape[1:]) < 3:
        return None
    d = y[:, :-2] - 2 * y[:, 1:-1] + y[:, 2:]
    d = (d[:, :, :-2] - 2 * d[:, :, 1:-1] + d[:, :, 2:]) / 6
    windows = brain.unfold(1, 3, 1).unfold(2, 3, 1)
    use = windows.flatten(3).all(-1)
    if int(use.sum()) < 100:
        return None
    a = y[:, :, 2:] - y[:, :, :-2]
    b = y[:, 2:] - y[:, :-2]
    a = a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]
    b = b[:, :, :-2] + 2 * b[:, :, 1:-1] + b[:, :, 2:]
    rough = (a**2 + b**2)[use]
    values = d[use]
    return float(values[rough <= rough.median()].abs().median() * _MAD)


def fisher_noise_variance(
    whitened_power: float, trace: float, trace_squared: float, noise_variance: float
) -> tuple[float, float]:
    """One Fisher-scoring step for the noise variance in ``e ~ N(0, G + s^2 I)``.

    Parameters
    ----------
    whitened_power : float
        ``|C^-1 e|^2`` with ``C = G + s^2 I``.
    trace, trace_squared : float
        Traces of C^-1 and C^-2.

    Returns
    -------
    (variance, information)
        The new s^2 (may be negative) and ``s^4 tr C^-2 / n``-like information, not divided by n.
    """
    step = (whitened_power - trace) / trace_squared
    return noise_variance + step, noise_variance**2 * trace_squared
