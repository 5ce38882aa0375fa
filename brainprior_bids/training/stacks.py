# SPDX-License-Identifier: Apache-2.0
"""Simulated measurements of training crops: stacks of slices, and scans with holes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import (
    boxcar_profile,
    gaussian_profile,
    measured_profile,
    trapezoid_profile,
)
from brainprior_bids.engine.stacks import Stack, keep
from brainprior_bids.engine.voxels import Voxels

AXES = (0.25, 0.25, 0.5)
"""Frequency of sagittal, coronal and axial slices."""
SPACING_MM = ((1.6, 3.0, 0.2), (3.0, 6.5, 0.7), (6.5, 8.0, 0.1))
"""Smallest and largest spacing, share of the stacks: most clinical slices are 3 to 6 mm."""
STATED = ((0.7, trapezoid_profile), (0.85, gaussian_profile), (1.0, boxcar_profile))
"""The stated profile of a scan, by cumulative share: mostly ``Acquisition``'s default."""
WIDTH = (0.75, 1.1)
"""Range of the ratio of thickness to spacing."""
MISMATCH = 0.1
"""The true thickness differs from the stated one by up to this share."""
NOISE_SD = (0.004, 0.04)
COARSE = 0.2
"""Share of the stacks with in-plane voxels above 1 mm, and the range of their size."""
IN_PLANE_MM = (1.05, 2.2)
THREE_D = 0.1
"""Share of the stacks that are 3-D scans, whose slices are sinc-shaped, and their spacing."""
THREE_D_MM = (1.0, 1.7)
SLAB = 0.15
"""Share of the holes that are the end of the field of view."""
HOLE_MM = {1: (2.0, 18.0), 2: (3.0, 25.0)}
"""Semi-axes of the others, by the edge of a voxel."""
HOLE_VOXELS = 40**3
"""Of a crop of averaged brains, for one to three holes."""


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One number."""
    u = float(torch.rand((), generator=generator))
    return math.exp(math.log(low) + u * math.log(high / low))


def piecewise_uniform(pieces: Sequence[tuple[float, float, float]], u: float) -> float:
    """The number at quantile ``u``; ``pieces`` holds low, high and share, one after the other."""
    for low, high, share in pieces:
        if u < share:
            return low + (high - low) * u / share
        u -= share
    return pieces[-1][1]


def profile(kind: int, thickness: float) -> Callable[[Tensor], Tensor]:
    """Gaussian (0), boxcar (1) or one with steep flanks (2), full width at half maximum in mm."""
    if kind == 0:
        return gaussian_profile(thickness)
    if kind == 1:
        return boxcar_profile(thickness)
    at = torch.tensor([-0.65, -0.35, 0.35, 0.65], dtype=torch.float64) * thickness
    return measured_profile(at, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def sampled_profile(cumulative: Callable[[Tensor], Tensor], centres: Tensor, size: int) -> Tensor:
    """(n_slices, size) float64 weights of 1 mm voxels; the part beyond the crop is omitted."""
    edges = torch.arange(size + 1, dtype=torch.float64)
    return cumulative(edges[None] - centres[:, None]).diff(dim=1)


def draw_stack(image: Tensor, generator: torch.Generator) -> Stack:
    """A random stack of a crop (c, c, c): simulated measurements and their stated description. The
    measurement has its own profile and thickness; its ``slice_weights`` have a profile of
    ``STATED`` and the *stated* thickness, as for a scan whose true profile is unknown. Some stacks
    contain only the lower in-plane frequencies; some are 3-D scans, which contain only the lower
    frequencies along the third axis too.
    """
    u = torch.rand(7, generator=generator).tolist()
    axis = 0 if u[0] < AXES[0] else 1 if u[0] < AXES[0] + AXES[1] else 2
    spacing = piecewise_uniform(SPACING_MM, float(torch.rand((), generator=generator)))
    stated = spacing * (WIDTH[0] + u[1] * (WIDTH[1] - WIDTH[0]))
    true = stated * (1 + MISMATCH * (2 * u[2] - 1))
    size = image.shape[axis]
    three_d = u[6] < THREE_D
    if three_d:
        n_slices = round(size / log_uniform(*THREE_D_MM, generator))
        stated_weights = resampling_matrix(size, n_slices)
    centres = torch.arange((u[3] - 0.5) * spacing, size, spacing, dtype=torch.float64)
    kind = int(torch.randint(3, (), generator=generator))
    noise_sd = log_uniform(*NOISE_SD, generator)
    measured = (
        stated_weights if three_d else sampled_profile(profile(kind, true), centres, size)
    ).to(image)
    y = torch.tensordot(measured, image, dims=([1], [axis])).movedim(0, axis)
    y = y + noise_sd * torch.randn(y.shape, generator=generator)
    if not three_d:
        guess = next(profile for share, profile in STATED if u[4] <= share)
        stated_weights = sampled_profile(guess(stated), centres, size)
    in_plane = (1.0, 1.0)
    if u[5] < COARSE:
        share = 1 / log_uniform(*IN_PLANE_MM, generator)
        in_plane = (share, min(share * log_uniform(0.9, 1.1, generator), 1.0))
        y = keep(y, axis, in_plane)
    return Stack(y, stated_weights, axis, noise_sd, in_plane)


def slices_last(image: Tensor, matrix: Tensor, stack: Stack) -> tuple[Tensor, Tensor, Stack]:
    """Crop (1, c, c, c), voxel-to-mm matrix (4, 4) and stack with the slices on the last axis."""
    axes = [axis for axis in range(3) if axis != stack.axis]
    turned = image.movedim(1 + stack.axis, -1).contiguous()
    return turned, matrix[:, [*axes, stack.axis, 3]], stack.turned()


def draw_hole(
    shape: tuple[int, ...],
    centre: Tensor,
    generator: torch.Generator,
    semi_axes: tuple[float, float] = HOLE_MM[1],
) -> Tensor:
    """(i, j, k) bool: an ellipsoid with a rough surface about ``centre`` (3,); in voxels."""
    size = torch.tensor([log_uniform(*semi_axes, generator) for _ in range(3)])
    size = size.lerp(size.mean(), 0.5)  # more often round than long
    rough = torch.randn(1, 1, 8, 8, 8, generator=generator)
    surface = 1 + 0.35 * F.interpolate(rough, size=tuple(shape), mode="trilinear")[0, 0]
    axes = [torch.arange(n) for n in shape]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - centre
    return (offset / size).square().sum(-1) < surface


def draw_voxels(image: Tensor, generator: torch.Generator, *, edge: int = 1) -> Voxels:
    """A noisy scan of a crop (c, c, c), voxels of ``edge`` mm, with one to three holes, or an end,
    missing. Averaged brains have one to three for every ``HOLE_VOXELS`` voxels.
    """
    low, high = (mm / edge for mm in HOLE_MM[edge])
    noise_sd = log_uniform(*NOISE_SD, generator)
    y = image + noise_sd * torch.randn(image.shape, generator=generator)
    hidden = torch.zeros(image.shape, dtype=torch.bool)
    if float(torch.rand((), generator=generator)) < SLAB:
        axis, end = torch.randint(3, (2,), generator=generator).tolist()
        width = int(torch.randint(4, image.shape[axis] // 2, (), generator=generator))
        start = 0 if end else image.shape[axis] - width
        hidden.narrow(axis, start, width).fill_(True)
        return Voxels(y, hidden, noise_sd)
    brain = (image > 0.05).nonzero()
    parts = 1 if edge == 1 else max(round(image.numel() / HOLE_VOXELS), 1)
    for _ in range(parts * int(torch.randint(1, 4, (), generator=generator))):
        candidates = brain if len(brain) else torch.tensor([[n // 2 for n in image.shape]])
        at = candidates[int(torch.randint(len(candidates), (), generator=generator))]
        hidden |= draw_hole(image.shape, at, generator, (low, high))
    return Voxels(y, hidden, noise_sd)
