# SPDX-License-Identifier: Apache-2.0
"""The scans as one likelihood: ``y_k = b_k * (A_k x) + n_k``, ``n_k ~ N(0, 1 / precision_k)``.

Symbols
-------
x : brain on the home grid (i, j, k), 0 outside the support; engine unit
y : scan (i', j', k'), not divided by its bias field; engine unit
A : rigid motion, slice profile and in-plane k-space crop
b : bias field times a gain
share : the part of a data voxel's profile that lies in the brain, 0 to 1

The precision ------------- A voxel wholly inside has noise SD s. In a voxel partly outside, the
rest shows tissue of unknown brightness: its variance is ``s^2 + ((1 - share) foreign)^2``. A voxel
wholly outside does not measure brain tissue, but x is 0 there by definition; it enters as ``A x =
0`` with SD s. This prevents a stationary V from placing tissue there, and makes the solve nearly
stationary (a few iterations). Where A includes the brain only, such a row is empty; instead, the
image-space solve has a row ``x = 0`` for every voxel beyond the support. A map of the noise adds
its excess over the lowest SD. A hidden voxel has precision 0, because even a small precision would
pull x towards the lesion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from brainprior_bids.engine.consistency import Residual, residual_of
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.nuisance import BiasModel, NuisanceState
from brainprior_bids.engine.operators.base import LinearOperator, check_shape

OUTSIDE = 0.01
"""A data voxel with a smaller share of brain counts as wholly outside."""
CORE = 0.95
"""A data voxel with a larger share counts as wholly inside."""
FOREIGN = 0.05
"""Brightness SD of the surroundings in a voxel partly outside, engine unit, if x beyond the
brain's border can represent most of it (the spectral strategy)."""
FOREIGN_UNSEEN = 0.2
"""The same if A includes the brain only, so that x cannot represent the surroundings. With 0.05,
fat and fluid caused ringing at the brain's border: in slabs of three heads, the error of the
Gaussian estimate at sigma 3 was 1.02 to 1.58 times as large."""


class Term:
    """One scan in the likelihood, under one assumed slice thickness.

    Parameters
    ----------
    y : (i', j', k') tensor
        Engine unit; values outside the brain are ignored.
    operator : LinearOperator
        A: from the home grid to y, without the bias field.
    share : (i', j', k') tensor
        Part of each voxel's profile inside the brain; below ``OUTSIDE`` it counts as 0.
    noise_sd : float
        Noise SD of y, engine unit.
    log_bias : (i', j', k') tensor, optional
        Natural logarithm of the bias field; 0 by default.
    hidden : (i', j', k') bool tensor, optional
        Voxels of precision 0.
    excess : (i', j', k') tensor, optional
        Variance of a voxel in excess of ``noise_sd``, if there is a map of the noise.
    bias_model : BiasModel, optional
        Basis on which the field may change; by default it is fixed.
    foreign : float
        Brightness SD of the surroundings of the brain, engine unit.

    Attributes
    ----------
    brain, core, measured : (i', j', k') bool tensors
        Voxels that show brain; those wholly inside that are not hidden (all of the brain, if
        there is none); those that are not hidden.
    nuisance : NuisanceState
        Noise SD and bias field of the current chain.

    Raises
    ------
    InputError
        If no voxel lies in the brain, a value there is not finite, the noise SD is not positive,
        or the hidden voxels leave nothing that lies wholly inside.
    ShapeMismatchError
        If the arrays disagree.
    """

    def __init__(
        self,
        y: Tensor,
        *,
        operator: LinearOperator,
        share: Tensor,
        noise_sd: float,
        log_bias: Tensor | None = None,
        hidden: Tensor | None = None,
        excess: Tensor | None = None,
        bias_model: BiasModel | None = None,
        foreign: float = FOREIGN,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (math.isfinite(noise_sd) and noise_sd > 0):
            raise InputError(
                f"likelihood: noise SD must be above 0, got {noise_sd}. "
                "Pass a positive value or let it be estimated."
            )

        def placed(name: str, volume: Tensor) -> Tensor:
            check_shape(f"likelihood: {name}", volume, operator.out_shape, "On the scan's grid.")
            return volume.to(device, torch.float32)

        y, share = placed("y", y), placed("share", share)
        self.operator, self.share = operator, share.clamp(0, 1)
        self.brain = self.share >= OUTSIDE
        if not bool(self.brain.any()):
            raise InputError("likelihood: no voxel of the scan lies in the brain mask.")
        self.measured = torch.ones_like(self.brain)
        if hidden is not None:
            self.measured = placed("hidden", hidden) <= 0
        if not bool(torch.isfinite(y[self.brain & self.measured]).all()):
            raise InputError(
                "likelihood: the scan holds NaN or infinite values inside the brain. "
                "Repair the image, or mask those voxels out."
            )
        self.y = torch.where(self.brain, y, 0.0)
        self.excess = torch.where(self.brain, ((1 - self.share) * foreign) ** 2, 0.0)
        if excess is not None:
            self.excess = self.excess + torch.where(self.brain, placed("excess", excess), 0.0)
        self.core = (self.share > CORE) & self.measured
        if not bool(self.core.any()):
            if hidden is not None and bool((self.share > CORE).any()):
                raise InputError(
                    "The lesion mask covers every voxel that lies wholly in the brain: nothing is "
                    "left to condition on. Check the mask."
                )
            self.core = self.brain & self.measured
        field = torch.zeros_like(self.y) if log_bias is None else placed("log_bias", log_bias)
        self.nuisance = NuisanceState(noise_sd, field, self.brain, bias_model)

    @property
    def bias(self) -> Tensor:
        """b; (i', j', k')."""
        return self.nuisance.bias

    @property
    def noise_sd(self) -> float:
        """Noise SD of y in this chain."""
        return self.nuisance.noise_sd

    @property
    def all_measured(self) -> bool:
        """Whether no voxel is hidden."""
        return bool(self.measured.all())

    def variance(self, noise_sd: float | None = None) -> Tensor:
        """(i', j', k') variance of each voxel that is not hidden."""
        return self.excess + (self.noise_sd if noise_sd is None else noise_sd) ** 2

    def precision(self) -> Tensor:
        """(i', j', k') ``1 / variance``, 0 where hidden."""
        return self.measured / self.variance()

    def predict(self, x: Tensor) -> Tensor:
        """``b * A x``: (i, j, k) -> (i', j', k')."""
        predicted: Tensor = self.bias * self.operator(x)
        return predicted

    def standardised_residual(self, x: Tensor, noise_sd: float) -> Tensor:
        """(y - b A x) over the SD expected with that noise; (i', j', k')."""
        return (self.y - self.predict(x)) / self.variance(noise_sd).sqrt()

    def residual_ratio(self, x: Tensor, noise_sd: float | None = None) -> float:
        """RMS of the standardised residual over ``core``; by default with the noise SD known
        before sampling."""
        z = self.standardised_residual(x, noise_sd or self.nuisance.initial_noise_sd)
        return float(z[self.core].square().mean().sqrt())

    def explain(self, x: Tensor) -> tuple[Residual, Tensor]:
        """How well x explains the scan, and the residual in SDs of the noise, 0 elsewhere."""
        z = self.standardised_residual(x, self.nuisance.initial_noise_sd)
        final = self.residual_ratio(x, self.noise_sd)
        residual = residual_of(z, self.core, ratio_final=final)
        return residual, torch.where(self.core, z, 0.0)

    def brain_alone(self, x: Tensor) -> Tensor:
        """(i', j', k'): y / b in the core, A x where partly outside or hidden, else 0."""
        mixed = torch.where(self.brain, self.operator(x), 0.0)
        return torch.where(self.core, self.y / self.bias, mixed)

    def partly_seen(self) -> Tensor:
        """(i', j', k') bool: voxels of the brain that are partly outside, or hidden."""
        return self.brain & ~self.core


class Solve(Protocol):
    """A strategy for the linear-Gaussian conditional; see ``gaussian``."""

    name: str
    iterations: list[int]

    def draw(
        self, mean: Tensor, sigma: float, generator: torch.Generator, *, given: bool = False
    ) -> Tensor:
        """An exact draw from ``N(m, V_sigma)`` times the likelihood; (i, j, k)."""
        ...

    def expect(self, mean: Tensor, sigma: float, *, given: bool = False) -> Tensor:
        """The mean of ``draw``."""
        ...

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Update the nuisances from the residual of the denoiser's mean."""


class Likelihood:
    """All scans together. ``problem``, which builds it, sets ``solve``.

    Parameters
    ----------
    terms : sequence of Term
        The reference first.
    support : (i, j, k) tensor
        1 where x may differ from 0.
    """

    solve: Solve

    def __init__(
        self, terms: Sequence[Term], support: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self.terms, self.device = list(terms), torch.device(device)
        for term in self.terms:
            check_shape(
                "likelihood: support", support, term.operator.in_shape, "On the 1 mm grid."
            )
        self.support = support.to(self.device, torch.float32)
        self._norms: list[float] | None = None

    @property
    def reference(self) -> Term:
        """The first scan."""
        return self.terms[0]

    def reset(self) -> None:
        """Reset bias and noise to their values before sampling."""
        for term in self.terms:
            term.nuisance.reset()

    def residual_ratio(self, x: Tensor) -> float:
        """RMS of the standardised residuals of all scans, for the noise known before sampling."""
        total, count = 0.0, 0
        for term in self.terms:
            z = term.standardised_residual(x, term.nuisance.initial_noise_sd)[term.core]
            total, count = total + float(z.square().sum()), count + z.numel()
        return math.sqrt(total / count)

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """Gradient of ``1/2 sum precision (y - b A x)^2`` over x; (i, j, k)."""
        gradient = torch.zeros_like(x)
        for term in self.terms:
            weighted = term.bias * term.precision() * (term.predict(x) - term.y)
            gradient = gradient + term.operator.adjoint(weighted)
        return gradient

    def curvature(self) -> float:
        """An upper bound of the largest eigenvalue of ``A^T b precision b A``."""
        if self._norms is None:
            self._norms = [term.operator.squared_norm_bound() for term in self.terms]
        return sum(
            float((term.bias.square() * term.precision()).max()) * norm
            for term, norm in zip(self.terms, self._norms, strict=True)
        )

    def constrain(self, x: Tensor) -> Tensor:
        """x where the support is 1, 0 elsewhere."""
        return x * self.support

    def draw(
        self, mean: Tensor, sigma: float, generator: torch.Generator, *, given: bool = False
    ) -> Tensor:
        """An exact draw from ``N(m, V_sigma)`` times the likelihood, by perturb-and-optimise.

        Parameters
        ----------
        mean : (i, j, k)
            m, the denoiser's answer.
        given : bool
            The denoiser was conditioned on the reference's measurements: m explains them already,
            and only the other scans change it.

        Raises
        ------
        ConvergenceError
            If the inner solve does not meet its limits.
        """
        return self.solve.draw(mean, sigma, generator, given=given)

    def expect(self, mean: Tensor, sigma: float, *, given: bool = False) -> Tensor:
        """The mean of ``draw``; arguments and errors as there."""
        return self.solve.expect(mean, sigma, given=given)

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Update bias field and noise level of the reference from the residual of the denoiser's
        mean.
        """
        self.solve.refine(mean, sigma, bias=bias, noise=noise)
