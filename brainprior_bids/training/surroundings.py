# SPDX-License-Identifier: Apache-2.0
"""What lies around the brain in a training crop.

A slice through the brain's border averages fluid, dura and bone with the brain. The network is
given such slices as they are, and separates the brain from its surroundings. The training brains
are stripped; here they receive random layers that resemble a head of their contrast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from brainprior_bids.engine.operators.slices import boxcar_profile
from brainprior_bids.engine.stacks import Stack, keep
from brainprior_bids.training.stacks import draw_stack, sampled_profile

STRIPPED = 0.35
"""Share of crops whose surroundings are 0, as in a stripped scan."""
RIM_MM = (0.0, 2.5)
"""Range of the width of the rim that is restored with the brain; the command's is 1.5 mm."""
NEAR_MM = (1.0, 5.0)
"""Range of the distance from the brain up to which the network is given the surroundings."""
FLUID = {"T2w": (0.75, 1.05), "FLAIR": (0.05, 0.25), "T1w": (0.1, 0.35), "unknown": (0.05, 1.0)}
"""Brightness of the fluid around the brain, engine unit."""
FLUID_MM = 2.0
"""Median thickness of the fluid."""
LAYERS = (
    ("dura", 1.0, (0.2, 0.9)),
    ("bone", 2.0, (0.0, 0.15)),
    ("marrow", 3.0, (0.2, 1.3)),
    ("bone", 2.0, (0.0, 0.15)),
    ("fat or muscle", 8.0, (0.3, 1.8)),
)
"""Layers beyond the fluid, from the inside: median thickness in mm, and range of brightness."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What lies around a brain; (c, c, c), 1 mm voxels.

    Attributes
    ----------
    head : float32
        Intensities outside of the brain, engine unit; 0 inside.
    region, near : bool
        The brain with the rim that is restored with it; with all surroundings that the network is
        given.
    """

    head: NDArray[np.float32]
    region: NDArray[np.bool_]
    near: NDArray[np.bool_]


def no_surroundings(shape: tuple[int, ...]) -> Surroundings:
    """Everything belongs to the brain."""
    every = np.ones(shape, bool)
    return Surroundings(np.zeros(shape, np.float32), every, every)


def draw_surroundings(
    mask: NDArray[np.bool_], contrast: str, rng: np.random.Generator
) -> Surroundings:
    """Random surroundings of a brain.

    Parameters
    ----------
    mask : (c, c, c) bool
        The brain.
    contrast : str
        Sets the brightness of the fluid.
    """
    rim, stripped = rng.uniform(*RIM_MM), rng.random() < STRIPPED
    near = max(rng.uniform(*NEAR_MM), rim)
    if mask.all() or not mask.any():
        return no_surroundings(mask.shape)
    depth = ndimage.distance_transform_edt(~ndimage.binary_fill_holes(mask)).astype(np.float32)
    head = np.zeros(mask.shape, np.float32)
    if not stripped:
        fluid = rng.uniform(*FLUID[contrast])
        layers = [(FLUID_MM, fluid), *((mm, rng.uniform(*span)) for _, mm, span in LAYERS)]
        reached = 0.5 * smooth_noise(mask.shape, 6, rng)
        for median_mm, brightness in layers:
            median_mm *= np.exp(rng.normal(0, 0.6))
            thickness = median_mm * np.exp(0.5 * smooth_noise(mask.shape, 12, rng))
            head[(depth > reached) & (depth <= reached + thickness)] = brightness
            reached = reached + thickness
        head *= np.maximum(1 + rng.uniform(0, 0.3) * smooth_noise(mask.shape, 2, rng), 0)
        head[depth == 0] = fluid  # for the filter, which blurs the borders of the layers
        head = ndimage.gaussian_filter(head, rng.uniform(0.3, 0.7))
        head[depth == 0] = 0
    return Surroundings(head, depth <= rim, depth <= near)


def smooth_noise(
    shape: tuple[int, ...], size: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Random numbers of about unit SD, ``size`` voxels apart and linearly interpolated."""
    coarse = torch.from_numpy(rng.normal(size=[n // size + 2 for n in shape])).float()
    fine = F.interpolate(coarse[None, None], size=shape, mode="trilinear", align_corners=True)
    values: NDArray[np.float32] = fine[0, 0].numpy()
    return values


def draw_stack_of_head(head: Tensor, near: Tensor, generator: torch.Generator) -> Stack:
    """A random stack of a brain with its surroundings.

    Slice voxels partly beyond ``near`` are multiplied by their share of it, as in the engine.

    Parameters
    ----------
    head : (i, j, k) float32 tensor
    near : (i, j, k) bool tensor
    """
    stack = draw_stack(head, generator)
    axis, share = stack.axis, near.float()
    share = torch.tensordot(_positive_weights(stack), share, dims=([1], [axis]))
    y = stack.y * share.movedim(0, axis)
    return replace(stack, y=y if stack.whole_plane else keep(y, axis, stack.kept))


def _positive_weights(stack: Stack) -> Tensor:
    """(n_slices, n) the slice profile, each row with sum 1; for a 3-D scan its voxels."""
    weights = stack.slice_weights
    if float(weights.min()) < 0:  # sinc-shaped
        count, n = weights.shape
        centres = (torch.arange(count, dtype=torch.float64) + 0.5) * n / count
        weights = sampled_profile(boxcar_profile(n / count), centres, n)
    return (weights / weights.sum(1, keepdim=True).clamp_min(1e-9)).float()
