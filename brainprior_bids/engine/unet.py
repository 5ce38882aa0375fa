# SPDX-License-Identifier: Apache-2.0
"""A residual U-Net over orthonormal 2 x 2 x 2 bands.

The image enters as its eight Haar bands: a pixel-unshuffle by 2 followed by an orthonormal 8 x 8
mix of the eight channels, so white noise stays white and every convolution runs on an eighth of
the voxels. The local mean (band 0) is separated from the seven detail bands, whose amplitude is
some thirty times smaller, so that each band can be scaled by its own SD. No operation uses a
statistic over space: normalisation is per voxel, over channels, so a crop, a tile and a whole
brain are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDS = 8
FEATURES = 8
"""Numbers that describe a stack of slices to the network (``stacks.Stack.features``)."""
CONTRASTS = ("T1w", "T2w", "FLAIR", "unknown")
WAVELENGTHS_MM = (320.0, 160.0, 80.0, 40.0)


def haar_matrix() -> Tensor:
    """(8, 8) orthonormal: row b mixes the 2 x 2 x 2 voxels (i, j, k order) into band b."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    return torch.kron(pair, torch.kron(pair, pair)).float()


def to_bands(x: Tensor) -> Tensor:
    """(n, 1, i, j, k), even sizes -> (n, 8, i/2, j/2, k/2), orthonormal."""
    n, _, i, j, k = x.shape
    blocks = x.reshape(n, i // 2, 2, j // 2, 2, k // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    with torch.autocast(x.device.type, enabled=False):  # which would round the image
        bands = blocks.reshape(n, i // 2, j // 2, k // 2, BANDS) @ haar_matrix().to(x).T
    return bands.permute(0, 4, 1, 2, 3)  # channels last in memory


def from_bands(bands: Tensor) -> Tensor:
    """The inverse, and the transpose, of ``to_bands``."""
    n, _, i, j, k = bands.shape
    with torch.autocast(bands.device.type, enabled=False):
        blocks = bands.permute(0, 2, 3, 4, 1) @ haar_matrix().to(bands)
    voxels = blocks.reshape(n, i, j, k, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    return voxels.reshape(n, 1, 2 * i, 2 * j, 2 * k)


def from_blocks(blocks: Tensor) -> Tensor:
    """(n, 8, i, j, k), each block's voxels in i, j, k order -> (n, 1, 2i, 2j, 2k)."""
    n, _, i, j, k = blocks.shape
    apart = blocks.reshape(n, 2, 2, 2, i, j, k).permute(0, 4, 1, 5, 2, 6, 3)
    return apart.reshape(n, 1, 2 * i, 2 * j, 2 * k)


def coordinate_features(coordinates: Tensor) -> Tensor:
    """(n, 3, i, j, k) mm, even sizes -> (n, 27, i/2, j/2, k/2), low Fourier features.

    One position for each 2 x 2 x 2 block; positions beyond 160 mm are not distinguished.
    """
    centre = F.avg_pool3d(coordinates, 2).clamp(-160, 160)
    angles = [centre * (2 * math.pi / wavelength) for wavelength in WAVELENGTHS_MM]
    return torch.cat(
        [centre / 100, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))], 1
    )


COORDINATE_FEATURES = 3 * (1 + 2 * len(WAVELENGTHS_MM))


def _zero(layer: nn.Module) -> None:
    """Start a layer at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def modulated(x: Tensor, film: Tensor) -> Tensor:
    """(n, c, i, j, k) normalised over channels, times 1 + scale, plus shift.

    ``film`` (n, 2 c) holds both. The norm's own affine applies them, in one pass over memory.
    """
    scale, shift = film.float().chunk(2, 1)
    last = x.permute(0, 2, 3, 4, 1)
    return torch.stack(
        [
            F.layer_norm(item, item.shape[-1:], (1 + scale[n]).to(x.dtype), shift[n].to(x.dtype))
            for n, item in enumerate(last)
        ]
    ).permute(0, 4, 1, 2, 3)


class Block(nn.Module):
    """x + conv(silu(conv(film(norm(x))))); the last convolution starts at zero."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        _zero(self.film)
        _zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, i, j, k), (n, e) -> (n, c, i, j, k)."""
        normed = modulated(x, self.film(embedding))
        h: Tensor = self.conv2(F.silu(self.conv1(normed)))
        return x + h


class SpreadOutput(nn.Module):
    """conv(silu(conv(film(norm(x))))) plus an offset from the conditioning; starts at zero."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, BANDS, 1)
        self.level = nn.Linear(embedding, BANDS)
        for layer in (self.film, self.conv2, self.level):
            _zero(layer)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, i, j, k), (n, e) -> (n, 8, i, j, k)."""
        h = self.conv2(F.silu(self.conv1(modulated(x, self.film(embedding)))))
        result: Tensor = h + self.level(embedding)[:, :, None, None, None]
        return result


class UNet(nn.Module):
    """Scaled bands, features of position, noise level and contrast -> (n, 8, i, j, k).

    Parameters
    ----------
    channels : sequence of int
        Width at each resolution: 2 mm, 4 mm, 8 mm, ….
    blocks : sequence of int
        Residual blocks at each resolution, on the way down and again on the way up; at the
        coarsest only once.
    embedding : int
        Width of the conditioning vector.
    stacks : bool
        Whether it can be conditioned on measured slices.
    stack_hidden : int
        Hidden width of a second, nonlinear layer for the numbers that describe them; 0: none.
    spread : bool
        Whether a second output predicts the SD of the first one's error.
    """

    frequencies: Tensor

    def __init__(
        self,
        channels: Sequence[int] = (48, 96, 128),
        blocks: Sequence[int] = (1, 2, 2),
        embedding: int = 128,
        stacks: bool = False,
        stack_hidden: int = 0,
        spread: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": list(channels),
            "blocks": list(blocks),
            "embedding": embedding,
            "stacks": stacks,
        }
        if stack_hidden:
            self.config["stack_hidden"] = stack_hidden
        if spread:
            self.config["spread"] = spread
        self.multiple = 2 ** (len(channels) - 1)
        self.image_in = nn.Conv3d(BANDS, channels[0], 3, padding=1)
        self.place_in = nn.Conv3d(COORDINATE_FEATURES, channels[0], 1)
        if stacks:
            self.unknown_in = nn.Conv3d(BANDS, channels[0], 1, bias=False)
            self.stack_in = nn.Linear(FEATURES, embedding, bias=False)
            _zero(self.unknown_in)
            _zero(self.stack_in)
            if stack_hidden:  # without biases, so that the output is 0 without slices
                reading = nn.Linear(FEATURES, stack_hidden, bias=False)
                nn.init.normal_(reading.weight)
                answer = nn.Linear(stack_hidden, embedding, bias=False)
                _zero(answer)
                self.stack_more = nn.Sequential(reading, nn.SiLU(), answer)
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0, math.log(64), 32)) / 4, persistent=False
        )
        self.noise_in = nn.Sequential(
            nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.contrast_in = nn.Embedding(len(CONTRASTS), embedding)
        nn.init.normal_(self.contrast_in.weight, std=0.5)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for depth, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            self.down_blocks.append(nn.ModuleList(Block(width, embedding) for _ in range(count)))
            if depth < len(channels) - 1:
                self.up_blocks.append(nn.ModuleList(Block(width, embedding) for _ in range(count)))
                self.downs.append(nn.Conv3d(width, channels[depth + 1], 2, stride=2))
                self.ups.append(nn.ConvTranspose3d(channels[depth + 1], width, 2, stride=2))
        self.out = nn.Conv3d(channels[0], BANDS, 3, padding=1)
        _zero(self.out)
        if spread:
            self.spread_out = SpreadOutput(channels[0], embedding)

    def embed(self, noise: Tensor, contrast: Tensor, stack: Tensor | None = None) -> Tensor:
        """The conditioning vector, (n, embedding)."""
        angle = noise[:, None] * self.frequencies * 2 * math.pi
        e = self.noise_in(torch.cat([angle.sin(), angle.cos()], 1)) + self.contrast_in(contrast)
        if stack is not None:
            e = e + self.stack_in(stack)
            if "stack_hidden" in self.config:
                e = e + self.stack_more(stack)
        return F.silu(e)

    def enter(self, bands: Tensor, place: Tensor, unknown: Tensor | None = None) -> Tensor:
        """The first features: one convolution of the image, products with position and map."""
        # In float32: at sigma 0.01 the noise is below the rounding of bfloat16.
        with torch.autocast(bands.device.type, enabled=False):
            image = self.image_in(bands.float())
        h: Tensor = image + self.place_in(place)
        if unknown is not None:
            h = h + self.unknown_in(unknown)
        if torch.is_autocast_enabled(bands.device.type):
            h = h.to(torch.get_autocast_dtype(bands.device.type))
        return h

    def forward(
        self,
        bands: Tensor,
        place: Tensor,
        noise: Tensor,
        contrast: Tensor,
        stack: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """One pass: (n, 8, i, j, k) float32, each band of unit SD.

        Parameters
        ----------
        bands : (n, 8, i, j, k) float32
            Each band of unit SD; i, j, k multiples of ``multiple``.
        place : (n or 1, 27, i, j, k)
            ``coordinate_features``.
        noise : (n,)
            ln(sigma) / 4.
        contrast : (n,) int64
            Index into ``CONTRASTS``.
        stack : (n, 8), optional
            ``stacks.Stack.features``; 0 for an image without slices.
        unknown : (n, 8, i, j, k), optional
            Bands of ``stacks.StackPosterior.unknown_map``.
        """
        e = self.embed(noise, contrast, stack)
        return self.answer(self.features(bands, place, e, unknown), e, spread=False)[0]

    def answer(
        self, h: Tensor, embedding: Tensor, *, spread: bool
    ) -> tuple[Tensor, Tensor | None]:
        """From ``features``: the bands and, if requested, the log SD of each voxel's error. Both
        are (n, 8, i, j, k) float32. The SD is relative to that of the linear posterior; its
        channels are the voxels of a 2 x 2 x 2 block in i, j, k order.
        """
        return self.out(h).float(), self.spread_out(h, embedding).float() if spread else None

    def features(
        self, bands: Tensor, place: Tensor, embedding: Tensor, unknown: Tensor | None = None
    ) -> Tensor:
        """(n, channels[0], i, j, k), from which the outputs are computed; see ``embed``,
        ``forward``.
        """
        e = embedding
        h = self.enter(bands, place, unknown)
        skips = []
        for depth, group in enumerate(self.down_blocks):
            for block in group:  # type: ignore[attr-defined]
                h = block(h, e)
            if depth < len(self.downs):
                skips.append(h)
                h = self.downs[depth](h)
        for depth in reversed(range(len(self.ups))):
            h = self.ups[depth](h) + skips[depth]
            for block in self.up_blocks[depth]:  # type: ignore[attr-defined]
                h = block(h, e)
        return h
