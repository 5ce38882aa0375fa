# SPDX-License-Identifier: Apache-2.0
"""The noise level of a scan, estimated inside the brain: a stripped scan has no background."""

from __future__ import annotations

from torch import Tensor

_MAD = 1.4826  # SD of a Gaussian over its median absolute deviation


LARGEST_CORRELATION = -0.5
"""Of neighbouring values of the filtered image. White noise has -2/3, anatomy raises it; an image
that was interpolated twofold has +0.1 (linear) to +0.4 (zero-filling)."""
LARGEST_ACROSS = 0.2
"""The same across the planes, where white noise has 0."""


def estimate_noise_sd(
    scan: Tensor, inside: Tensor, slice_axis: int, *, only_white: bool = False
) -> float | None:
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
    only_white : bool
        Whether to return None where the filtered image is not that of white noise: in an image
        that was interpolated along any axis, and where anatomy exceeds the noise.

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
    rough = a**2 + b**2
    use &= rough <= rough[use].median()
    sd = float(d[use].abs().median() * _MAD)
    if only_white and not _is_white(d.clamp(-4 * sd, 4 * sd), use):
        return None
    return sd


def _is_white(d: Tensor, use: Tensor) -> bool:
    """Whether neighbours are correlated as those of filtered white noise: along both axes of the
    planes, in which the filter works, and not at all across them.
    """
    for axis, largest in enumerate((LARGEST_ACROSS, LARGEST_CORRELATION, LARGEST_CORRELATION)):
        n = d.shape[axis] - 1
        both = use.narrow(axis, 0, n) & use.narrow(axis, 1, n)
        one, other = d.narrow(axis, 0, n)[both], d.narrow(axis, 1, n)[both]
        if float(one @ other) > largest * float(one.norm() * other.norm()):
            return False
    return bool(use.any())


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
