# SPDX-License-Identifier: Apache-2.0
"""The image-space strategy: any linear operators, solved by conjugate gradients.

For an A without exploitable structure: a rotation inside A (the unknown on the MNI305 grid, as in
arXiv 2510.15119) or several scans. It costs ten times as much as the spectral strategy; bias
fields and noise levels are fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.box import Box
from brainprior_bids.engine.gaussian.conjugate_gradients import conjugate_gradients
from brainprior_bids.engine.gaussian.slices import SolveLimits
from brainprior_bids.engine.gaussian.spectral import Spectrum
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.operators.base import LinearOperator, VStack
from brainprior_bids.engine.operators.diagonal import Multiply
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import SliceProfile

LIMITS = SolveLimits(tolerance=0.02, max_iterations=500)
PROBES, WIDTH = 2, 5
"""Probes of the operator, and the frequencies along each axis over which they are averaged."""


@dataclass(frozen=True, eq=False)
class _Level:
    """Quantities for one noise level on half of k-space, as in ``rfftn``. With H the diagonal of
    ``A^T Sigma^-1 A`` there: ``own`` is ``1 / (1 + V H)``, ``back`` and ``forth`` are ``(V
    own)^1/2`` with the columns' multiplicity.
    """

    sigma: float
    spectrum: Tensor
    own: Tensor
    back: Tensor
    forth: Tensor


class ImageSpaceSolve:
    """A ``Solve`` for a likelihood with any terms, under a V that is stationary in x.

    Parameters
    ----------
    likelihood : Likelihood
    spectrum : Spectrum
        V_sigma of the prior.
    spacing_mm : three floats
        Voxel size of the image.
    """

    name = "image space"

    def __init__(
        self,
        likelihood: Likelihood,
        spectrum: Spectrum,
        spacing_mm: tuple[float, float, float],
        limits: SolveLimits = LIMITS,
    ) -> None:
        self.likelihood, self.spectrum, self.limits = likelihood, spectrum, limits
        terms, outside = likelihood.terms, 1 - likelihood.support
        operators: list[LinearOperator] = [Multiply(term.bias) @ term.operator for term in terms]
        data, precisions = [term.y for term in terms], [term.precision() for term in terms]
        self.n_data = sum(y.numel() for y in data)
        if bool(outside.any()):
            # x is 0 there: a measurement as certain as the most certain scan, needed when V is
            # wide
            operators.append(Multiply(outside))
            data.append(torch.zeros_like(outside))
            precisions.append(outside * min(term.noise_sd for term in terms) ** -2)
        self.operator = VStack(operators)
        self.y = torch.cat([y.flatten() for y in data])
        self.precision = torch.cat([p.flatten() for p in precisions])
        shape = self.operator.in_shape
        axes = [
            torch.fft.fftfreq(shape[0], d=spacing_mm[0]),
            torch.fft.fftfreq(shape[1], d=spacing_mm[1]),
            torch.fft.rfftfreq(shape[2], d=spacing_mm[2]),
        ]
        squares = [axis**2 for axis in axes]
        self.frequency = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).sqrt()
        self.iterations: list[int] = []
        self._level: _Level | None = None
        self._h: Tensor | None = None

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """Do nothing: bias and noise are fixed."""

    def draw(
        self, mean: Tensor, sigma: float, generator: torch.Generator, *, given: bool = False
    ) -> Tensor:
        """As ``Likelihood.draw``."""
        device = self.likelihood.device
        spectrum = self._prepare(sigma).spectrum
        white = torch.randn(mean.shape, generator=generator).to(device)
        noise = torch.randn(self.y.shape, generator=generator).to(device)
        k = torch.fft.rfftn(white) * spectrum.sqrt()
        z = mean + torch.fft.irfftn(k, s=white.shape)
        sd = torch.where(self.precision > 0, self.precision.rsqrt(), 0.0)
        return self._conditional(z, sigma, self._data(mean, given) + sd * noise)

    def expect(self, mean: Tensor, sigma: float, *, given: bool = False) -> Tensor:
        """As ``Likelihood.expect``."""
        return self._conditional(mean, sigma, self._data(mean, given))

    def _data(self, mean: Tensor, given: bool) -> Tensor:
        """All measurements; with ``given``, the reference's are replaced by those that the mean
        predicts.
        """
        if not given:
            return self.y
        first = self.likelihood.reference
        data = self.y.clone()
        data[: first.y.numel()] = first.predict(mean).flatten()
        return data

    def _conditional(self, z: Tensor, sigma: float, data: Tensor) -> Tensor:
        """``z + V^1/2 (1 + V^1/2 A^T Sigma^-1 A V^1/2)^-1 V^1/2 A^T Sigma^-1 (data - A z)``.

        This equals ``z + V A^T (A V A^T + Sigma)^-1 (data - A z)``, but the system is solved in
        the image's k-space, where its diagonal ``1 + V H`` is known. Scaled by this diagonal it is
        well conditioned even where V is wide, unlike the system over the data.
        """
        level, shape = self._prepare(sigma), z.shape

        def back(w: Tensor) -> Tensor:
            image: Tensor = torch.fft.irfftn(
                torch.view_as_complex(w) * level.back, s=shape, norm="ortho"
            )
            return image

        def forth(image: Tensor) -> Tensor:
            coefficients = torch.fft.rfftn(image, norm="ortho") * level.forth
            return torch.view_as_real(coefficients.contiguous())

        def weighted(values: Tensor) -> Tensor:
            return self.operator.adjoint(self.precision * values)

        n = math.sqrt(self.n_data)
        w, iterations = conjugate_gradients(
            lambda v: level.own * v + forth(weighted(self.operator(back(v)))),
            forth(weighted(data - self.operator(z))),
            # its square bounds the error of A x, in SDs of the noise, summed over the data
            residual_size=lambda r: float(r.norm()) / n,
            tolerance=self.limits.tolerance,
            max_iterations=self.limits.max_iterations,
            who=f"inner solve at sigma {sigma:.3g}",
        )
        self.iterations.append(iterations)
        return (z + back(w)) * self.likelihood.support

    def _prepare(self, sigma: float) -> _Level:
        """V at each frequency, and the quantities derived from it."""
        if self._level is None or self._level.sigma != sigma:
            device = self.likelihood.device
            spectrum = self.spectrum.variance(sigma, self.frequency).to(device)
            own = 1 / (1 + spectrum * self._diagonal())
            root = (spectrum * own).sqrt()
            # half of k-space represents all of it: columns with a mirror image count twice
            twice = root.new_full((self.frequency.shape[-1],), math.sqrt(2.0))
            twice[0] = 1.0
            if self.operator.in_shape[-1] % 2 == 0:
                twice[-1] = 1.0
            self._level = _Level(sigma, spectrum, own[..., None], root / twice, root * twice)
        return self._level

    def _diagonal(self) -> Tensor:
        """Approximate diagonal of ``A^T Sigma^-1 A`` in k-space, found by probing with white
        noise: the ratio of output to input at each frequency, averaged over neighbouring
        frequencies.
        """
        if self._h is None:
            generator = torch.Generator().manual_seed(0)
            shape, device = self.operator.in_shape, self.likelihood.device
            returned, sent = torch.zeros((), device=device), torch.zeros((), device=device)
            for _ in range(PROBES):
                x = torch.randn(shape, generator=generator).to(device)
                kx = torch.fft.rfftn(x, norm="ortho")
                answer = self.operator.adjoint(self.precision * self.operator(x))
                ky = torch.fft.rfftn(answer, norm="ortho")
                returned = returned + (kx.conj() * ky).real
                sent = sent + kx.abs().square()
            self._h = (_smooth(returned) / _smooth(sent)).clamp_min(0)
        return self._h


def _smooth(k: Tensor) -> Tensor:
    """Mean over ``WIDTH`` neighbours along each axis of a half k-space."""
    for axis in range(3):
        half = min(WIDTH // 2, (k.shape[axis] - 1) // 2)
        sides = [0, 0, 0, 0, 0, 0]
        sides[2 * (2 - axis)] = sides[2 * (2 - axis) + 1] = half
        padded = F.pad(k[None], sides, mode="reflect" if axis == 2 else "circular")[0]
        k = padded.unfold(axis, 2 * half + 1, 1).mean(-1)
    return k


def sliced(resample: LinearOperator, box: Box, axis: int, profile: Tensor) -> LinearOperator:
    """``W R``: a resampling to 1 mm along a scan's axes, then the scan's own voxels.

    Parameters
    ----------
    resample : LinearOperator
        Its output is the image part of ``box``.
    box : Box
        The part of the scan that holds the brain.
    axis : int
        The slice axis.
    profile : (n_slices, n_thin) float64 tensor
        The slice profile over the whole field of view; along the other axes it is sinc-shaped.
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
    return operator
