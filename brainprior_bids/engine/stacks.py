# SPDX-License-Identifier: Apache-2.0
"""The linear posterior given a stack of slices and a noisy image, before any network call.

``y = W x + n`` along one axis and ``x_t = x + sigma e``. For a linear measurement with Gaussian
noise, the pair (x_t, y) carries the same information about x as one image u = x + N(0, C), whose
noise C is small in measured directions and sigma² elsewhere (the idea of EPS: a prior trained on
anisotropic noise needs no approximation of the likelihood). A network that has learned ``E[x |
u]`` for such C therefore returns ``E[x | x_t, y]``.

As in EDM for white noise, the network receives the linear estimate and returns the remainder. With
band b of variance s_b² (Haar bands of 2 x 2 x 2 voxels, uncorrelated):

    w = E[x | x_t, y],  K = Cov[x | x_t, y]        under N(0, diag s_b²)
    D = w + K^1/2 F(w_b / sd of w_b)

which is EDM's preconditioning where nothing was measured. K^1/2 preserves the measurements: in
measured directions the network can change w by no more than the noise of the scan. All matrices
are along the slice axis, one for each of the four in-plane band combinations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.errors import InputError, ShapeMismatchError
from brainprior_bids.engine.measured import Padding
from brainprior_bids.engine.unet import from_bands, to_bands


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack of slices.

    Parameters
    ----------
    y : float32 tensor
        Shape of the image, except along ``axis``, which counts slices; engine unit, bias-free.
    slice_weights : (n_slices, n) float64 tensor
        The slice profile: row k is the share of each voxel along ``axis`` in slice k.
    axis : 0, 1 or 2
    noise_sd : float
        Noise SD of a voxel of y; with ``kept`` below 1, that of white noise with the same power at
        the measured frequencies.
    kept : (float, float)
        Fraction of the spatial frequencies that was measured along the two in-plane axes, in
        ascending order; y is zero at the others.

    Raises
    ------
    InputError
        If the noise SD is not above 0.
    ShapeMismatchError
        If y and the slice weights disagree.
    """

    y: Tensor
    slice_weights: Tensor
    axis: int
    noise_sd: float
    kept: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_sd) and self.noise_sd > 0):
            raise InputError(f"Stack: noise SD must be above 0, got {self.noise_sd}.")
        if self.y.ndim != 3 or self.y.shape[self.axis] != len(self.slice_weights):
            raise ShapeMismatchError(
                f"Stack: y of shape {tuple(self.y.shape)} does not hold {len(self.slice_weights)} "
                f"slices along axis {self.axis}."
            )

    def features(self) -> Tensor:
        """(8,): 1, log spacing, log width (in voxels), log noise, axis one-hot, log kept."""
        w = self.slice_weights
        place = torch.arange(w.shape[1], dtype=w.dtype)
        total = w.sum(1).clamp_min(1e-9)
        whole = total > 0.9 * total.max()  # not cut by the end of the image
        centre = (w.square() @ place) / w.square().sum(1).clamp_min(1e-18)
        variance = (w @ place**2) / total - ((w @ place) / total) ** 2 + 1 / 12
        spacing = centre[whole].diff().median() if int(whole.sum()) > 1 else centre.new_tensor(8.0)
        width = variance[whole].median().clamp_min(1 / 12).sqrt() * 2.355
        if float(w.min()) < -0.01:  # sinc-shaped slices of a 3-D scan have no variance
            width = spacing
        row = [1.0, math.log(float(spacing)), math.log(float(width)), math.log(self.noise_sd) / 4]
        row += [float(self.axis == a) for a in range(3)]
        return torch.tensor([*row, math.log(self.kept[0] * self.kept[1])])

    def turned(self) -> Stack:
        """The same with the slices along the last axis; the other two keep their order."""
        y = self.y.movedim(self.axis, 2)
        return Stack(y, self.slice_weights, 2, self.noise_sd, self.kept)

    def posterior(
        self, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> StackPosterior:
        """See ``measured.Measured``."""
        return StackPosterior(self, band_sd, sigma, device)

    def padded(self, padding: Padding) -> Stack:
        """See ``measured.Measured``; in plane, the slices are extended by mirroring."""
        plane = list(padding)
        slice_weights = F.pad(self.slice_weights, plane[self.axis])
        plane[self.axis] = (0, 0)
        y = mirrored(self.y[None, None], plane)[0, 0]
        return Stack(y, slice_weights, self.axis, self.noise_sd, self.kept)

    @property
    def whole_plane(self) -> bool:
        """Whether every spatial frequency in the plane was measured."""
        return self.kept == (1.0, 1.0)


def keep(volume: Tensor, axis: int, kept: tuple[float, float]) -> Tensor:
    """The part of a volume (i, j, k) that lies at the measured frequencies of the plane."""
    plane = [a for a in range(3) if a != axis]
    k = torch.fft.rfftn(volume, dim=plane)
    first = torch.fft.fftfreq(volume.shape[plane[0]]).abs() <= 0.5 * kept[0]
    second = torch.fft.rfftfreq(volume.shape[plane[1]]) <= 0.5 * kept[1]
    shape = [1, 1, 1]
    shape[plane[0]] = len(first)
    k = k * first.to(volume).reshape(shape)
    shape = [1, 1, 1]
    shape[plane[1]] = len(second)
    k = k * second.to(volume).reshape(shape)
    measured: Tensor = torch.fft.irfftn(k, s=[volume.shape[a] for a in plane], dim=plane)
    return measured


def _share_of_bands(kept: tuple[float, float]) -> Tensor:
    """(4,): part of each in-plane combination of bands that lies at measured frequencies."""
    frequency = (torch.arange(512, dtype=torch.float64) + 0.5) / 1024  # 0 to 0.5 per voxel
    low = (torch.pi * frequency).cos().square()
    one = []
    for share in kept:
        inside = frequency <= 0.5 * share
        one.append([float((b * inside).sum() / b.sum()) for b in (low, 1 - low)])
    return torch.tensor([one[0][a] * one[1][b] for a in range(2) for b in range(2)])


def columns(bands: Tensor, axis: int) -> Tensor:
    """(8, i, j, k) bands -> (4, n, q): in-plane combination, along the axis, in-plane place.

    Along the axis the low and the high band alternate.
    """
    bits = bands.reshape(2, 2, 2, *bands.shape[1:])
    others = [a for a in range(3) if a != axis]
    order = [*others, 3 + axis, axis, *(3 + a for a in others)]
    return bits.permute(order).reshape(4, 2 * bands.shape[1 + axis], -1)


def from_columns(lines: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``columns``; ``shape`` is (i, j, k) of the bands."""
    others = [a for a in range(3) if a != axis]
    apart = lines.reshape(2, 2, shape[axis], 2, *(shape[a] for a in others))
    order = [*others, 3 + axis, axis, *(3 + a for a in others)]
    back = [order.index(dim) for dim in range(6)]
    return apart.permute(back).reshape(8, *shape)


def _pair(like: Tensor) -> Tensor:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=like.dtype, device=like.device) / 2**0.5


def slice_columns(y: Tensor, axis: int) -> Tensor:
    """(…) slices -> (4, n_slices, q): their in-plane Haar bands, as ``columns`` orders them."""
    stack = y.movedim(axis, 0)
    n, a, b = stack.shape
    blocks = stack.reshape(n, a // 2, 2, b // 2, 2)
    pair = _pair(y)
    return torch.einsum("naubv,cu,dv->cdnab", blocks, pair, pair).reshape(4, n, -1)


def mirrored(x: Tensor, padding: Padding) -> Tensor:
    """(…, i, j, k) with the ends of each axis extended by mirroring, which preserves the noise."""
    if not any(map(any, padding)):
        return x
    fits = all(max(both) < size for both, size in zip(padding, x.shape[2:], strict=True))
    ends = [end for both in reversed(padding) for end in both]
    return F.pad(x, ends, mode="reflect" if fits else "replicate")


class StackPosterior:
    """A stack at one noise level: the linear estimate w and its posterior covariance K.

    A ``measured.BandPosterior``.

    Parameters
    ----------
    stack : Stack
    band_sd : (8,) tensor
        s_b.
    sigma : float
        Noise of x_t.
    device : torch.device
        Where the images are; the matrices are made in float64 on the CPU.
    """

    def __init__(
        self, stack: Stack, band_sd: Tensor, sigma: float, device: torch.device | str = "cpu"
    ) -> None:
        self.stack, self.sigma = stack, float(sigma)
        axis, w = stack.axis, stack.slice_weights.double().cpu()
        n = w.shape[1]
        square = columns(band_sd.double().cpu().square().reshape(8, 1, 1, 1), axis)[..., 0]
        square = square.repeat(1, n // 2)  # (4, n)
        skip = square / (square + sigma**2)
        left = skip * sigma**2  # of x_t alone
        haar = (w.reshape(len(w), n // 2, 2) @ _pair(w)).reshape(len(w), n)
        spread = haar * left[:, None, :]  # (4, n_slices, n)
        inner = spread @ haar.T + stack.noise_sd**2 * torch.eye(len(w), dtype=w.dtype)
        gain = torch.linalg.solve(inner, spread).mT  # (4, n, n_slices)
        k = torch.diag_embed(left) - gain @ spread
        values, vectors = torch.linalg.eigh(0.5 * (k + k.mT))
        root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
        share = _share_of_bands(stack.kept).to(w)[:, None]
        self.variance = share * k.diagonal(dim1=1, dim2=2) + (1 - share) * left  # (4, n)
        explained = (square - self.variance).clamp_min(0)

        def of_bands(rows: Tensor) -> Tensor:
            means = rows.reshape(4, n // 2, 2).mean(1)  # (4, 2)
            return from_columns(means[..., None], axis, (1, 1, 1)).reshape(8)

        self.c_out = of_bands(self.variance).sqrt().float().to(device)
        self.c_in = of_bands(explained).clamp_min(1e-24).rsqrt().float().to(device)
        self.skip = skip.float()[..., None].to(device)
        self.alone = (
            left.sqrt().float()[..., None].to(device)
        )  # root of K at unmeasured frequencies
        self.slice_weights = w.float().to(device)
        self.gain, self.root = gain.float().to(device), root.float().to(device)
        ratio = w @ w.T + (stack.noise_sd / self.sigma) ** 2 * torch.eye(len(w), dtype=w.dtype)
        known = (w * torch.linalg.solve(ratio, w)).sum(0) * stack.kept[0] * stack.kept[1]
        self.unknown = (1 - known).clamp(0, 1).sqrt().float().to(device)  # (n,)

    def features(self) -> Tensor:
        """(8,): those of the stack."""
        return self.stack.features()

    def estimate(self, noisy: Tensor) -> Tensor:
        """(8, i, j, k) bands of x_t -> those of w."""
        axis, shape = self.stack.axis, tuple(noisy.shape[1:])
        with torch.autocast(noisy.device.type, enabled=False):  # bfloat16 is coarser than a scan
            alone = from_columns(self.skip * columns(noisy.float(), axis), axis, shape)
            image = from_bands(alone[None])[0, 0]
            prediction = torch.tensordot(self.slice_weights, image, dims=([1], [axis])).movedim(
                0, axis
            )
            rest = self._measured(self.stack.y.to(prediction) - prediction)
            more = from_columns(self.gain @ slice_columns(rest, axis), axis, shape)
            return alone + self._measured_bands(more)

    def spread_out(self, unit: Tensor) -> Tensor:
        """(8, i, j, k) -> K^1/2 of it."""
        axis, shape = self.stack.axis, tuple(unit.shape[1:])
        with torch.autocast(unit.device.type, enabled=False):
            lines = columns(unit.float(), axis)
            spread = from_columns(self.root @ lines, axis, shape)
            if self.stack.whole_plane:
                return spread
            alone = from_columns(self.alone * lines, axis, shape)
            return alone + self._measured_bands(spread - alone)

    def _measured(self, volume: Tensor) -> Tensor:
        if self.stack.whole_plane:
            return volume
        return keep(volume, self.stack.axis, self.stack.kept)

    def _measured_bands(self, bands: Tensor) -> Tensor:
        if self.stack.whole_plane:
            return bands
        return to_bands(self._measured(from_bands(bands[None])[0, 0])[None, None])[0]

    def unknown_map(self, shape: tuple[int, ...]) -> Tensor:
        """(1, 1, i, j, k): the remaining fraction of a voxel's noise, sqrt(C) / sigma."""
        view = [1] * 3
        view[self.stack.axis] = len(self.unknown)
        whole: Tensor = self.unknown.reshape(1, 1, *view).expand(1, 1, *shape)
        return whole
