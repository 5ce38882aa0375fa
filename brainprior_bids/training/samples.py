# SPDX-License-Identifier: Apache-2.0
"""Unconditional samples of a prior, for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.samplers.conditional import sample_conditional
from brainprior_bids.engine.schedules import edm_schedule

HEAD = Grid(
    (144, 176, 144),
    np.array([[1.12, 0, 0, -80.6], [0, 1.12, 0, -116], [0, 0, 1.12, -70], [0, 0, 0, 1.0]]),
)
"""1 mm voxels for a brain of the training participants' mean size; MNI305 is 1.12 times larger."""
SIGMA_MIN = 0.01
"""Lowest noise level of a sample."""


def unconditional(
    prior: Prior, contrast: str, *, seed: int, n_steps: int = 40, sigma_max: float = 40.0
) -> Tensor:
    """(i, j, k) one sample on ``HEAD``, by the solver of ``conditional`` with nothing measured.

    Its fresh noise at each level corrects errors of earlier calls. The probability-flow ODE has
    none, and its samples had half as many plausible structures (``docs/models/log.md``).
    """
    coordinates = torch.from_numpy(HEAD.points_mm())

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return prior.denoise(x, sigma, coordinates=coordinates, contrast=contrast)

    sample = sample_conditional(
        denoise,
        edm_schedule(n_steps, sigma_max, SIGMA_MIN),
        expected=torch.zeros(1, 1, *HEAD.shape),
        generator=torch.Generator().manual_seed(seed),
    )
    return sample[0, 0]


def draw_samples(prior: Prior, path: Path, contrasts: Sequence[str], *, n_steps: int) -> None:
    """A picture with one sample per contrast: sagittal, coronal and two axial slices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(contrasts)))
    axes = figure.subplots(len(contrasts), 4, squeeze=False)
    for row, contrast in zip(axes, contrasts, strict=True):
        image = unconditional(prior, contrast, seed=0, n_steps=n_steps).numpy()
        slices = (image[66], image[:, 96], image[:, :, 72], image[:, :, 52])
        for axis, picture in zip(row, slices, strict=True):
            axis.imshow(picture.T, origin="lower", cmap="gray", vmin=0, vmax=1.1)
            axis.set_axis_off()
        row[0].set_title(contrast, loc="left", fontsize=9)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=80)
