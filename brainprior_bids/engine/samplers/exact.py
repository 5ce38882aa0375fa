# SPDX-License-Identifier: Apache-2.0
"""DAPS (arXiv 2407.01521) with its inner Langevin solved exactly.

``m = D(x_t; sigma)`` is the Tweedie mean, V_sigma the calibrated covariance of its error. If the
measurement is linear and its noise Gaussian, ``N(m, V_sigma) N(y; A x, Sigma)`` can be sampled
exactly; 20 network calls then replace 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from brainprior_bids.engine.errors import DivergenceError

Denoise = Callable[[Tensor, float], Tensor]
Observe = Callable[[int, float, Tensor, Tensor], None]


class Conditional(Protocol):
    """What the sampler requires of the data."""

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Update nuisance parameters from the denoiser's mean."""

    def draw(
        self, mean: Tensor, sigma: float, generator: torch.Generator, *, given: bool = False
    ) -> Tensor:
        """A draw from ``N(m, V_sigma)`` times the likelihood."""
        ...


def finite(mean: Tensor, sigma: float) -> Tensor:
    """The denoiser's result, checked to be finite."""
    if not bool(torch.isfinite(mean).all()):
        raise DivergenceError(
            f"sampling: the denoiser gave non-finite values at sigma {sigma:.3g}. "
            "Run it in float32, or check the weights."
        )
    return mean


def sample_exact(
    denoise: Denoise,
    data: Conditional,
    sigmas: Sequence[float],
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    given: bool = False,
    refine_bias: bool = False,
    refine_noise: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """One posterior sample.

    Parameters
    ----------
    denoise : function
        ``D(x_t, sigma)``: (shape) -> (shape).
    sigmas : sequence of float
        Falling levels that end in 0.
    generator : torch.Generator
        On the CPU; the only source of randomness.
    start : tensor, optional
        An initial estimate of the sample, to which the first level's noise is added; 0 by default.
    given : bool
        ``denoise`` is conditioned on the measurements of the first scan; see ``Likelihood.draw``.
    observe : function, optional
        Called as ``observe(step, sigma, mean, x0)`` after each level.

    Raises
    ------
    DivergenceError
        If a value is not finite.
    ConvergenceError
        From the inner solve.
    """
    x0 = torch.zeros(shape, device=device) if start is None else start
    x_t = x0 + sigmas[0] * torch.randn(shape, generator=generator).to(device)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        mean = finite(denoise(x_t, sigma), sigma)
        data.refine(mean, sigma, bias=refine_bias, noise=refine_noise)
        x0 = data.draw(mean, sigma, generator, given=given)
        if sigma_next > 0:
            x_t = x0 + sigma_next * torch.randn(shape, generator=generator).to(device)
        if observe is not None:
            observe(step, sigma, mean, x0)
    return x0
