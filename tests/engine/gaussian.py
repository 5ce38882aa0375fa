# SPDX-License-Identifier: Apache-2.0
"""A Gaussian prior with known posterior: the bands of an image are independent and Gaussian."""

from __future__ import annotations

import torch

from brainprior_bids.engine.denoiser import ErrorSpectrum, Precondition, Prior
from brainprior_bids.engine.unet import UNet

BAND_SD = torch.tensor([0.5, 0.2, 0.15, 0.05, 0.1, 0.05, 0.06, 0.02])


def gaussian_prior(band_sd=BAND_SD, device="cpu", spread=False, **metadata):
    """A prior that can be conditioned; its network returns 0: it is N(0, diag s²) in bands."""
    return Prior(
        Precondition(UNet((4, 4), (1, 1), stacks=True, spread=spread), band_sd),
        spectra={"unknown": ErrorSpectrum.isotropic(0.2)},
        metadata=metadata,
        device=device,
        dtype=torch.float32,
    )


def told(prior, measured, shape):
    """``E[x | x_t, y]`` of (x_t, sigma), as ``sample_eps`` asks for it."""
    coordinates = torch.zeros(3, *shape)

    def denoise(x_t, sigma):
        answer = prior.denoise(
            x_t[None, None], sigma, coordinates=coordinates, contrast="T1w", measured=measured
        )
        return answer[0, 0]

    return denoise
