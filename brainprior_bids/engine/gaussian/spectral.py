# SPDX-License-Identifier: Apache-2.0
"""Slices along a grid axis under a spectral covariance, one in-plane frequency at a time.

Symbols ------- z, a, b : the slice axis and the two in-plane axes of the 1 mm image (in this
order) W : (s, z) slice profile P : in-plane k-space crop (na, nb) -> (ma, mb), diagonal in k:
``scale * exp(i phase)`` A = P W : the scanner's operator V_sigma : covariance of the denoiser's
error, diagonal in 3-D k with values V(sigma, |k|) V_q, G_q : V at one in-plane frequency as a (z,
z) matrix, and ``scale^2 W V_q W^T`` (s, s)

V depends on the in-plane frequency only through its radius. Radii are grouped into bins, each
represented by one radius. This is again a valid covariance, which the draw and the solve share, so
that only V itself is approximated. A bin costs one small matrix in float64 and one matrix product
with all its frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from brainprior_bids.engine.errors import ShapeMismatchError
from brainprior_bids.engine.operators.fourier import kept_frequencies


class Spectrum(Protocol):
    """V(sigma, |k|): variance of the denoiser's error per frequency, orthonormal FFT."""

    def variance(self, sigma: float, frequency: Tensor) -> Tensor:
        """Same shape as ``frequency`` (cycles per mm)."""
        ...


@dataclass(frozen=True)
class LevelFactors:
    """Matrices of one noise level, per bin q (all on the solver's device)."""

    root: Tensor  # (q, z, z) V_q^1/2
    gain: Tensor  # (q, z, s) scale V_q W^T
    exact_covariance: Tensor  # (q, s, s) float64, on the CPU: G_q
    covariance: Tensor  # the same in float32
    inverse: Tensor  # (q, s, s) (G_q + noise)^-1
    noise_variance: float


class SpectralSolver:
    """Products with ``V^1/2``, ``V A^T``, ``A V A^T`` and ``(A V A^T + s^2)^-1``.

    Parameters
    ----------
    slice_weights : (s, z) tensor
        The slice profile.
    image_shape : (z, a, b)
        The 1 mm image, slice axis first.
    data_shape : (s, ma, mb)
        The scan; ``ma <= a`` and ``mb <= b``.
    spacing_mm : (z, a, b)
        Voxel size of the image.
    n_bins : int
        Maximum number of radii; fewer if the grid has fewer different ones.

    Raises
    ------
    ShapeMismatchError
        If slice_weights and shapes disagree.
    """

    def __init__(
        self,
        slice_weights: Tensor,
        image_shape: tuple[int, int, int],
        data_shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        *,
        n_bins: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        if tuple(slice_weights.shape) != (data_shape[0], image_shape[0]):
            raise ShapeMismatchError(
                f"SpectralSolver: slice_weights must be {(data_shape[0], image_shape[0])}, "
                f"got {tuple(slice_weights.shape)}."
            )
        self.device = torch.device(device)
        self.image_shape, self.data_shape = image_shape, data_shape
        self.slice_weights64 = slice_weights.to("cpu", torch.float64)
        self.slice_weights = self.slice_weights64.to(self.device, torch.float32)
        nz, na, nb = image_shape
        _, ma, mb = data_shape
        self.same_plane = (na, nb) == (ma, mb)
        self.scale = math.sqrt(ma * mb / (na * nb))
        self.frequency_z = torch.fft.fftfreq(nz, d=spacing_mm[0], dtype=torch.float64)

        fa = torch.fft.fftfreq(na, d=spacing_mm[1], dtype=torch.float64)
        fb = torch.fft.rfftfreq(nb, d=spacing_mm[2], dtype=torch.float64)
        radius = (fa[:, None] ** 2 + fb**2).sqrt().flatten()
        bins, self.radii = _radius_bins(radius, n_bins)
        self._column = torch.argsort(bins, stable=True)  # sorted position -> half-plane column
        self._starts = _starts(bins[self._column], len(self.radii))
        # A draw of white noise in the half plane: columns that are their own mirror image keep
        # only their real part after the inverse transform over a, hence twice the variance.
        own = torch.zeros(nb // 2 + 1, dtype=torch.bool)
        own[0] = True
        own[-1] |= nb % 2 == 0
        self._self_columns = own.nonzero().flatten()
        weight = torch.where(own, 1.0, math.sqrt(0.5)).expand(na, -1).flatten()
        self._white = weight[self._column].repeat_interleave(2).to(self.device, torch.float32)

        ka, kb = kept_frequencies(na, ma), kept_frequencies(nb, mb)
        kb = kb[kb >= 0] if mb < nb else torch.arange(mb // 2 + 1)
        in_data = ((ka % ma)[:, None] * (mb // 2 + 1) + kb).flatten()
        in_image = ((ka % na)[:, None] * (nb // 2 + 1) + kb).flatten()
        rank = torch.empty_like(self._column)
        rank[self._column] = torch.arange(len(rank))
        position = rank[in_image]
        order = torch.argsort(position)
        self._data_column = in_data[order].to(self.device)
        self._data_position = position[order].to(self.device)
        self._data_starts = _starts(bins[in_image[order]], len(self.radii))
        shift_a, shift_b = 0.5 / ma - 0.5 / na, 0.5 / mb - 0.5 / nb
        angle = 2 * math.pi * (ka.double()[:, None] * shift_a + kb * shift_b).flatten()[order]
        twice = torch.full((mb // 2 + 1,), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if mb % 2 == 0:
            twice[-1] = 1.0
        per_bin = torch.zeros(len(self.radii), dtype=torch.float64)
        multiplicity = twice[in_data % (mb // 2 + 1)]
        self._bin_counts = per_bin.index_add_(0, bins[in_image], multiplicity)
        self._phase = torch.polar(torch.ones_like(angle), angle).to(self.device, torch.complex64)
        self._column = self._column.to(self.device)

    # ---- one noise level -------------------------------------------------------------------

    def factors(self, spectrum: Spectrum, sigma: float, noise_variance: float) -> LevelFactors:
        """The small matrices of level ``sigma`` for white noise of that variance in the data."""
        frequency = (self.radii[:, None] ** 2 + self.frequency_z**2).sqrt()
        variance = spectrum.variance(sigma, frequency).to("cpu", torch.float64).clamp_min(1e-12)
        root = _circulant(variance.sqrt())
        gain = self.scale * (_circulant(variance) @ self.slice_weights64.mT)
        covariance = self.scale * (self.slice_weights64 @ gain)
        covariance = 0.5 * (covariance + covariance.mT)
        return self._with_noise(root, gain, covariance, noise_variance)

    def renoise(self, factors: LevelFactors, noise_variance: float) -> LevelFactors:
        """The same level with another noise variance."""
        return self._with_noise(
            factors.root, factors.gain, factors.exact_covariance, noise_variance
        )

    def _with_noise(
        self, root: Tensor, gain: Tensor, covariance: Tensor, noise_variance: float
    ) -> LevelFactors:
        eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance + noise_variance * eye))
        return LevelFactors(
            self._single(root),
            self._single(gain),
            covariance,
            self._single(covariance),
            self._single(inverse),
            noise_variance,
        )

    def _single(self, matrices: Tensor) -> Tensor:
        return matrices.to(self.device, torch.float32)

    # ---- k-space of the data ---------------------------------------------------------------

    def data_to_k(self, y: Tensor) -> Tensor:
        """(s, ma, mb) real -> (s, f) complex: the frequencies that A measures, by bin."""
        k: Tensor = torch.fft.rfft2(y, norm="ortho").flatten(1)
        return k.index_select(1, self._data_column)

    def k_to_data(self, k: Tensor) -> Tensor:
        """The adjoint of ``data_to_k`` (its inverse on those frequencies)."""
        _, ma, mb = self.data_shape
        full = torch.zeros(k.shape[0], ma * (mb // 2 + 1), dtype=k.dtype, device=k.device)
        full.index_copy_(1, self._data_column, k)
        y: Tensor = torch.fft.irfft2(full.view(-1, ma, mb // 2 + 1), s=(ma, mb), norm="ortho")
        return y

    def _k_to_image(self, k: Tensor) -> Tensor:
        nz, na, nb = self.image_shape
        full = torch.empty(nz, na * (nb // 2 + 1), dtype=k.dtype, device=k.device)
        full.index_copy_(1, self._column, k)
        half = torch.fft.ifft(full.view(nz, na, nb // 2 + 1), dim=1, norm="ortho")
        torch.view_as_real(half)[:, :, self._self_columns, 1] = 0.0
        image: Tensor = torch.fft.irfft(half, n=nb, dim=2, norm="ortho")
        return image

    @staticmethod
    def _by_bin(matrices: Tensor, k: Tensor, starts: list[int]) -> Tensor:
        """Multiply the (rows, f) complex columns of bin q by matrices[q]."""
        flat = torch.view_as_real(k).flatten(1)  # (rows, 2 f)
        out = torch.empty(matrices.shape[1], flat.shape[1], dtype=flat.dtype, device=flat.device)
        for q, (start, stop) in enumerate(pairwise(starts)):
            if stop > start:
                torch.mm(
                    matrices[q], flat[:, 2 * start : 2 * stop], out=out[:, 2 * start : 2 * stop]
                )
        return torch.view_as_complex(out.view(matrices.shape[1], -1, 2))

    # ---- products --------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """``A x``: (z, a, b) -> (s, ma, mb)."""
        thick = (self.slice_weights @ x.flatten(1)).view(-1, *x.shape[1:])
        if self.same_plane:
            return thick
        k = torch.fft.rfft2(thick, norm="ortho").flatten(1)
        k = k.index_select(1, self._column[self._data_position])
        return self.k_to_data(k * (self._phase * self.scale))

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``: (s, ma, mb) -> (z, a, b)."""
        if not self.same_plane:
            _, na, nb = self.image_shape
            k = self.data_to_k(y) * (self._phase.conj() * self.scale)
            full = torch.zeros(y.shape[0], na * (nb // 2 + 1), dtype=k.dtype, device=k.device)
            full.index_copy_(1, self._column[self._data_position], k)
            y = torch.fft.irfft2(full.view(-1, na, nb // 2 + 1), s=(na, nb), norm="ortho")
        return (self.slice_weights.mT @ y.flatten(1)).view(-1, *y.shape[1:])

    def covariance(self, factors: LevelFactors, u: Tensor) -> Tensor:
        """``A V A^T u``."""
        k = self._by_bin(factors.covariance, self.data_to_k(u), self._data_starts)
        return self.k_to_data(k)

    def precondition(self, factors: LevelFactors, r: Tensor) -> Tensor:
        """``(A V A^T + noise)^-1 r`` for white noise."""
        k = self.data_to_k(r)
        solved = self._by_bin(factors.inverse, k, self._data_starts)
        if self.same_plane:
            return self.k_to_data(solved)
        # frequencies outside the range of A contain noise only
        solved.sub_(k / factors.noise_variance)
        return self.k_to_data(solved) + r / factors.noise_variance

    def mean_variance(self, factors: LevelFactors) -> float:
        """Mean eigenvalue of ``A V A^T``: the variance that V gives a data voxel."""
        trace = factors.exact_covariance.diagonal(dim1=1, dim2=2).sum(1)
        s, ma, mb = self.data_shape
        return float(self._bin_counts @ trace) / (s * ma * mb)

    def inverse_traces(self, factors: LevelFactors) -> tuple[float, float]:
        """Traces of ``(A V A^T + noise)^-1`` and of its square."""
        s, ma, mb = self.data_shape
        inverse = factors.inverse.to("cpu", torch.float64)
        n_unmeasured = s * (ma * mb - float(self._bin_counts.sum()))
        noise = factors.noise_variance
        trace = self._bin_counts @ inverse.diagonal(dim1=1, dim2=2).sum(1)
        squared = self._bin_counts @ inverse.square().sum((1, 2))
        return float(trace) + n_unmeasured / noise, float(squared) + n_unmeasured / noise**2

    def draw_prior(
        self, factors: LevelFactors, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A draw v ~ N(0, V) in k-space, and ``A v``.

        The white noise comes from ``generator`` on the CPU, directly in the half plane.
        """
        nz = self.image_shape[0]
        white = torch.randn(nz, 2 * len(self._column), generator=generator).to(self.device)
        white *= self._white
        k = self._by_bin(factors.root, torch.view_as_complex(white.view(nz, -1, 2)), self._starts)
        data_k = k if self.same_plane else k.index_select(1, self._data_position)
        flat = torch.view_as_real(data_k.contiguous()).flatten(1)
        thick = torch.view_as_complex((self.slice_weights @ flat).view(self.data_shape[0], -1, 2))
        s, ma, mb = self.data_shape
        thick = thick * (self._phase * self.scale)
        full = torch.zeros(s, ma * (mb // 2 + 1), dtype=thick.dtype, device=self.device)
        full.index_copy_(1, self._data_column, thick)
        half = torch.fft.ifft(full.view(s, ma, mb // 2 + 1), dim=1, norm="ortho")
        own = self._self_columns if self.same_plane else self._self_columns[:1]
        torch.view_as_real(half)[:, :, own, 1] = 0.0
        return k, torch.fft.irfft(half, n=mb, dim=2, norm="ortho")

    def no_deviation(self) -> Tensor:
        """v = 0 in k-space, for ``correct``."""
        return torch.zeros(
            self.image_shape[0], len(self._column), dtype=torch.complex64, device=self.device
        )

    def correct(self, factors: LevelFactors, prior_k: Tensor, u: Tensor) -> Tensor:
        """``v + V A^T u`` as an image; ``prior_k`` is v in k-space and is overwritten."""
        k = self.data_to_k(u) * self._phase.conj()
        update = self._by_bin(factors.gain, k, self._data_starts)
        if self.same_plane:
            prior_k += update
        else:
            prior_k.index_add_(1, self._data_position, update)
        return self._k_to_image(prior_k)


def _radius_bins(radius: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Bin index of each radius, and the RMS radius of each bin (float64)."""
    exact, index = torch.unique((radius * 1e9).round(), return_inverse=True)
    if len(exact) > n_bins:
        index = (radius / radius.max() * (n_bins - 1)).round().long()
        _, index = torch.unique(index, return_inverse=True)
    n = int(index.max()) + 1
    count = torch.zeros(n, dtype=torch.float64).index_add_(0, index, torch.ones_like(radius))
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, index, radius**2)
    return index, (total / count).sqrt()


def _starts(sorted_bins: Tensor, n: int) -> list[int]:
    counts = torch.bincount(sorted_bins, minlength=n)
    return [0, *counts.cumsum(0).tolist()]


def _circulant(spectrum: Tensor) -> Tensor:
    """(q, z) real even spectra -> (q, z, z) circulant matrices."""
    n = spectrum.shape[-1]
    first: Tensor = torch.fft.ifft(spectrum, dim=-1).real
    index = (torch.arange(n)[:, None] - torch.arange(n)) % n
    return first[:, index]
