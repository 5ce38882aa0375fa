# SPDX-License-Identifier: Apache-2.0
"""A point estimate: the deterministic path to one probable image.

As ``exact``, with the conditional *mean* in place of a draw and the noise of x_t carried on
instead of drawn anew (DDIM; DDS, arXiv 2303.05754, does the same with a few conjugate-gradient
steps). The spread of such estimates over seeds says nothing of what the data leave open: it has
no uncertainty to report, and ``restore`` refuses to make one up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from brainprior_bids.engine.samplers.exact import Denoise, Observe, finite


class Expectation(Protocol):
    """What the estimate asks of the data."""

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Update nuisance parameters."""

    def expect(self, mean: Tensor, sigma: float) -> Tensor:
        """The mean of ``N(m, V_sigma)`` times the likelihood."""
        ...


def estimate_map(
    denoise: Denoise,
    data: Expectation,
    sigmas: Sequence[float],
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    refine_bias: bool = False,
    refine_noise: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """One estimate; arguments as ``sample_exact``. The generator makes the first x_t only.

    Raises
    ------
    DivergenceError, ConvergenceError
        As there.
    """
    x0 = torch.zeros(shape, device=device) if start is None else start
    x_t = x0 + sigmas[0] * torch.randn(shape, generator=generator).to(device)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        mean = finite(denoise(x_t, sigma), sigma)
        data.refine(mean, sigma, bias=refine_bias, noise=refine_noise)
        x0 = data.expect(mean, sigma)
        x_t = x0 + (sigma_next / sigma) * (x_t - x0)
        if observe is not None:
            observe(step, sigma, mean, x0)
    return x0
