# SPDX-License-Identifier: Apache-2.0
"""Posterior samples by the reverse diffusion, with a network conditioned on the measurements.

The network returns ``D(x_t, y; sigma) = E[x | x_t, y]`` (see ``stacks`` and ``voxels``; the idea
of exact posterior scores, EPS, arXiv 2606.17048), so no likelihood has to be approximated: the
reverse diffusion, started from noise, yields a sample of p(x | y). Solver: DPM-Solver++(2M), arXiv
2211.01095, with one network call per noise level: its stochastic form at high noise, where fresh
noise corrects errors of earlier calls, and the deterministic one below ``QUIET``, where fresh
noise would affect components that the scan determines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from brainprior_bids.engine.samplers.exact import Denoise, Observe, finite

BLIND = 100.0
"""Noise level of the first call: x_t contains no information, and the result is E[x | y]."""
SIGMA_MAX = 1.5
"""Noise level at which the chain starts from E[x | y]: several times the posterior SD for slices
of 8 mm."""
HOLE_SIGMA_MAX = 20.0
"""The same with a hole, where the local mean is uncertain too, over many voxels."""

QUIET = 0.1
"""Noise level up to which no fresh noise is added, engine unit."""


def answer_weights(n_samples: int | None, n_calls: int) -> tuple[float, float]:
    """Weights of a chain's first answer, and of each later one, in the mean; they sum to 1.

    All answers estimate ``E[x | y]``. The first (``BLIND``) is independent of the chain's noise;
    the later ones are more accurate but vary from sample to sample. For 2-D slices, the first has
    the weight ``2 / (2 + n_samples)``. This was chosen on participants 04, 05 and 56
    (``docs/models/log.md``), where equal weights lose 0.8 dB with one sample, 0.1 dB with four,
    and nothing with eight. With ``None`` (holes and 3-D scans) all weights are equal: in a hole, a
    single call is not accurate enough.
    """
    if n_samples is None or n_calls == 1:
        return 1 / n_calls, 1 / n_calls
    first = max(2 / (2 + n_samples), 1 / n_calls)
    return first, (1 - first) / (n_calls - 1)


def sample_conditional(
    denoise: Denoise,
    sigmas: Sequence[float],
    *,
    expected: Tensor,
    generator: torch.Generator,
    inflation: float = 1.0,
    observe: Observe | None = None,
) -> Tensor:
    """One posterior sample.

    The levels start from ``E[x | y]`` plus noise, which is valid if the noise is large compared
    with the posterior SD. That mean does not depend on the chain, so samples can share it.

    Parameters
    ----------
    denoise : function
        ``E[x | x_t, y]`` of (x_t, sigma): (shape) -> (shape).
    sigmas : sequence of float
        Falling levels that end in 0.
    expected : tensor
        ``E[x | y]``, from ``expected_image``.
    generator : torch.Generator
        On the CPU; the only source of randomness.
    inflation : float
        Factor on the noise that is added. 1 is correct for an exact ``denoise``. A trained one
        underestimates the variance, which a factor above 1 compensates (S_noise of EDM, arXiv
        2206.00364).
    observe : function, optional
        Called as ``observe(step, sigma, mean, x)`` at each level, step 0 being ``E[x | y]``.

    Raises
    ------
    DivergenceError
        If a value is not finite.
    """
    shape, device = expected.shape, expected.device
    if observe is not None:
        observe(0, BLIND, expected, expected)
    noise = torch.randn(shape, generator=generator).to(device)
    x = expected + inflation * sigmas[0] * noise
    before: Tensor | None = None
    step_before = 0.0
    for step, (sigma, following) in enumerate(pairwise(sigmas), 1):
        mean = finite(denoise(x, sigma), sigma)
        if following == 0:
            x = mean
        else:
            size = math.log(sigma / following)
            ahead = mean
            if before is not None:
                half = size / (2 * step_before)
                ahead = (1 + half) * mean - half * before
            ratio = following / sigma
            if following > QUIET:
                fresh = inflation * following * math.sqrt(1 - ratio**2)
                noise = torch.randn(shape, generator=generator).to(device)
                x = ratio**2 * x + (1 - ratio**2) * ahead + fresh * noise
            else:
                x = ratio * x + (1 - ratio) * ahead
            before, step_before = mean, size
        if observe is not None:
            observe(step, sigma, mean, x)
    return x
