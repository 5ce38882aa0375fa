# SPDX-License-Identifier: Apache-2.0
"""Stacks of slices measured on training crops: the anisotropic noise that the prior learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from brainprior_bids.engine.operators.slices import (
    boxcar_profile,
    gaussian_profile,
    measured_profile,
)
from brainprior_bids.engine.stacks import Stack, keep

AXES = (0.25, 0.25, 0.5)
"""How often the slices are sagittal, coronal, axial."""
SPACING_MM = (1.6, 8.0)
WIDTH = (0.75, 1.1)
"""Thickness over spacing."""
MISMATCH = 0.1
"""The true thickness differs from the stated one by up to this share."""
NOISE_SD = (0.003, 0.05)
COARSE = 0.4
"""Share of the stacks with voxels above 1 mm in their plane, and how far above."""
IN_PLANE_MM = (1.05, 2.2)
SIGMA = (0.02, 100.0)
"""Noise of x_t beside a stack: at the top it says nothing, and the answer is E[x | y]."""


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One number."""
    u = float(torch.rand((), generator=generator))
    return math.exp(math.log(low) + u * math.log(high / low))


def profile(kind: int, thickness: float) -> Callable[[Tensor], Tensor]:
    """Gaussian (0), boxcar (1) or trapezoid (2) of that full width at half maximum, in mm."""
    if kind == 0:
        return gaussian_profile(thickness)
    if kind == 1:
        return boxcar_profile(thickness)
    at = torch.tensor([-0.65, -0.35, 0.35, 0.65], dtype=torch.float64) * thickness
    return measured_profile(at, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def weights(cumulative: Callable[[Tensor], Tensor], centres: Tensor, size: int) -> Tensor:
    """(n_slices, size) float64 shares of voxels of 1 mm; what lies beyond the crop is not seen."""
    edges = torch.arange(size + 1, dtype=torch.float64)
    return cumulative(edges[None] - centres[:, None]).diff(dim=1)


def draw_stack(image: Tensor, generator: torch.Generator) -> Stack:
    """A random stack of a crop (c, c, c): what a scanner would give, and what one knows of it.

    The measurement has a profile and a thickness of its own; the stack's ``weights`` are a
    Gaussian (7 of 10) or a boxcar of the *stated* thickness, as for a scan, whose true profile
    nobody knows. Some have measured the lower spatial frequencies of the plane alone.
    """
    u = torch.rand(6, generator=generator).tolist()
    axis = 0 if u[0] < AXES[0] else 1 if u[0] < AXES[0] + AXES[1] else 2
    spacing = log_uniform(*SPACING_MM, generator)
    stated = spacing * (WIDTH[0] + u[1] * (WIDTH[1] - WIDTH[0]))
    true = stated * (1 + MISMATCH * (2 * u[2] - 1))
    size = image.shape[axis]
    centres = torch.arange((u[3] - 0.5) * spacing, size, spacing, dtype=torch.float64)
    kind = int(torch.randint(3, (), generator=generator))
    noise_sd = log_uniform(*NOISE_SD, generator)
    measured = weights(profile(kind, true), centres, size).to(image)
    y = torch.tensordot(measured, image, dims=([1], [axis])).movedim(0, axis)
    y = y + noise_sd * torch.randn(y.shape, generator=generator)
    known = weights(profile(0 if u[4] < 0.7 else 1, stated), centres, size)
    kept = (1.0, 1.0)
    if u[5] < COARSE:
        share = 1 / log_uniform(*IN_PLANE_MM, generator)
        kept = (share, min(share * log_uniform(0.9, 1.1, generator), 1.0))
        y = keep(y, axis, kept)
    return Stack(y, known, axis, noise_sd, kept)


def draw_sigma(generator: torch.Generator) -> float:
    """Noise level of x_t beside a stack."""
    return log_uniform(*SIGMA, generator)
