# SPDX-License-Identifier: Apache-2.0
"""The posterior mean, without samples."""

from __future__ import annotations

import torch
from torch import Tensor

from brainprior_bids.engine.samplers.conditional import BLIND
from brainprior_bids.engine.samplers.exact import Denoise, finite


def expected_image(
    denoise: Denoise, *, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """``E[x | y]`` from a network conditioned on the measurements; nothing is drawn.

    Parameters
    ----------
    denoise : function
        ``E[x | x_t, y]`` of (x_t, sigma): (shape) -> (shape).

    Raises
    ------
    DivergenceError
        If a value is not finite.
    """
    return finite(denoise(torch.zeros(shape, device=device), BLIND), BLIND)
