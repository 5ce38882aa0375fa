# SPDX-License-Identifier: Apache-2.0
"""The parcellation network: a residual U-Net behind a pixel-unshuffle.

Input is one volume at 2 mm; the unshuffle (x 2) turns it into 8 channels at 4 mm, where all
convolutions run; the last layer writes 8 sub-voxels of every class and shuffles them back to 2 mm.
Normalisation is over the channels of one voxel only: the network uses no statistic over space, so
the result at a voxel does not depend on the field of view beyond its receptive field.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SHUFFLE = 2
"""Factor of the pixel-unshuffle along each axis."""


def normalise_intensity(x: Tensor) -> Tensor:
    """Scale a volume so that its bright tissue is about 1; negative values become 0.

    The unit is the 98th percentile of the voxels above the mean of the positive ones, which
    hardly depends on how much air is in the field of view. Values are clipped at 3.

    Parameters
    ----------
    x : tensor of any shape
        Finite. An image without positive voxels comes back as zeros.
    """
    x = x.clamp_min(0)
    positive = x[x > 0]
    if positive.numel() == 0:
        return x
    bright = positive[positive >= positive.mean()]
    k = max(round(0.98 * bright.numel()), 1)
    unit = bright.kthvalue(k).values
    return (x / unit).clamp_max(3.0)


def unshuffle(x: Tensor) -> Tensor:
    """(n, c, 2i, 2j, 2k) -> (n, 8c, i, j, k)."""
    n, c, i, j, k = x.shape
    x = x.reshape(n, c, i // 2, 2, j // 2, 2, k // 2, 2)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, 8 * c, i // 2, j // 2, k // 2)


def shuffle(x: Tensor) -> Tensor:
    """(n, 8c, i, j, k) -> (n, c, 2i, 2j, 2k), the inverse of :func:`unshuffle`."""
    n, c, i, j, k = x.shape
    x = x.reshape(n, c // 8, 2, 2, 2, i, j, k)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c // 8, 2 * i, 2 * j, 2 * k)


class VoxelNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each voxel, with a gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, i, j, k) -> the same shape."""
        scale = ((x * x).mean(dim=1, keepdim=True) + 1e-5).rsqrt()
        return x * (scale * self.gain.to(x.dtype)[:, None, None, None])


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 x 1 skip when widths differ."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = VoxelNorm(width_in)
        self.conv1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.norm2 = VoxelNorm(width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Conv3d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, i, j, k) -> (n, width, i, j, k)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        out: Tensor = self.skip(x) + h
        return out


class ParcellationNetwork(nn.Module):
    """Class logits at 2 mm from one volume at 2 mm.

    Parameters
    ----------
    classes : ints
        The label value of every output channel (FreeSurfer values for structures).
    widths : ints
        Channels at 4, 8, 16, ... mm.
    """

    def __init__(self, classes: Sequence[int], widths: Sequence[int] = (40, 80, 160)) -> None:
        super().__init__()
        self.classes = tuple(int(c) for c in classes)
        self.widths = tuple(int(w) for w in widths)
        self.metadata: dict[str, Any] = {}  # of the weights file, when loaded from one
        self.multiple = SHUFFLE * 2 ** (len(self.widths) - 1)
        w = self.widths
        self.stem = nn.Conv3d(8, w[0], 3, padding=1)
        self.encoder = nn.ModuleList([Block(n, n) for n in w])
        self.down = nn.ModuleList([nn.Conv3d(a, b, 2, stride=2) for a, b in pairwise(w)])
        self.middle = Block(w[-1], w[-1])
        self.up = nn.ModuleList([nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairwise(w)])
        self.decoder = nn.ModuleList([Block(2 * n, n) for n in w[:-1]])
        self.norm = VoxelNorm(w[0])
        self.head = nn.Conv3d(w[0], 8 * len(self.classes), 1)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild the network: ``ParcellationNetwork(**config)``."""
        return {"classes": list(self.classes), "widths": list(self.widths)}

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck, (n, widths[-1], i / multiple, ...), and the finer levels before it."""
        h = self.stem(unshuffle(x))
        skips = []
        for depth, block in enumerate(self.encoder):
            h = block(h)
            if depth < len(self.down):
                skips.append(h)
                h = self.down[depth](h)
        return self.middle(h), skips

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, i, j, k), axes multiples of ``multiple`` -> (n, classes, i, j, k) logits."""
        h, skips = self.encode(x)
        for depth in reversed(range(len(self.up))):
            h = self.decoder[depth](torch.cat([self.up[depth](h), skips[depth]], dim=1))
        h = self.head(functional.silu(self.norm(h)))
        return shuffle(h)
