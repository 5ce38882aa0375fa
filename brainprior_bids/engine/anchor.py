# SPDX-License-Identifier: Apache-2.0
"""A scan and another tool's image of the same brain in one likelihood.

``y = b * (A x) + n`` and ``z = x + e``, with z on the 1 mm grid and ``e ~ N(0, tau^2)``: tau is
how far z is trusted. Because e is white, z and the denoiser's answer ``N(m, V)`` make one
Gaussian that is again diagonal in frequency,

    V' = (1/V + 1/tau^2)^-1,    m' = m + V / (V + tau^2) (z - m),

and everything that is known of ``N(m, V)`` and a scan holds for ``N(m', V')``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.likelihood import SliceLikelihood
from brainprior_bids.engine.operators.base import check_shape
from brainprior_bids.engine.spectral import Spectrum

UNLIKE = 0.2
"""Below this correlation with the scan an image shows something else."""


@dataclass(frozen=True)
class AnchoredSpectrum:
    """V' of ``spectrum`` and a trust of ``tau``, engine unit."""

    spectrum: Spectrum
    tau: float

    def variance(self, sigma: float, frequency: Tensor) -> Tensor:
        """Same shape as ``frequency`` (cycles per mm)."""
        v = self.spectrum.variance(sigma, frequency)
        return v * self.tau**2 / (v + self.tau**2)


class AnchoredLikelihood(SliceLikelihood):
    """A scan, and an image of the same brain that is trusted to within ``tau``.

    Parameters
    ----------
    y, options
        As ``SliceLikelihood``.
    anchor : (i, j, k) tensor
        z, in any unit: it is brought to the scan's by ``gain``, the least squares factor between
        A z and y / b inside the brain.
    tau : float
        Engine unit, above 0.
    spacing_mm : (i, j, k)
        Voxel size of z.

    Attributes
    ----------
    gain, correlation : float
        Of A z with y / b, in voxels wholly inside the brain.

    Raises
    ------
    InputError
        If tau is not above 0, z is not finite or 0 where the scan shows brain, or A z and y / b
        correlate by less than ``UNLIKE``.
    """

    def __init__(
        self,
        y: Tensor,
        *,
        anchor: Tensor,
        tau: float,
        spacing_mm: tuple[float, float, float],
        **options: Any,
    ) -> None:
        if not (math.isfinite(tau) and tau > 0):
            raise InputError(f"AnchoredLikelihood: the trust must be above 0, got {tau}.")
        super().__init__(y, **options)
        z = self._lead(anchor)
        check_shape("AnchoredLikelihood: anchor", z, self.solver.image_shape, "The 1 mm grid.")
        if not bool(torch.isfinite(z).all()):
            raise InputError("AnchoredLikelihood: the image holds NaN or infinite values.")
        where = self.core if bool(self.core.any()) else self.brain
        seen, scan = self.solver.forward(z)[where], (self.y / self.bias)[where]
        if not bool((seen > 0).any()):
            raise InputError(
                "the image to refine is 0 where the scan shows brain. Do they lie in the same "
                "space?"
            )
        self.gain = float((seen @ scan) / (seen @ seen))
        self.correlation = float(torch.corrcoef(torch.stack((seen, scan)))[0, 1])
        if not self.correlation > UNLIKE:
            raise InputError(
                f"the image to refine and the scan correlate by {self.correlation:.2f} inside the "
                f"brain, at least {UNLIKE} is needed. Do they show the same person, in the same "
                "space and contrast?"
            )
        self.anchor = self._to_image_axes(self.gain * z * self.support)
        self._prior_spectrum, self.tau = self.spectrum, tau
        self.spectrum = AnchoredSpectrum(self.spectrum, tau)
        axes = [
            torch.fft.fftfreq(n, d=d)
            for n, d in zip(self.anchor.shape[:2], spacing_mm[:2], strict=True)
        ]
        axes.append(torch.fft.rfftfreq(self.anchor.shape[2], d=spacing_mm[2]))
        squares = [a.square() for a in axes]
        self._frequency = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).sqrt()

    def anchored(self, mean: Tensor, sigma: float) -> Tensor:
        """m'; (i, j, k)."""
        v = self._prior_spectrum.variance(sigma, self._frequency).to(self.device, torch.float32)
        pull = torch.fft.rfftn(self.anchor - mean, norm="ortho") * (v / (v + self.tau**2))
        moved: Tensor = torch.fft.irfftn(pull, s=mean.shape, norm="ortho")
        return mean + moved

    def with_anchor(self, x_t: Tensor, sigma: float) -> tuple[Tensor, float]:
        """x_t and z as one image with white noise, and the SD of that noise."""
        share = sigma**2 / (sigma**2 + self.tau**2)
        return torch.lerp(x_t, self.anchor, share), self.tau * math.sqrt(share)

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """As ``SliceLikelihood.misfit_gradient``, with ``1/2 |x - z|^2 / tau^2``."""
        return super().misfit_gradient(x) + (x - self.anchor) / self.tau**2

    def curvature(self) -> float:
        """As ``SliceLikelihood.curvature``."""
        return super().curvature() + self.tau**-2

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """As ``SliceLikelihood.refine``, from what prior and image say together."""
        super().refine(self.anchored(mean, sigma), sigma, bias=bias, noise=noise)

    def draw(self, mean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """An exact draw from ``N(m, V_sigma) N(z; x, tau^2) N(y; b A x, Sigma)``."""
        return super().draw(self.anchored(mean, sigma), sigma, generator)

    def expect(self, mean: Tensor, sigma: float) -> Tensor:
        """The mean that ``draw`` varies about."""
        return super().expect(self.anchored(mean, sigma), sigma)
