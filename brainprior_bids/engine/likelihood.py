# SPDX-License-Identifier: Apache-2.0
"""One scan as a likelihood: ``y = b * (A x) + n``, and exact draws of x under ``N(m, V_sigma)``.

Symbols
-------
x : brain on the 1 mm grid (i, j, k), 0 outside the mask; engine unit
y : scan (i', j', k'), not divided by its bias field; engine unit
A : slice profile and in-plane k-space crop along the grid's axes
b : bias field times a gain
share : the part of a data voxel's profile that lies in the brain, 0 to 1

What is measured
----------------
A voxel wholly inside has noise SD s. Of a voxel partly outside, the rest shows tissue of unknown
brightness: its variance is ``s^2 + ((1 - share) foreign)^2``. A voxel whose profile lies wholly
outside is not a measurement of tissue, but x is known to be 0 there by the prior; it enters as
``A x = 0`` with SD s. That keeps a stationary V from placing tissue where there can be none, and
makes the solve nearly stationary (a handful of iterations) at no cost in truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brainprior_bids.engine.bias import CosineField, gauss_newton_step
from brainprior_bids.engine.consistency import Residual, residual_of
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.noise import fisher_noise_variance
from brainprior_bids.engine.operators.base import check_shape
from brainprior_bids.engine.solve import conjugate_gradients, split_conjugate_gradients
from brainprior_bids.engine.spectral import LevelFactors, SpectralSolver, Spectrum

OUTSIDE = 0.01
"""A data voxel with a smaller share of brain counts as wholly outside."""
BIAS_TRUST = 0.02
"""Weight of the data in a step of the bias field. V takes a denoiser's errors for stationary; at
high noise they follow the anatomy over centimetres, as a bias field does."""
WIDE = 40.0
"""V is wide while it gives a data voxel more than this times the noise variance."""


@dataclass(frozen=True)
class SolveLimits:
    """When the inner conjugate gradients are done.

    The residual is compared voxel by voxel with the noise SD: an RMS of 0.02 moves the data fit
    by 2 % of the noise.
    """

    tolerance: float = 0.02
    max_iterations: int = 200


class SliceLikelihood:
    """A scan whose slices lie along a grid axis.

    Parameters
    ----------
    y : (i', j', k') float32 tensor
        Engine unit. Values outside the brain are ignored.
    share : (i', j', k') float32 tensor
        Part of each voxel's profile inside the brain; below ``OUTSIDE`` it counts as 0.
    solver : SpectralSolver
        Built with the slice axis first.
    slice_axis : int
        Which axis of y and x that is.
    spectrum : Spectrum
        V_sigma of the prior.
    support : (i, j, k) tensor
        1 where x may differ from 0; draws are multiplied by it.
    noise_sd : float
        Of y, engine unit.
    log_bias : (i', j', k') tensor
        Natural logarithm of the field the estimate starts from.
    bias_field, bias_positions : optional
        Basis for refining it, and the relative positions of the data voxels along each axis.
    foreign : float
        Brightness SD of what is not brain, engine unit.
    extra : (i', j', k') tensor, optional
        Variance of a voxel beyond ``noise_sd``, where the voxels are not equally good.

    Raises
    ------
    InputError
        If no voxel lies in the brain, a value there is not finite, or the noise SD is not
        positive.
    ShapeMismatchError
        If the arrays disagree.
    """

    def __init__(
        self,
        y: Tensor,
        *,
        share: Tensor,
        solver: SpectralSolver,
        slice_axis: int,
        spectrum: Spectrum,
        support: Tensor,
        noise_sd: float,
        log_bias: Tensor | None = None,
        bias_field: CosineField | None = None,
        bias_positions: list[Tensor] | None = None,
        foreign: float = 0.05,
        extra: Tensor | None = None,
        limits: SolveLimits = SolveLimits(),  # frozen
    ) -> None:
        if not (math.isfinite(noise_sd) and noise_sd > 0):
            raise InputError(
                f"SliceLikelihood: noise SD must be above 0, got {noise_sd}. "
                "Pass a positive value or let it be estimated."
            )
        self.axis = slice_axis
        self.solver, self.spectrum, self.limits = solver, spectrum, limits
        self.device = solver.device
        self.share = self._lead(share).clamp(0, 1)
        y = self._lead(y)
        hint = "Data, shares and bias live on the scan's grid."
        check_shape("SliceLikelihood: y", y, solver.data_shape, hint)
        check_shape("SliceLikelihood: share", self.share, solver.data_shape, hint)
        self.brain = self.share >= OUTSIDE
        if not bool(self.brain.any()):
            raise InputError("SliceLikelihood: no voxel of the scan lies in the brain mask.")
        if not bool(torch.isfinite(y[self.brain]).all()):
            raise InputError(
                "SliceLikelihood: the scan holds NaN or infinite values inside the brain. "
                "Repair the image, or mask those voxels out."
            )
        self.y = torch.where(self.brain, y, 0.0)
        self.support = self._lead(support)
        check_shape(
            "SliceLikelihood: support", self.support, solver.image_shape, "It is on the 1 mm grid."
        )
        self.extra = torch.where(self.brain, ((1 - self.share) * foreign) ** 2, 0.0)
        if extra is not None:
            self.extra = self.extra + torch.where(self.brain, self._lead(extra), 0.0)
        self.core = self.share > 0.95
        self.start_log_bias = (
            torch.zeros_like(self.y) if log_bias is None else self._lead(log_bias)
        )
        check_shape("SliceLikelihood: log_bias", self.start_log_bias, solver.data_shape, hint)
        self.field = bias_field
        self._basis: list[Tensor] = []
        if bias_field is not None and bias_positions is not None:
            self._basis = [b.to(self.device) for b in bias_field.basis(bias_positions)]
        self.initial_noise_sd = noise_sd
        self.iterations: list[int] = []
        self.reset()

    # ---- state of one chain ----------------------------------------------------------------

    def reset(self) -> None:
        """Forget what a chain has learnt about bias and noise."""
        self.noise_sd = self.initial_noise_sd
        n = self.field.n if self.field is not None else 0
        self.coefficients = torch.zeros(n, dtype=torch.float64)
        self._set_bias()
        self._factors: LevelFactors | None = None

    def _set_bias(self) -> None:
        log_bias = self.start_log_bias
        if self.field is not None and self._basis:
            extra = self._from_image_axes(
                self.field.evaluate(self.coefficients.to(self.device), self._basis)
            )
            log_bias = log_bias + extra
        self.log_bias = log_bias
        self.bias = torch.where(self.brain, self.log_bias, 0.0).exp()

    def _lead(self, volume: Tensor) -> Tensor:
        """Slice axis first, float32, on the solver's device."""
        moved = volume.to(self.device, torch.float32).movedim(self.axis, 0)
        return moved.contiguous()

    def _from_image_axes(self, volume: Tensor) -> Tensor:
        return volume.movedim(self.axis, 0).contiguous()

    def _to_image_axes(self, volume: Tensor) -> Tensor:
        return volume.movedim(0, self.axis).contiguous()

    # ---- the measurement -------------------------------------------------------------------

    def variance(self, noise_sd: float) -> Tensor:
        """Variance of each voxel of y, slice axis first."""
        return self.extra + noise_sd**2

    def forward(self, x: Tensor) -> Tensor:
        """``b * A x`` for an image in its own axes; (i, j, k) -> (i', j', k')."""
        return self._to_image_axes(self.bias * self.solver.forward(self._from_image_axes(x)))

    def brain_alone(self, x: Tensor) -> Tensor:
        """(i', j', k'): y / b inside the brain, A x where a voxel is partly outside, else 0."""
        mixed = torch.where(self.brain, self.solver.forward(self._from_image_axes(x)), 0.0)
        return self._to_image_axes(torch.where(self.core, self.y / self.bias, mixed))

    def partly_seen(self) -> Tensor:
        """(i', j', k') bool: voxels of the brain that are partly outside, or hidden."""
        return self._to_image_axes(self.brain & ~self.core)

    def standardised_residual(self, x: Tensor, noise_sd: float) -> tuple[Tensor, Tensor]:
        """(y - b A x) over its expected SD, and where it counts; both (i', j', k').

        It counts in voxels wholly inside the brain, or in all of it if there is none.
        """
        r = self.y - self.bias * self.solver.forward(self._from_image_axes(x))
        z = r / self.variance(noise_sd).sqrt()
        where = self.core if bool(self.core.any()) else self.brain
        return self._to_image_axes(z), self._to_image_axes(where)

    def residual_ratio(self, x: Tensor, noise_sd: float | None = None) -> float:
        """RMS of ``standardised_residual``; by default for the noise SD known beforehand."""
        z, where = self.standardised_residual(x, noise_sd or self.initial_noise_sd)
        return float(z[where].square().mean().sqrt())

    def explain(self, x: Tensor) -> tuple[Residual, Tensor]:
        """How well x explains the scan, and the residual in units of the noise, 0 elsewhere."""
        z, where = self.standardised_residual(x, self.initial_noise_sd)
        found = residual_of(
            z,
            where,
            ratio=self.residual_ratio(x),
            ratio_final=self.residual_ratio(x, self.noise_sd),
        )
        return found, torch.where(where, z, 0.0)

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """Gradient of ``1/2 sum (y - b A x)^2 / variance`` over x; (i, j, k)."""
        thick = self.bias * self.solver.forward(self._from_image_axes(x))
        weighted = self.bias * (thick - self.y) / self.variance(self.noise_sd)
        return self._to_image_axes(self.solver.adjoint(weighted))

    def curvature(self) -> float:
        """An upper bound of the largest eigenvalue of ``A^T b Sigma^-1 b A``."""
        largest = float((self.bias**2 / self.variance(self.noise_sd)).max())
        # |W|^2 <= largest row sum times largest column sum; the k-space crop only shrinks
        w = self.solver.weights64.abs()
        return largest * float(w.sum(0).max() * w.sum(1).max()) * self.solver.scale**2

    def constrain(self, x: Tensor) -> Tensor:
        """x where the support is 1, 0 elsewhere."""
        return x * self._to_image_axes(self.support)

    # ---- one noise level -------------------------------------------------------------------

    def prepare(self, sigma: float) -> None:
        """Build the small matrices of level ``sigma``."""
        self._factors = self.solver.factors(self.spectrum, sigma, self._stationary_variance())
        self._sigma = sigma

    def _stationary_variance(self) -> float:
        return self.noise_sd**2

    def _level(self, sigma: float) -> LevelFactors:
        if self._factors is None or self._sigma != sigma:
            self.prepare(sigma)
        assert self._factors is not None
        noise = self._stationary_variance()
        if abs(self._factors.noise_variance - noise) > 1e-9 * noise:
            self._factors = self.solver.renoise(self._factors, noise)
        return self._factors

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Move bias and noise level towards what the denoiser's mean says of the data.

        The innovation ``e = y - b A m`` has covariance ``b A V A^T b + Sigma``: x is integrated
        out under V, so that a level where V is wide moves nothing, and only voxels well inside
        the brain count. Bias: one ridge Gauss-Newton step. Noise: one Fisher-scoring step on the
        variance, weighted by the share of the data that tells noise from V, and held between
        half the value estimated beforehand and that value: the estimate errs upwards (texture),
        and a prior that misses a texture must not be believed more for it.
        """
        if not (bias or noise):
            return
        factors = self._level(sigma)
        thick = self.solver.forward(self._from_image_axes(mean))
        if bias and self.field is not None and self._basis:
            prediction = torch.where(self.core, self.bias * thick, 0.0)
            residual = torch.where(self.core, self.y - self.bias * thick, 0.0)
            self.coefficients = gauss_newton_step(
                self.field,
                self._basis,
                coefficients=self.coefficients,
                prediction=self._to_image_axes(prediction),
                residual=self._to_image_axes(residual),
                whiten=lambda v: self._to_image_axes(
                    self.solver.precondition(factors, self._from_image_axes(v))
                ),
                trust=BIAS_TRUST,
            ).cpu()
            self._set_bias()
        if noise:
            residual = torch.where(self.core, self.y - self.bias * thick, 0.0)
            part = float(self.core.float().mean())
            power = float(self.solver.precondition(factors, residual).square().sum()) / part
            trace, squared = self.solver.inverse_traces(factors)
            value, information = fisher_noise_variance(power, trace, squared, self.noise_sd**2)
            told = information / self.y.numel()
            value = self.noise_sd**2 + told * (value - self.noise_sd**2)
            low, high = (0.5 * self.initial_noise_sd) ** 2, self.initial_noise_sd**2
            self.noise_sd = math.sqrt(min(max(value, low), high))

    def draw(self, mean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """An exact draw from ``N(m, V_sigma) N(y; b A x, Sigma)`` by perturb-and-optimise.

        Parameters
        ----------
        mean : (i, j, k)
            m, the denoiser's answer.

        Raises
        ------
        ConvergenceError
            If the inner solve does not meet ``limits``.
        """
        factors = self._level(sigma)
        variance = self._divided_variance()
        prior_k, seen = self.solver.draw_prior(factors, generator)
        noise = torch.randn(self.y.shape, generator=generator).to(self.device)
        return self._conditional(
            mean, sigma, factors, prior_k, variance.sqrt() * noise - seen, variance
        )

    def expect(self, mean: Tensor, sigma: float) -> Tensor:
        """The mean that ``draw`` varies about; arguments and errors as there."""
        factors = self._level(sigma)
        variance = self._divided_variance()
        nothing = self.solver.no_deviation()
        return self._conditional(
            mean, sigma, factors, nothing, torch.zeros_like(variance), variance
        )

    def _divided_variance(self) -> Tensor:
        """Of y / b, which is ``A x + n / b``."""
        return self.variance(self.noise_sd) / self.bias**2

    def _conditional(
        self,
        mean: Tensor,
        sigma: float,
        factors: LevelFactors,
        prior_k: Tensor,
        perturbation: Tensor,
        variance: Tensor,
    ) -> Tensor:
        """``z + V A^T (A V A^T + Sigma)^-1 (y + Sigma^1/2 n - A z)``, z = m + the prior's part."""
        m = self._from_image_axes(mean)
        rhs = self.y / self.bias + perturbation - self.solver.forward(m)
        u = self._solve(factors, rhs, variance, sigma)
        x0 = m + self.solver.correct(factors, prior_k, u)
        return self._to_image_axes(x0 * self.support)

    def _solve(self, factors: LevelFactors, rhs: Tensor, variance: Tensor, sigma: float) -> Tensor:
        """``(A V A^T + Sigma / b^2)^-1 rhs``.

        While V is wide the stationary solve is a good preconditioner as it is. Once V is narrow
        the differing precisions of the voxels rule: then it is scaled by what each voxel's own
        precision makes of it, at the price of a second product an iteration.
        """
        inverse_sd = variance.rsqrt()
        n = math.sqrt(rhs.numel())
        noise = factors.noise_variance
        spread = self.solver.mean_variance(factors)

        def size(r: Tensor) -> float:
            return float((r * inverse_sd).norm()) / n

        who = f"inner solve at sigma {sigma:.3g}"
        if spread > WIDE * noise:
            u, iterations = split_conjugate_gradients(
                lambda r: self.solver.precondition(factors, r),
                variance - noise,
                rhs,
                residual_size=size,
                tolerance=self.limits.tolerance,
                max_iterations=self.limits.max_iterations,
                who=who,
            )
        else:
            scale = ((spread + noise) / (spread + variance)).sqrt()
            u, iterations = conjugate_gradients(
                lambda v: torch.addcmul(self.solver.covariance(factors, v), variance, v),
                rhs,
                precondition=lambda r: scale * self.solver.precondition(factors, scale * r),
                residual_size=size,
                tolerance=self.limits.tolerance,
                max_iterations=self.limits.max_iterations,
                who=who,
            )
        self.iterations.append(iterations)
        return u
