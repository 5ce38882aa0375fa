# SPDX-License-Identifier: Apache-2.0
"""The network a tile at a time, for volumes whose features do not fit into memory.

The receptive field extends some 80 mm to each side of a voxel. Tiles with that much overlap would
cost ten times as much, and blended tiles with less overlap would change the result. Therefore each
*layer* is tiled: a tile is a slab of rows along the first axis. It is read together with the
neighbouring rows that the layer needs (one for a 3 x 3 x 3 convolution, two for a residual block),
and is overwritten by its result. A voxel goes through the same sums as in an untiled call; nothing
is blended and there is no seam. One whole feature map per resolution stays in memory; everything
else has the size of a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from brainprior_bids.engine.unet import UNet

REACH = 2
"""Rows that a residual block reads beyond a slab; a single convolution reads one."""

Read = Callable[[int, int], tuple[Tensor, ...]]


def slabs(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive slabs of ``rows`` rows; the last may be smaller."""
    for start in range(0, size, rows):
        yield start, min(start + rows, size)


def block_in_slabs(
    block: Callable[[Tensor, Tensor], Tensor], h: Tensor, e: Tensor, rows: int
) -> None:
    """``h <- block(h, e)`` in place; ``rows`` is at least ``REACH``."""
    size = h.shape[2]
    above = h[:, :, :0]  # the rows before the slab, before they were overwritten
    for start, stop in slabs(size, rows):
        part = torch.cat([above, h[:, :, start : min(stop + REACH, size)]], 2)
        lead = above.shape[2]
        above = h[:, :, stop - REACH : stop].clone()
        h[:, :, start:stop] = block(part, e)[:, :, lead : lead + stop - start]


def network_in_slabs(
    network: UNet,
    read: Read,
    size: int,
    noise: Tensor,
    contrast: Tensor,
    rows: int,
    stack: Tensor | None = None,
    *,
    spread: bool = False,
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """The network's outputs (``network.answer``), slab by slab.

    Parameters
    ----------
    network : UNet
    read : function
        ``read(start, stop)`` gives those rows of ``bands`` (n, 8, i, j, k), of ``place`` and,
        with a stack, of ``unknown``.
    size : int
        Rows of bands along the first axis, a multiple of ``network.multiple``.
    noise, contrast, stack : tensors
        As ``UNet.forward``.
    rows : int
        Rows of a slab, at every resolution; rounded to an even number.
    spread : bool
        Whether to return the log SD.

    Yields
    ------
    (start, stop, rows of the bands, rows of the log SD or None)
    """
    depth = len(network.downs)
    # even, so that no slab cuts a block of the next coarser resolution; the same number of rows
    # at each of them, which hold ever less
    rows = max(rows // 2 * 2, REACH)
    e = network.embed(noise, contrast, stack)
    h = _enter(network, read, size, rows)
    skips: list[Tensor] = []
    for level in range(depth + 1):
        for block in network.down_blocks[level]:  # type: ignore[attr-defined]
            block_in_slabs(block, h, e, rows)
        if level < depth:
            skips.append(h)
            h = _down(network.downs[level], h, rows)
    for level in reversed(range(depth)):
        fine = skips.pop()
        for start, stop in slabs(fine.shape[2], rows):
            fine[:, :, start:stop] += network.ups[level](h[:, :, start // 2 : stop // 2])
        h = fine
        for block in network.up_blocks[level]:  # type: ignore[attr-defined]
            block_in_slabs(block, h, e, rows)
    for start, stop in slabs(size, rows):
        low, high = max(start - 1, 0), min(stop + 1, size)
        bands, log_sd = network.answer(h[:, :, low:high], e, spread=spread)
        own = slice(start - low, stop - low)
        yield start, stop, bands[:, :, own], None if log_sd is None else log_sd[:, :, own]


def _empty_like_rows(part: Tensor, rows: int) -> Tensor:
    """An empty tensor like ``part``, with ``rows`` rows."""
    shape = (part.shape[0], part.shape[1], rows, *part.shape[3:])
    return torch.empty(
        shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last_3d
    )


def _enter(network: UNet, read: Read, size: int, rows: int) -> Tensor:
    h: Tensor | None = None
    for start, stop in slabs(size, rows):
        low, high = max(start - 1, 0), min(stop + 1, size)
        part = network.enter(*read(low, high))
        if h is None:
            h = _empty_like_rows(part, size)
        h[:, :, start:stop] = part[:, :, start - low : start - low + stop - start]
    assert h is not None
    return h


def _down(layer: Callable[[Tensor], Tensor], h: Tensor, rows: int) -> Tensor:
    coarse: Tensor | None = None
    for start, stop in slabs(h.shape[2], rows):
        part = layer(h[:, :, start:stop])
        if coarse is None:
            coarse = _empty_like_rows(part, h.shape[2] // 2)
        coarse[:, :, start // 2 : stop // 2] = part
    assert coarse is not None
    return coarse
