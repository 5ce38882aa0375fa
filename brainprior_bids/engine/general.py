# SPDX-License-Identifier: Apache-2.0
"""Any linear measurement as a likelihood: ``y = A x + n``, solved by conjugate gradients.

The dear way, for an A without structure: a rotation inside A (the unknown on the MNI305 grid, as
in arXiv 2510.15119) or scans of different orientation stacked. See ``likelihood`` for the cheap
one and for the symbols; a bias field is part of A here and stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.box import Box
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.likelihood import OUTSIDE, SolveLimits
from brainprior_bids.engine.operators.base import LinearOperator, check_shape, squared_norm
from brainprior_bids.engine.operators.diagonal import Multiply
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import SliceProfile
from brainprior_bids.engine.solve import conjugate_gradients
from brainprior_bids.engine.spectral import Spectrum

LIMITS = SolveLimits(tolerance=0.02, max_iterations=500)
FOREIGN = 0.05
"""Brightness SD of what is not brain in a voxel partly outside, engine unit."""
PROBES, WIDTH = 2, 5
"""Probes of the operator, and the frequencies along each axis over which they are averaged."""


@dataclass(frozen=True, eq=False)
class _Level:
    """One noise level; k-space is half of it, as ``rfftn`` leaves it.

    With H the diagonal of ``A^T Sigma^-1 A`` there: ``own`` is ``1 / (1 + V H)``, ``back`` and
    ``forth`` are ``(V own)^1/2`` with the columns' multiplicity.
    """

    sigma: float
    spectrum: Tensor
    own: Tensor
    back: Tensor
    forth: Tensor


class OperatorLikelihood:
    """``y = A x + n`` with independent noise, under ``N(m, V_sigma)``, V stationary in x.

    Parameters
    ----------
    y : (*operator.out_shape) tensor
        Engine unit, finite.
    operator : LinearOperator
        From an (i, j, k) image to y.
    spectrum : Spectrum
        V_sigma of the prior.
    spacing_mm : three floats
        Voxel size of the image.
    support : (i, j, k) tensor
        1 where x may differ from 0.
    noise_sd : float
        Of y, engine unit.
    extra : (*operator.out_shape) tensor, optional
        Variance of each value beside the noise's.
    core : (*operator.out_shape) bool tensor, optional
        Values that ``residual_ratio`` counts; all without.

    Raises
    ------
    InputError
        If the noise SD is not above 0 or a value of y is not finite.
    ShapeMismatchError
        If the arrays do not fit the operator.
    """

    def __init__(
        self,
        y: Tensor,
        *,
        operator: LinearOperator,
        spectrum: Spectrum,
        spacing_mm: tuple[float, float, float],
        support: Tensor,
        noise_sd: float,
        extra: Tensor | None = None,
        core: Tensor | None = None,
        limits: SolveLimits = LIMITS,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (math.isfinite(noise_sd) and noise_sd > 0):
            raise InputError(
                f"OperatorLikelihood: noise SD must be above 0, got {noise_sd}. "
                "Pass a positive value or let it be estimated."
            )
        if not bool(torch.isfinite(y).all()):
            raise InputError(
                "OperatorLikelihood: the data hold NaN or infinite values. Repair the image, or "
                "leave those voxels out."
            )
        who, hint = "OperatorLikelihood", "Build the operator for these data."
        check_shape(f"{who}: y", y, operator.out_shape, hint)
        check_shape(f"{who}: support", support, operator.in_shape, hint)
        self.device = torch.device(device)
        self.operator, self.spectrum, self.limits = operator, spectrum, limits
        self.y = y.to(self.device, torch.float32)
        self.support = support.to(self.device, torch.float32)
        self.extra = torch.zeros_like(self.y) if extra is None else extra.to(self.y)
        check_shape(f"{who}: extra", self.extra, operator.out_shape, hint)
        self.core = (
            torch.ones_like(self.y, dtype=torch.bool) if core is None else core.to(self.device)
        )
        check_shape(f"{who}: core", self.core, operator.out_shape, hint)
        self.noise_sd = noise_sd
        self.iterations: list[int] = []
        shape = operator.in_shape
        axes = [
            torch.fft.fftfreq(shape[0], d=spacing_mm[0]),
            torch.fft.fftfreq(shape[1], d=spacing_mm[1]),
            torch.fft.rfftfreq(shape[2], d=spacing_mm[2]),
        ]
        squares = [axis**2 for axis in axes]
        self.frequency = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).sqrt()
        self._level: _Level | None = None
        self._h: Tensor | None = None
        self._norm: float | None = None

    # ---- what the samplers ask -------------------------------------------------------------

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Nothing: bias and noise stay as they were given."""

    def variance(self) -> Tensor:
        """Of each value of y."""
        return self.extra + self.noise_sd**2

    def residual_ratio(self, x: Tensor) -> float:
        """RMS of (y - A x) over the noise SD, over the core."""
        return float(self.standardised_residual(x)[self.core].square().mean().sqrt())

    def standardised_residual(self, x: Tensor) -> Tensor:
        """(y - A x) in SDs of each value."""
        return (self.y - self.operator(x)) * self.variance().rsqrt()

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """Gradient of ``1/2 sum (y - A x)^2 / variance`` over x."""
        return self.operator.adjoint((self.operator(x) - self.y) / self.variance())

    def curvature(self) -> float:
        """An upper bound of the largest eigenvalue of ``A^T Sigma^-1 A``."""
        if self._norm is None:
            # from below, hence the margin
            self._norm = 1.2 * squared_norm(self.operator, torch.Generator().manual_seed(0))
        return self._norm / float(self.variance().min())

    def constrain(self, x: Tensor) -> Tensor:
        """x where the support is 1, 0 elsewhere."""
        return x * self.support

    def draw(self, mean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """An exact draw from ``N(m, V_sigma) N(y; A x, Sigma)`` by perturb-and-optimise.

        Raises
        ------
        ConvergenceError
            If conjugate gradients do not meet ``limits``.
        """
        spectrum = self._prepare(sigma).spectrum
        white = torch.randn(mean.shape, generator=generator).to(self.device)
        noise = torch.randn(self.y.shape, generator=generator).to(self.device)
        z = mean + self._filter(spectrum.sqrt(), white)
        return self._conditional(z, sigma, self.variance().sqrt() * noise)

    def expect(self, mean: Tensor, sigma: float) -> Tensor:
        """The mean that ``draw`` varies about; errors as there."""
        return self._conditional(mean, sigma, torch.zeros_like(self.y))

    # ---- the solve -------------------------------------------------------------------------

    def _conditional(self, z: Tensor, sigma: float, perturbation: Tensor) -> Tensor:
        """``z + V^1/2 (1 + V^1/2 A^T Sigma^-1 A V^1/2)^-1 V^1/2 A^T Sigma^-1 (y + p - A z)``.

        The same as ``z + V A^T (A V A^T + Sigma)^-1 (y + p - A z)``, but the system lives in the
        image's k-space, where its diagonal ``1 + V H`` is known: scaled by that it is well
        conditioned even where V is wide, which the one over the data is not.
        """
        level = self._prepare(sigma)
        precision = 1 / self.variance()
        shape = z.shape

        def back(w: Tensor) -> Tensor:
            image: Tensor = torch.fft.irfftn(
                torch.view_as_complex(w) * level.back, s=shape, norm="ortho"
            )
            return image

        def forth(image: Tensor) -> Tensor:
            coefficients = torch.fft.rfftn(image, norm="ortho") * level.forth
            return torch.view_as_real(coefficients.contiguous())

        n = math.sqrt(self.y.numel())
        w, iterations = conjugate_gradients(
            lambda v: (
                level.own * v + forth(self.operator.adjoint(precision * self.operator(back(v))))
            ),
            forth(self.operator.adjoint(precision * (self.y + perturbation - self.operator(z)))),
            # its square bounds how far A x is off, in SDs of the noise, summed over the data
            residual_size=lambda r: float(r.norm()) / n,
            tolerance=self.limits.tolerance,
            max_iterations=self.limits.max_iterations,
            who=f"inner solve at sigma {sigma:.3g}",
        )
        self.iterations.append(iterations)
        return (z + back(w)) * self.support

    def _prepare(self, sigma: float) -> _Level:
        """V at each frequency, and what follows from it."""
        if self._level is None or self._level.sigma != sigma:
            spectrum = self.spectrum.variance(sigma, self.frequency).to(self.device)
            own = 1 / (1 + spectrum * self._diagonal())
            root = (spectrum * own).sqrt()
            # half of k-space stands for all of it: columns with a mirror image count twice
            twice = root.new_full((self.frequency.shape[-1],), math.sqrt(2.0))
            twice[0] = 1.0
            if self.operator.in_shape[-1] % 2 == 0:
                twice[-1] = 1.0
            self._level = _Level(sigma, spectrum, own[..., None], root / twice, root * twice)
        return self._level

    def _diagonal(self) -> Tensor:
        """About the diagonal of ``A^T Sigma^-1 A`` in k-space, found by probing.

        White noise goes through it; what comes back at a frequency, over what went in, is
        averaged over neighbouring frequencies.
        """
        if self._h is None:
            generator = torch.Generator().manual_seed(0)
            precision = 1 / self.variance()
            shape = self.operator.in_shape
            come, gone = torch.zeros(()), torch.zeros(())
            for _ in range(PROBES):
                x = torch.randn(shape, generator=generator).to(self.device)
                kx = torch.fft.rfftn(x, norm="ortho")
                answer = self.operator.adjoint(precision * self.operator(x))
                ky = torch.fft.rfftn(answer, norm="ortho")
                come = come.to(self.device) + (kx.conj() * ky).real
                gone = gone.to(self.device) + kx.abs().square()
            self._h = (_smooth(come) / _smooth(gone)).clamp_min(0)
        return self._h

    def _filter(self, spectrum: Tensor, x: Tensor) -> Tensor:
        """Multiply by ``spectrum`` in k-space."""
        filtered: Tensor = torch.fft.irfftn(spectrum * torch.fft.rfftn(x), s=x.shape)
        return filtered


def _smooth(k: Tensor) -> Tensor:
    """Mean over ``WIDTH`` neighbours along each axis of a half k-space."""
    for axis in range(3):
        half = min(WIDTH // 2, (k.shape[axis] - 1) // 2)
        sides = [0, 0, 0, 0, 0, 0]
        sides[2 * (2 - axis)] = sides[2 * (2 - axis) + 1] = half
        padded = F.pad(k[None], sides, mode="reflect" if axis == 2 else "circular")[0]
        k = padded.unfold(axis, 2 * half + 1, 1).mean(-1)
    return k


def sliced(
    resample: LinearOperator, box: Box, axis: int, profile: Tensor, bias: Tensor
) -> LinearOperator:
    """``bias * W R``: a resampling to 1 mm along a scan's axes, then the scan's own voxels.

    Parameters
    ----------
    resample : LinearOperator
        Ends on the image part of ``box``.
    box : Box
        The part of the scan that holds the brain.
    axis : int
        The slices'.
    profile : (n_slices, n_thin) float64 tensor
        Of the whole field of view; the other axes are sinc-shaped.
    bias : (*box.data_shape) tensor
        What each value is multiplied by.
    """
    operator = resample
    for a in range(3):
        weights = (
            profile[box.data_start[a] : box.data_stop[a], box.start[a] : box.stop[a]]
            if a == axis
            else resampling_matrix(box.shape[a], box.data_shape[a])
        )
        if weights.shape[0] != weights.shape[1] or not torch.equal(
            weights, torch.eye(len(weights), dtype=weights.dtype)
        ):
            operator = SliceProfile(weights, operator.out_shape, a) @ operator
    return Multiply(bias) @ operator


def foreign_variance(share: Tensor) -> Tensor:
    """Variance that the part of a voxel outside the brain adds; share: the part inside."""
    return torch.where(share >= OUTSIDE, ((1 - share) * FOREIGN) ** 2, 0.0)


def core_of(share: Tensor) -> Tensor:
    """Voxels wholly inside the brain (bool), or all of it if there is none."""
    core = share > 0.95
    return core if bool(core.any()) else share >= OUTSIDE
