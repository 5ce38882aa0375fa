# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a denoiser on validation brains: gain and error spectrum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from brainprior_bids.engine.denoiser import ErrorSpectrum, Prior
from brainprior_bids.engine.operators.slices import trapezoid_profile
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.unet import CONTRASTS
from brainprior_bids.training.crops import TABLE, intensity_curve, matrix_points
from brainprior_bids.training.preprocess import Brain
from brainprior_bids.training.stacks import draw_stack, profile, sampled_profile

SIGMAS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 3.0, 10.0, 40.0)
BINS = 40
"""Radial bins from 0 to the corner of the cube at 1 mm, narrower towards 0."""
EDGES = 3**0.5 / 2 * torch.linspace(0, 1, BINS + 1, dtype=torch.float64) ** 1.5
"""(BINS + 1,) cycles per mm."""


def examples(
    brains: Sequence[Brain], contrast: str, limit: int
) -> list[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """(image, voxel to MNI305) of one contrast: scans, then scans through a curve, then synthetic.

    The curves are drawn from a fixed seed, so every measurement uses the same images.
    """
    plain = [b for b in brains if b.contrast == contrast and not b.synthetic]
    synthetic = [b for b in brains if b.contrast == contrast and b.synthetic]
    images = [(TABLE.astype(np.float32)[b.data], b.to_mni305) for b in plain[:limit]]
    if not plain:
        rng = np.random.default_rng(7)
        for brain in [b for b in brains if b.contrast == "T1w" and not b.synthetic][: limit // 2]:
            images.append(
                (intensity_curve(brain.tissues, contrast, rng)[brain.data], brain.to_mni305)
            )
    images += [(TABLE.astype(np.float32)[b.data], b.to_mni305) for b in synthetic]
    return images[:limit]


def errors(
    prior: Prior,
    image: NDArray[np.float32],
    matrix: NDArray[np.float64],
    contrast: str,
    sigmas: Sequence[float],
) -> Iterator[tuple[float, Tensor]]:
    """(sigma, error inside the brain) for one image; the same noise at every level."""
    margin = 4
    padded = torch.from_numpy(np.pad(image, margin))[None, None]
    shift = np.eye(4)
    shift[:3, 3] = -margin
    place = torch.from_numpy(matrix @ shift).float()[None]
    coordinates = matrix_points(place, padded.shape[2:])[0]
    inside = torch.from_numpy(ndimage.binary_fill_holes(padded[0, 0].numpy() > 0))
    noise = torch.randn(padded.shape, generator=torch.Generator().manual_seed(11))
    for sigma in sigmas:
        estimate = prior.denoise(
            padded + sigma * noise, sigma, coordinates=coordinates, contrast=contrast
        )
        yield sigma, (estimate - padded)[0, 0] * inside


def gains(
    prior: Prior, brains: Sequence[Brain], sigmas: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1, 4)
) -> dict[str, dict[str, float]]:
    """RMS error inside the brain divided by sigma, per contrast and level, on a central 96³ crop.

    Below 1, the denoised image is better than the noisy one.
    """
    table: dict[str, dict[str, float]] = {}
    for contrast in CONTRASTS:
        sums = dict.fromkeys(sigmas, 0.0)
        images = examples(brains, contrast, 2)
        for image, matrix in images:
            start = [max((size - 96) // 2, 0) for size in image.shape]
            shift = np.eye(4)
            shift[:3, 3] = start
            crop = image[tuple(slice(s, s + 96) for s in start)]
            share = float((crop > 0).mean())
            for sigma, error in errors(prior, crop, matrix @ shift, contrast, sigmas):
                volume = crop.size * share
                sums[sigma] += float(error.square().sum() / volume) / sigma**2 / len(images)
        if images:
            table[contrast] = {str(s): round(value**0.5, 4) for s, value in sums.items()}
    return table


@dataclass(frozen=True, eq=False)
class Crop:
    """The central 96³ voxels of a brain: image (i, j, k), MNI305 mm (3, i, j, k), brain."""

    image: Tensor
    coordinates: Tensor
    inside: Tensor


def central_crop(image: NDArray[np.float32], matrix: NDArray[np.float64]) -> Crop:
    """See ``Crop``; ``matrix`` is voxel to MNI305 mm."""
    start = [max((size - 96) // 2, 0) for size in image.shape]
    shift = np.eye(4)
    shift[:3, 3] = start
    crop = torch.from_numpy(image[tuple(slice(s, s + 96) for s in start)].copy())
    place = torch.from_numpy(matrix @ shift).float()[None]
    inside = torch.from_numpy(ndimage.binary_fill_holes(crop.numpy() > 0))
    return Crop(crop, matrix_points(place, crop.shape)[0], inside)


def one_call(
    prior: Prior, crop: Crop, contrast: str, stack: Stack, noise: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(n,) error of ``E[x | y]`` inside the brain, and its predicted SD.

    One network call, at a noise level that hides x_t.
    """
    mean, sd = prior.estimate(
        (crop.image + 100 * noise)[None, None],
        100.0,
        coordinates=crop.coordinates,
        contrast=contrast,
        measured=stack,
    )
    inside = crop.inside
    return (mean[0, 0] - crop.image)[inside], None if sd is None else sd[0, 0][inside]


def stack_errors(
    prior: Prior,
    brains: Sequence[Brain],
    spacings: Sequence[float] = (3.0, 5.0, 7.0),
    limit: int = 2,
) -> dict[str, dict[str, float]]:
    """PSNR in dB of ``E[x | y]``, per contrast and slice spacing.

    y has axial slices, a profile with steep flanks as wide as the spacing, and noise 0.01; the
    prior is conditioned on the trapezoid that the engine assumes.
    """
    table: dict[str, dict[str, float]] = {}
    for contrast in CONTRASTS:
        images = examples(brains, contrast, limit)
        sums = dict.fromkeys(spacings, 0.0)
        for image, matrix in images:
            crop = central_crop(image, matrix)
            size = crop.image.shape[2]
            generator = torch.Generator().manual_seed(11)
            noise = torch.randn(crop.image.shape, generator=generator)
            for spacing in spacings:
                centres = torch.arange(spacing / 2, size, spacing, dtype=torch.float64)
                y = crop.image @ sampled_profile(profile(2, spacing), centres, size).float().T
                y = y + 0.01 * torch.randn(y.shape, generator=generator)
                weights = sampled_profile(trapezoid_profile(spacing), centres, size)
                error, _ = one_call(prior, crop, contrast, Stack(y, weights, 2, 0.01), noise)
                sums[spacing] += float(error.square().mean()) / len(images)
        if images:
            table[contrast] = {
                f"{spacing:g}": round(-10 * float(np.log10(value)), 3)
                for spacing, value in sums.items()
            }
    return table


def spread_errors(
    prior: Prior, brains: Sequence[Brain], limit: int = 4, draws: int = 6
) -> dict[str, tuple[float, list[float]]]:
    """RMS error over the RMS of the predicted SD: of each contrast, in all and by decile of SD.

    Of ``E[x | y]`` with stacks as in training (``draw_stack``: any spacing and axis, a profile
    that is not quite the stated one). 1 is right; below 1 the SD is too large. Empty where the
    prior does not predict it.
    """
    table = {}
    for contrast in CONTRASTS if prior.predicts_spread else ():
        rows = []
        for image, matrix in examples(brains, contrast, limit):
            crop, generator = central_crop(image, matrix), torch.Generator().manual_seed(11)
            noise = torch.randn(crop.image.shape, generator=generator)
            for _ in range(draws):
                stack = draw_stack(crop.image, generator)
                error, sd = one_call(prior, crop, contrast, stack, noise)
                assert sd is not None
                rows.append(torch.stack((error.square(), sd.square()), 1))
        if rows:
            every = torch.cat(rows).double()
            parts = every[every[:, 1].argsort()].tensor_split(10)
            ratios = [float((part[:, 0].sum() / part[:, 1].sum()).sqrt()) for part in parts]
            table[contrast] = float((every[:, 0].sum() / every[:, 1].sum()).sqrt()), ratios
    return table


def radial_power(error: Tensor, inside_share: float) -> tuple[Tensor, Tensor]:
    """(BINS,) sums of |FFT|² / inside_share and counts, by |k|; orthonormal FFT, 1 mm voxels."""
    power = torch.fft.fftn(error, norm="ortho").abs().square() / inside_share
    axes = [torch.fft.fftfreq(size) for size in error.shape]
    k = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    index = (torch.searchsorted(EDGES, k.double().flatten(), right=True) - 1).clamp(0, BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, power.double().flatten())
    counts = torch.bincount(index, minlength=BINS).double()
    return sums, counts


def measure_spectra(
    prior: Prior, brains: Sequence[Brain], *, sigmas: Sequence[float] = SIGMAS, limit: int = 3
) -> dict[str, ErrorSpectrum]:
    """The error spectrum of every contrast for which there are brains, and of "unknown".

    "unknown" is measured on one brain of the first and one of the last contrast, with the
    contrast hidden from the network.
    """
    spectra = {}
    shown = {contrast: examples(brains, contrast, limit) for contrast in CONTRASTS}
    last_of_each = [images[-1] for images in shown.values() if images]
    shown["unknown"] = [*last_of_each[:1], *last_of_each[1:][-1:]]
    centres = (EDGES[1:] + EDGES[:-1]) / 2
    for contrast, images in shown.items():
        if not images:
            continue
        sums = torch.zeros(len(sigmas), BINS, dtype=torch.float64)
        counts = torch.zeros(BINS, dtype=torch.float64)
        for image, matrix in images:
            for row, (_, error) in enumerate(errors(prior, image, matrix, contrast, sigmas)):
                share = float((image > 0).sum()) / error.numel()
                power, number = radial_power(error, share)
                sums[row] += power
            counts += number
        occupied = counts > 0  # the lowest bins may hold no frequency of a small volume
        spectra[contrast] = ErrorSpectrum(
            torch.tensor(sigmas, dtype=torch.float64),
            centres[occupied],
            (sums / counts)[:, occupied],
        )
    return spectra
