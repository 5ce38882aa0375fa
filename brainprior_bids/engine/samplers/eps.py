# SPDX-License-Identifier: Apache-2.0
"""Posterior samples by the reverse diffusion, under a prior that is told of the measurement.

The network itself gives ``D(x_t, y; sigma) = E[x | x_t, y]`` (see ``stacks`` and ``voxels``; EPS,
arXiv 2606.17048), so nothing has to be mended by the data afterwards: the reverse diffusion,
started from noise, ends in a sample of p(x | y). Solver: DPM-Solver++(2M), arXiv 2211.01095, with
one network call a level: its stochastic form at high noise, where fresh noise undoes the errors of
earlier calls, the deterministic one below ``QUIET``, where noise would have to be taken out of
what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from brainprior_bids.engine.samplers.exact import Denoise, Observe, finite

QUIET = 0.1
"""Noise level up to which no fresh noise is added, engine unit."""


def sample_eps(
    denoise: Denoise,
    sigmas: Sequence[float],
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    blind: float,
    inflation: float = 1.0,
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
        On the CPU; the only source of randomness.
    blind : float
        A noise level far above the image's values.
    inflation : float
        Factor on the noise that is added. 1 for an exact ``denoise``; a trained one leaves out a
        part of what is open, and more than 1 gives that back (S_noise of EDM, arXiv 2206.00364).
    observe : function, optional
        Called as ``observe(step, sigma, mean, x)`` after each call, step 0 being the blind one.

    Raises
    ------
    DivergenceError
        If a value is not finite.
    """
    noise = torch.randn(shape, generator=generator).to(device)
    mean = finite(denoise(blind * noise, blind), blind)
    if observe is not None:
        observe(0, blind, mean, mean)
    noise = torch.randn(shape, generator=generator).to(device)
    x = mean + inflation * sigmas[0] * noise
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
            kept = following / sigma
            if following > QUIET:
                fresh = inflation * following * math.sqrt(1 - kept**2)
                noise = torch.randn(shape, generator=generator).to(device)
                x = kept**2 * x + (1 - kept**2) * ahead + fresh * noise
            else:
                x = kept * x + (1 - kept) * ahead
            before, step_before = mean, size
        if observe is not None:
            observe(step, sigma, mean, x)
    return x
