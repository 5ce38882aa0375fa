# SPDX-License-Identifier: Apache-2.0
"""The prior: an EDM denoiser of brain images and the spectrum of its error.

Symbols: ``x`` a clean brain in the engine's unit, ``sigma`` the SD of the white noise added to it,
``D(x + sigma n; sigma)`` the estimate of E[x | x + sigma n] (Tweedie mean). EDM's preconditioning
(arXiv 2206.00364, table 1) is applied to each Haar band with that band's own spread s:

    D = c_skip y + c_out F(c_in y),  c_skip = s² / (sigma² + s²),
    c_out = sigma s / sqrt(sigma² + s²),  c_in = 1 / sqrt(sigma² + s²)
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brainprior_bids.engine.coarse import Coarse
from brainprior_bids.engine.device import usable_device
from brainprior_bids.engine.errors import MemoryShortageError, ShapeMismatchError, UsageError
from brainprior_bids.engine.measured import BandPosteriors, Measured, Padding
from brainprior_bids.engine.memory import out_of_memory
from brainprior_bids.engine.stacks import Stack, mirrored
from brainprior_bids.engine.tiles import network_in_slabs
from brainprior_bids.engine.unet import (
    BANDS,
    CONTRASTS,
    FEATURES,
    UNet,
    coordinate_features,
    from_bands,
    from_blocks,
    to_bands,
)

LOG = logging.getLogger("brainprior.engine")

MIN_TILE = 4
"""Thinnest tile in mm: the two neighbouring rows that a residual block reads."""
LOG_SD = (-8.0, 2.0)
"""Range of the log of the predicted SD relative to the SD of the linear posterior."""
POSITIONS = ((0, 0), (1, 1))
"""Of the blocks of 2 x 2 x 2 voxels on which the network works, in the plane of the slices. Along
their diagonal, two positions gain most of what all four do (docs/models/log.md)."""
FALLBACK_TILES = (64, 32, 16, 8)
"""Tiles that are tried in turn when memory runs out, mm."""


class ErrorSpectrum:
    """V(sigma, |k|): variance of the denoiser's error, by noise level and spatial frequency.

    Orthonormal FFT: white noise of variance s² has V = s² at every frequency.

    Parameters
    ----------
    sigmas : (s,) tensor
        Ascending noise levels, above 0.
    frequencies : (f,) tensor
        Ascending bin centres in cycles per mm.
    variances : (s, f) tensor
        Above 0.

    Raises
    ------
    ShapeMismatchError
        If the three disagree.
    """

    def __init__(self, sigmas: Tensor, frequencies: Tensor, variances: Tensor) -> None:
        if variances.shape != (len(sigmas), len(frequencies)) or variances.numel() == 0:
            raise ShapeMismatchError(
                f"ErrorSpectrum: variances must be ({len(sigmas)}, {len(frequencies)}), "
                f"got {tuple(variances.shape)}."
            )
        if not (
            bool((variances > 0).all())
            and bool((sigmas > 0).all())
            and bool((sigmas.diff() > 0).all())
            and bool((frequencies.diff() > 0).all())
        ):
            raise UsageError(
                "ErrorSpectrum: sigmas and frequencies must ascend; sigmas and variances must be "
                "above 0."
            )
        self.sigmas = sigmas.double().cpu()
        self.frequencies = frequencies.double().cpu()
        # A denoiser must not add noise, and its error must not fall with rising noise.
        bounded = torch.minimum(variances.double().cpu(), self.sigmas[:, None] ** 2)
        self.variances = bounded.cummax(0).values

    @classmethod
    def isotropic(cls, sigma_data: float) -> ErrorSpectrum:
        """White: sigma² sd² / (sigma² + sd²), the error for a white Gaussian prior."""
        sigmas = torch.logspace(-4, 3, 281, dtype=torch.float64)
        v = sigmas**2 * sigma_data**2 / (sigmas**2 + sigma_data**2)
        return cls(sigmas, torch.tensor([0.0, 1.0]), v[:, None].expand(-1, 2))

    def variance(self, sigma: float, frequency: Tensor) -> Tensor:
        """V at each frequency in cycles/mm; the shape, dtype and device of ``frequency``.

        Linear in the logarithms of sigma and V and in the frequency. Below the smallest tabulated
        sigma V falls as sigma²; above the largest it stays; outside the frequencies the nearest
        bin counts.
        """
        if not sigma > 0:
            raise UsageError(f"ErrorSpectrum: sigma must be above 0, got {sigma}.")
        logs, table = self.sigmas.log(), self.variances.log()
        wanted = torch.tensor(float(sigma), dtype=torch.float64).log()
        inside = wanted.clamp(logs[0], logs[-1])
        row = _interpolate(logs, table.T, inside.reshape(1))[:, 0]
        row = row + 2 * (wanted - logs[0]).clamp(max=0)
        k = frequency.detach().double().cpu().abs().reshape(-1)
        values = _interpolate(self.frequencies, row[None], k)[0].exp()
        return values.clamp(max=float(sigma) ** 2).reshape(frequency.shape).to(frequency)


def _interpolate(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """(k,) ascending, (m, k), (p,) -> (m, p): piecewise linear, constant outside."""
    if len(knots) == 1:
        return values.expand(-1, len(at))
    at = at.clamp(knots[0], knots[-1])
    high = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
    share = (at - knots[high - 1]) / (knots[high] - knots[high - 1])
    return values[:, high - 1] * (1 - share) + values[:, high] * share


class Precondition(nn.Module):
    """EDM's preconditioning, per Haar band, around a ``UNet``.

    Parameters
    ----------
    network : UNet
    band_sd : (8,) tensor
        SD of each band over the training data, background included.
    """

    band_sd: Tensor

    def __init__(self, network: UNet, band_sd: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("band_sd", band_sd.reshape(BANDS).float().clone())

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) -> c_skip, c_out, c_in, each (n, 8, 1, 1, 1)."""
        s2 = self.band_sd[None, :, None, None, None] ** 2
        sigma2 = sigma[:, None, None, None, None] ** 2
        total = sigma2 + s2
        return s2 / total, (sigma2 * s2 / total).sqrt(), total.rsqrt()

    def forward(
        self,
        bands: Tensor,
        sigma: Tensor,
        place: Tensor,
        contrast: Tensor,
        posteriors: BandPosteriors = None,
    ) -> Tensor:
        """Noisy bands (n, 8, i, j, k) float32, sigma (n,) -> denoised bands.

        ``posteriors`` has, for each image, the posterior given its measurements, or None.
        """
        return self.estimate(bands, sigma, place, contrast, posteriors, spread=False)[0]

    def estimate(
        self,
        bands: Tensor,
        sigma: Tensor,
        place: Tensor,
        contrast: Tensor,
        posteriors: BandPosteriors = None,
        *,
        spread: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` and, if ``spread``, the predicted SD of its error, (n, 1, 2i, 2j, 2k)."""
        linear, entering, stack, unknown = self._enter(bands, sigma, posteriors)
        e = self.network.embed(sigma.log() / 4, contrast, stack)
        h = self.network.features(entering, place, e, unknown)
        f, log_sd = self.network.answer(h, e, spread=spread)
        clean = self._leave(linear, f, sigma, posteriors)
        return clean, None if log_sd is None else self._sd(log_sd, sigma, posteriors)

    def _sd(self, log_sd: Tensor, sigma: Tensor, posteriors: BandPosteriors) -> Tensor:
        """Predicted SD of each voxel: that of the linear posterior, times the network's factor."""
        left = self.left_open(sigma, posteriors).mean(1).sqrt()
        return left[:, None, None, None, None] * from_blocks(log_sd).clamp(*LOG_SD).exp()

    def left_open(self, sigma: Tensor, posteriors: BandPosteriors) -> Tensor:
        """(n, 8): variance of the linear posterior in each band."""
        rows = self.scales(sigma)[1][:, :, 0, 0, 0]
        if posteriors is not None:
            rows = torch.stack(
                [
                    row if posterior is None else posterior.c_out.to(row)
                    for row, posterior in zip(rows, posteriors, strict=True)
                ]
            )
        return rows.square()

    def _enter(
        self, bands: Tensor, sigma: Tensor, posteriors: BandPosteriors
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The linear estimate, the network's input, and its description of the measurements."""
        c_skip, _, c_in = self.scales(sigma)
        if posteriors is None or all(posterior is None for posterior in posteriors):
            return c_skip * bands, c_in * bands, None, None
        shape = tuple(2 * size for size in bands.shape[2:])
        linear, entering, stack, unknown = [], [], [], []
        for n, posterior in enumerate(posteriors):
            if posterior is None:
                linear.append(c_skip[n] * bands[n])
                entering.append(c_in[n] * bands[n])
                stack.append(bands.new_zeros(FEATURES))
                unknown.append(bands.new_zeros(bands.shape[1:]))
            else:
                linear.append(posterior.estimate(bands[n]))
                entering.append(linear[-1] * posterior.c_in[:, None, None, None])
                stack.append(posterior.features().to(bands))
                unknown.append(to_bands(posterior.unknown_map(shape))[0])
        return (
            torch.stack(linear),
            torch.stack(entering),
            torch.stack(stack),
            torch.stack(unknown),
        )

    def _leave(
        self, linear: Tensor, f: Tensor, sigma: Tensor, posteriors: BandPosteriors
    ) -> Tensor:
        """The linear estimate plus the network's output, scaled by the posterior SD."""
        _, c_out, _ = self.scales(sigma)
        if posteriors is None:
            return linear + c_out * f
        parts = [
            c_out[n] * f[n] if posterior is None else posterior.spread_out(f[n])
            for n, posterior in enumerate(posteriors)
        ]
        return linear + torch.stack(parts)

    def in_slabs(
        self,
        x: Tensor,
        sigma: Tensor,
        coordinates: Tensor,
        contrast: Tensor,
        rows: int,
        posteriors: BandPosteriors = None,
        *,
        spread: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """From noisy to denoised voxels and their SD as ``estimate``, ``rows`` rows at a time.

        Parameters
        ----------
        x : (n, 1, i, j, k) float32
            Noisy; sizes as ``forward`` needs them.
        coordinates : (1, 3, i, j, k)
            MNI305 mm.
        rows : int
            Voxels of a slab along i; see ``tiles``.
        """
        linear, entering, stack, unknown = self._enter(to_bands(x), sigma, posteriors)
        f = torch.empty_like(linear)
        log_sd = torch.empty_like(linear) if spread else None

        def read(start: int, stop: int) -> tuple[Tensor, ...]:
            place = coordinate_features(coordinates[:, :, 2 * start : 2 * stop])
            also = () if unknown is None else (unknown[:, :, start:stop],)
            return entering[:, :, start:stop], place, *also

        size, thick = x.shape[2] // 2, max(rows // 2, 1)
        for start, stop, part, own in network_in_slabs(
            self.network, read, size, sigma.log() / 4, contrast, thick, stack, spread=spread
        ):
            f[:, :, start:stop] = part
            if log_sd is not None and own is not None:
                log_sd[:, :, start:stop] = own
        clean = from_bands(self._leave(linear, f, sigma, posteriors))
        return clean, None if log_sd is None else self._sd(log_sd, sigma, posteriors)


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else None
    return None


class Prior:
    """A trained denoiser with its error spectra and metadata.

    Parameters
    ----------
    model : Precondition
    spectra : mapping
        Contrast -> measured ``ErrorSpectrum``; "unknown" is required.
    metadata : mapping
        The model card's facts, as stored with the weights.
    device : str or torch.device
    dtype : torch.dtype, optional
        Data type of the convolutions; None selects bfloat16 if that is faster (see
        ``fast_dtype``).
    tile_mm : int, optional
        Thickness of the slabs in which the network runs (1 mm voxels, at least ``MIN_TILE``);
        the answer is the same up to rounding, the memory a fraction (see ``tiles``). None runs
        the volume as a whole and falls back to ``FALLBACK_TILES`` when memory runs out.
    coarse : Coarse, optional
        The coarse network that corrects the answers where little is measured.

    Attributes
    ----------
    warnings : list of str
        Fallbacks so far; they hold for all later calls.
    asked_coarse : bool
        Whether the coarse network has corrected an answer so far.

    Raises
    ------
    UsageError
        If there is no spectrum for "unknown", or the tile is too thin.
    """

    def __init__(
        self,
        model: Precondition,
        *,
        spectra: Mapping[str, ErrorSpectrum],
        metadata: Mapping[str, Any],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        tile_mm: int | None = None,
        coarse: Coarse | None = None,
    ) -> None:
        if "unknown" not in spectra:
            raise UsageError(f"Prior: no error spectrum for 'unknown', only for {list(spectra)}.")
        self.tile_mm, self.coarse = tile_mm, coarse
        self.warnings: list[str] = []
        self.asked_coarse = False
        self.device = usable_device(device)
        self.dtype = dtype or fast_dtype(self.device) or torch.float32
        self.model = model.to(self.device).eval()
        for parameter in self.model.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self.metadata = dict(metadata)
        self.sigma_data = float(model.band_sd.square().mean().sqrt())
        self._spectra = dict(spectra)
        self._place: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    @property
    def tile_mm(self) -> int | None:
        """Slab thickness in force; None: volumes go through the network as a whole."""
        return self._tile_mm

    @tile_mm.setter
    def tile_mm(self, value: int | None) -> None:
        if value is not None and value < MIN_TILE:
            raise UsageError(f"Prior: tiles must be at least {MIN_TILE} mm, got {value}.")
        self._tile_mm = value

    def spectrum(self, contrast: str) -> ErrorSpectrum:
        """The error spectrum of one contrast; that of "unknown" where none was measured."""
        return self._spectra.get(contrast, self._spectra["unknown"])

    @property
    def spectra(self) -> dict[str, ErrorSpectrum]:
        """The measured error spectra by contrast."""
        return dict(self._spectra)

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """Positions of the network's blocks whose mean answer is more accurate than one answer."""
        return POSITIONS

    @property
    def takes_stacks(self) -> bool:
        """Whether ``denoise`` can be conditioned on measurements."""
        return bool(self.model.network.config["stacks"])

    @property
    def slices_last(self) -> bool:
        """Whether slices lay along the last axis in training, wherever the brain lay."""
        return bool(self.metadata.get("recipe", {}).get("slices_last", False))

    @property
    def inflation(self) -> float:
        """Factor on the noise that ``conditional`` adds, calibrated on validation data; else 1."""
        return float(self.metadata.get("inflation", 1.0))

    @property
    def takes_holes(self) -> bool:
        """Whether that includes partly hidden scans on the image's own grid."""
        return self.takes_stacks and self.metadata.get("recipe", {}).get("holes", 0) > 0

    @property
    def predicts_spread(self) -> bool:
        """Whether ``estimate`` predicts the SD of its error."""
        return bool(self.model.network.config.get("spread", False))

    def spread_factor(self, contrast: str) -> float:
        """Factor on the predicted SD, calibrated on validation data; else 1."""
        factors = self.metadata.get("spread_factors", {})
        return float(factors.get(contrast, factors.get("unknown", 1.0)))

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
    ) -> Tensor:
        """The estimate of E[clean | x], or of E[clean | x, measured]; see ``estimate``."""
        return self.estimate(
            x, sigma, coordinates=coordinates, contrast=contrast, measured=measured, spread=False
        )[0]

    @torch.no_grad()
    def estimate(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
        spread: bool = True,
        position: tuple[int, int] = (0, 0),
    ) -> tuple[Tensor, Tensor | None]:
        """The estimate of E[clean | x], or of E[clean | x, measured], and the SD of its error.

        Parameters
        ----------
        x : (n, 1, i, j, k) float32
            Clean brain plus white noise of SD ``sigma``, in the engine's unit.
        sigma : float
            Above 0.
        coordinates : (3, i, j, k)
            MNI305 mm of every voxel. Its features are cached while the same tensor object is
            passed.
        contrast : str
            One of ``CONTRASTS``.
        measured : Stack or Voxels, optional
            Measurements of the same brain.
        spread : bool
            Whether to return the SD; the network learned it at the highest noise level only.
        position : (int, int)
            Of the network's blocks of 2 x 2 x 2 voxels in the plane of the slices, 0 or 1 each;
            see ``POSITIONS``.

        Returns
        -------
        mean, SD
            Each (n, 1, i, j, k) float32, on the device of ``x``; the SD is None if it is not
            requested or not predicted by the network.

        Raises
        ------
        ShapeMismatchError, UsageError
            If the arguments do not fit.
        """
        if x.ndim != 5 or x.shape[1] != 1 or coordinates.shape != (3, *x.shape[2:]):
            raise ShapeMismatchError(
                f"Prior: expected x (n, 1, i, j, k) and coordinates (3, i, j, k), got "
                f"{tuple(x.shape)} and {tuple(coordinates.shape)}."
            )
        if contrast not in CONTRASTS:
            raise UsageError(f"Prior: contrast must be one of {CONTRASTS}, got {contrast!r}.")
        if not 0 < sigma < math.inf:
            raise UsageError(f"Prior: sigma must be above 0 and finite, got {sigma}.")
        if not x.is_floating_point():
            raise UsageError(f"Prior: x must be floating point, got {x.dtype}. Convert it first.")
        if measured is not None and not self.takes_stacks:
            raise UsageError(
                "Prior: this network was not trained to be conditioned on measurements. Use the "
                "sampler 'exact', or train with --stacks above 0."
            )
        sigmas = torch.full((len(x),), float(sigma), device=self.device)
        kind = torch.full((len(x),), CONTRASTS.index(contrast), device=self.device)
        spread = spread and self.predicts_spread
        while True:
            try:
                clean, sd = self._run(x, sigmas, coordinates, kind, measured, spread, position)
                clean = self._corrected(clean, x, sigma, coordinates, contrast, measured)
                return clean, None if sd is None else sd * self.spread_factor(contrast)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                message = str(error).partition("\n")[0]
            # outside of the handler, which would keep the failed call's tensors alive
            self._fall_back(message, tuple(x.shape[2:]))

    def _corrected(
        self,
        clean: Tensor,
        x: Tensor,
        sigma: float,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None,
    ) -> Tensor:
        """The answer of both networks, if there is a coarse one."""
        if self.coarse is None:
            return clean
        both = self.coarse.correct(
            clean, x, sigma, coordinates=coordinates, contrast=contrast, measured=measured
        )
        self.asked_coarse |= both is not clean
        return both

    def _run(
        self,
        x: Tensor,
        sigmas: Tensor,
        coordinates: Tensor,
        kind: Tensor,
        measured: Measured | None,
        spread: bool,
        position: tuple[int, int],
    ) -> tuple[Tensor, Tensor | None]:
        axis = 2  # of the image, that the network sees as its last
        if isinstance(measured, Stack) and self.slices_last:
            axis, measured = measured.axis, measured.turned()
        x = x.movedim(2 + axis, -1)
        shape, sigma = x.shape[2:], float(sigmas[0])
        multiple = 2 * self.model.network.multiple
        across = measured.axis if isinstance(measured, Stack) else 2
        first = [*position[:across], 0, *position[across:]]
        padding = [(a, -(a + n) % multiple) for a, n in zip(first, shape, strict=True)]
        noisy = mirrored(x.to(self.device, torch.float32), padding)
        precision = (
            contextlib.nullcontext()
            if self.dtype == torch.float32
            else torch.autocast(self.device.type, self.dtype)
        )
        posteriors = None
        if measured is not None:
            known = measured.padded(padding)
            posteriors = [known.posterior(self.model.band_sd, sigma, self.device)] * len(x)
        with precision:
            if self.tile_mm is None:
                place = self._place_features(coordinates, axis, padding)
                bands, sd = self.model.estimate(
                    to_bands(noisy), sigmas, place, kind, posteriors, spread=spread
                )
                clean = from_bands(bands)
            else:
                mm = coordinates.to(self.device, torch.float32).movedim(1 + axis, -1)
                mm = mirrored(mm[None], padding)
                clean, sd = self.model.in_slabs(
                    noisy, sigmas, mm, kind, self.tile_mm, posteriors, spread=spread
                )

        def back(volume: Tensor) -> Tensor:
            i, j, k = (slice(a, a + n) for a, n in zip(first, shape, strict=True))
            inside = volume[:, :, i, j, k]
            return inside.movedim(-1, 2 + axis).contiguous().to(x.device)

        return back(clean), None if sd is None else back(sd)

    def _fall_back(self, message: str, shape: tuple[int, ...]) -> None:
        """Use the next thinner tile, and add a warning."""
        before = self.tile_mm
        thinner = [t for t in FALLBACK_TILES if before is None or t < before]
        self._place = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not thinner:
            raise MemoryShortageError(
                f"Prior: out of memory for an image of {shape} voxels even in tiles of {before} "
                f"mm ({message}). Free memory, or run on a machine with more."
            )
        self.tile_mm = thinner[0]
        how = "as a whole" if before is None else f"in tiles of {before} mm"
        warning = (
            f"Out of memory: the network did not run {how} on {shape} voxels ({message}); it "
            f"runs in tiles of {thinner[0]} mm from here on, with the same result up to rounding."
        )
        LOG.warning(warning)
        self.warnings.append(warning)

    def _place_features(self, coordinates: Tensor, axis: int, padding: Padding) -> Tensor:
        how = (axis, *padding)
        if self._place is None or self._place[0] is not coordinates or self._place[1] != how:
            mm = coordinates.to(self.device, torch.float32).movedim(1 + axis, -1)
            features = coordinate_features(mirrored(mm[None], padding))
            features = features.contiguous(memory_format=torch.channels_last_3d)
            self._place = coordinates, how, features
        return self._place[2]
