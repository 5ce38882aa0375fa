# SPDX-License-Identifier: Apache-2.0
"""DAPS as published (arXiv 2407.01521, algorithm 1), with the factor 1/2 included.

At each of N levels: (1) ``x0_hat``: the probability-flow ODE from x_t down to ``ode_sigma_min``
in Euler steps; (2) Langevin from x0_hat with score

    - (x0 - x0_hat) / r^2 - grad 1/2 sum (y - b A x0)^2 / variance,      r = sigma

without a network call (or Hamiltonian Monte Carlo on the same energy; Langevin is its case of one
leapfrog step a trajectory); (3) ``x_t = x0 + sigma_next noise``. The resulting distribution is not
the posterior even for a Gaussian prior; DAPS is kept as a reference for comparison with ``exact``.
The public code omits the 1/2 (which makes the noise SD tau / sqrt 2) and replaces diverged values
by zeros; here the 1/2 is included, the step is bounded by its stability limit, and divergence
raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from brainprior_bids.engine.errors import DivergenceError, UsageError
from brainprior_bids.engine.samplers.exact import Denoise, Observe, finite
from brainprior_bids.engine.schedules import edm_schedule


@dataclass(frozen=True)
class DapsSettings:
    """Settings of DAPS.

    Parameters
    ----------
    n_levels, n_ode, n_langevin : int
        Annealing levels; network calls per level; Langevin steps per level.
    sigma_max, sigma_min : float
        Highest and lowest level (rho 7).
    ode_sigma_min : float
        Noise level at which the ODE of a level ends.
    step : float
        Langevin step, image unit squared; a leapfrog step is ``sqrt(2 step)``.
    step_decay : float
        The step falls linearly to ``step_decay * step`` at the last level.
    n_leapfrog : int
        Leapfrog steps of a trajectory: 1 is Langevin, more is HMC. The ``n_langevin`` steps of a
        level are divided into trajectories of that length, each with its own momentum; there is no
        accept-reject step, as in Langevin.
    stability : float
        The step is never above this times its stability limit ``2 / (|A|^2/tau^2 + 1/r^2)``.

    Raises
    ------
    UsageError
        If a value makes no sense.
    """

    n_levels: int = 200
    n_ode: int = 5
    n_langevin: int = 100
    sigma_max: float = 100.0
    sigma_min: float = 0.1
    ode_sigma_min: float = 0.01
    step: float = 1e-4
    step_decay: float = 0.01
    stability: float = 0.5
    n_leapfrog: int = 1

    def __post_init__(self) -> None:
        if min(self.n_levels, self.n_ode, self.n_langevin) < 1:
            raise UsageError("DapsSettings: levels, ODE and Langevin steps must be at least 1.")
        if not 1 <= self.n_leapfrog <= self.n_langevin:
            raise UsageError(
                f"DapsSettings: need 1 <= n_leapfrog <= n_langevin ({self.n_langevin}), got "
                f"{self.n_leapfrog}."
            )
        if not (self.step > 0 and 0 < self.step_decay <= 1 and 0 < self.stability < 1):
            raise UsageError(
                "DapsSettings: need step > 0, 0 < step_decay <= 1 and 0 < stability < 1, got "
                f"{self.step}, {self.step_decay} and {self.stability}."
            )

    def levels(self) -> list[float]:
        """The annealing levels, ending in 0."""
        return edm_schedule(self.n_levels, self.sigma_max, self.sigma_min)

    @property
    def calls(self) -> int:
        """Network calls per sample."""
        return self.n_levels * self.n_ode


DAPS_1K = DapsSettings()
"""The authors' large setting: 200 levels x 5 ODE calls."""
DAPS_50 = DapsSettings(n_levels=50, n_ode=20, n_langevin=20)
"""50 annealing levels x 20, read as ODE calls; 20 Langevin steps."""


class Energy(Protocol):
    """What DAPS requires of the data."""

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Update nuisance parameters."""

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """Gradient of ``1/2 sum (y - b A x)^2 / variance``."""
        ...

    def curvature(self) -> float:
        """An upper bound of the largest eigenvalue of that misfit's Hessian."""
        ...

    def constrain(self, x: Tensor) -> Tensor:
        """x with its impossible parts (outside the brain) removed."""
        ...


def ode_endpoint(denoise: Denoise, x_t: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler steps of the probability-flow ODE along ``sigmas``, the last of which is 0."""
    x = x_t
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - finite(denoise(x, sigma), sigma)) / sigma
        x = x + (sigma_next - sigma) * slope
    return x


def langevin(
    x0_hat: Tensor,
    data: Energy,
    *,
    sigma: float,
    step: float,
    n_steps: int,
    generator: torch.Generator,
    n_leapfrog: int = 1,
) -> Tensor:
    """Unadjusted Langevin steps from x0_hat under its Gaussian of SD ``sigma`` and the data.

    With ``n_leapfrog`` above 1, HMC: a momentum is drawn only at every ``n_leapfrog``-th step,
    and kept by leapfrog in between (the last trajectory may be shorter).

    Raises
    ------
    DivergenceError
        If a value is not finite.
    """
    x = x0_hat.clone()
    leap = math.sqrt(2 * step)
    momentum = torch.zeros_like(x)  # at half steps within a trajectory
    for index in range(n_steps):
        drift = (x - x0_hat) / sigma**2 + data.misfit_gradient(x)
        if index % n_leapfrog == 0:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            momentum = noise - 0.5 * leap * drift
        else:
            momentum = momentum - leap * drift
        x = x + leap * momentum
    bad = int((~torch.isfinite(x)).sum())
    if bad or float(x.abs().max()) > 1e6:
        raise DivergenceError(
            f"Langevin diverged at sigma {sigma:.3g} (step {step:.3g}): non-finite or huge values"
            f" in {max(bad, 1)} voxels. Lower the step."
        )
    return x


def sample_daps(
    denoise: Denoise,
    data: Energy,
    settings: DapsSettings,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    refine_bias: bool = False,
    refine_noise: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """One sample; arguments as ``sample_exact``.

    Raises
    ------
    DivergenceError
        From Langevin, or if a value of the denoiser's is not finite.
    """
    sigmas = settings.levels()
    x_t = sigmas[0] * torch.randn(shape, generator=generator).to(device)
    x0 = x_t
    for level, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        end = min(settings.ode_sigma_min, sigma)
        x0_hat = ode_endpoint(denoise, x_t, edm_schedule(settings.n_ode, sigma, end))
        data.refine(x0_hat, sigma, bias=refine_bias, noise=refine_noise)
        falling = 1 + (settings.step_decay - 1) * level / max(settings.n_levels - 1, 1)
        limit = 2 / (data.curvature() + sigma**-2)
        x0 = langevin(
            x0_hat,
            data,
            sigma=sigma,
            step=min(settings.step * falling, settings.stability * limit),
            n_steps=settings.n_langevin,
            generator=generator,
            n_leapfrog=settings.n_leapfrog,
        )
        x0 = data.constrain(x0)
        if sigma_next > 0:
            x_t = x0 + sigma_next * torch.randn(shape, generator=generator).to(device)
        if observe is not None:
            observe(level, sigma, x0_hat, x0)
    return x0
