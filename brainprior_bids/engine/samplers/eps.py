# SPDX-License-Identifier: Apache-2.0
"""Posterior samples by the probability flow, under a prior that is told of the slices.

The network itself gives ``D(x_t, y; sigma) = E[x | x_t, y]`` (see ``stacks``; EPS, arXiv
2606.17048), so nothing has to be mended by the data afterwards: the differential equation of the
diffusion, ``dx/dsigma = (x - D) / sigma``, started from noise, ends in a sample of p(x | y).
Solver: DPM-Solver++(2M), arXiv 2211.01095, second order with one network call a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from brainprior_bids.engine.errors import DivergenceError

Denoise = Callable[[Tensor, float], Tensor]
Observe = Callable[[int, float, Tensor, Tensor], None]


def sample_eps(
    denoise: Denoise,
    sigmas: Sequence[float],
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    blind: float,
    device: torch.device | str = "cpu",
    observe: Observe | None = None,
) -> Tensor:
    """One posterior sample.

    The first call is made at ``blind``, where x_t says nothing: its answer is ``E[x | y]``. The
    levels then start from that mean plus noise, which is right where the noise is wide against
    what the slices leave open.

    Parameters
    ----------
    denoise : function
        ``E[x | x_t, y]`` of (x_t, sigma): (shape) -> (shape).
    sigmas : sequence of float
        Falling levels that end in 0.
    generator : torch.Generator
        On the CPU; the only source of randomness, used for the start alone.
    blind : float
        A noise level far above the image's values.
    observe : function, optional
        Called as ``observe(step, sigma, mean, x)`` after each call, step 0 being the blind one.

    Raises
    ------
    DivergenceError
        If a value is not finite.
    """
    noise = torch.randn(shape, generator=generator).to(device)
    mean = _finite(denoise(blind * noise, blind), blind)
    if observe is not None:
        observe(0, blind, mean, mean)
    noise = torch.randn(shape, generator=generator).to(device)
    x = mean + sigmas[0] * noise
    before: Tensor | None = None
    step_before = 0.0
    for step, (sigma, following) in enumerate(pairwise(sigmas), 1):
        mean = _finite(denoise(x, sigma), sigma)
        if following == 0:
            x = mean
        else:
            size = math.log(sigma / following)
            ahead = mean
            if before is not None:
                half = size / (2 * step_before)
                ahead = (1 + half) * mean - half * before
            x = (following / sigma) * x + (1 - following / sigma) * ahead
            before, step_before = mean, size
        if observe is not None:
            observe(step, sigma, mean, x)
    return x


def _finite(mean: Tensor, sigma: float) -> Tensor:
    if not bool(torch.isfinite(mean).all()):
        raise DivergenceError(
            f"eps: the denoiser gave non-finite values at sigma {sigma:.3g}. "
            "Run it in float32, or check the weights."
        )
    return mean
