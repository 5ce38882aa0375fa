# SPDX-License-Identifier: Apache-2.0
"""Noise levels, high to low."""

from __future__ import annotations

import math

from brainprior_bids.engine.errors import UsageError


def edm_schedule(
    n_steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0
) -> list[float]:
    """The levels of EDM (Karras et al. 2022, eq. 5): n_steps falling values, then 0.

    One network call is made at each level but the last. Units: those of the image.

    Raises
    ------
    UsageError
        If there is no step, or the levels do not fall to something above 0.
    """
    if n_steps < 1:
        raise UsageError(f"edm_schedule: n_steps must be at least 1, got {n_steps}.")
    if not (math.isfinite(sigma_max) and 0 < sigma_min <= sigma_max):
        raise UsageError(
            f"edm_schedule: need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}."
        )
    if n_steps == 1:
        return [sigma_max, 0.0]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = [(high + i / (n_steps - 1) * (low - high)) ** rho for i in range(n_steps)]
    return [*levels, 0.0]
