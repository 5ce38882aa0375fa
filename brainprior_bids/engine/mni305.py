# SPDX-License-Identifier: Apache-2.0
"""Restoration with the unknown on the MNI305 grid: the form of arXiv 2510.15119.

``y = b * (D R x) + n``: R takes the MNI305 image to the 1 mm grid along the scan's axes (linear
interpolation), D makes slices of it. It is for scans that are tilted beyond what the network has
seen, and for comparison: each inner solve is an iteration of resamplings, ten times the work of
``restore``, and the bias field stays as it was given.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from brainprior_bids.engine import restore as native
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.box import brain_box
from brainprior_bids.engine.consistency import judge, residual_of
from brainprior_bids.engine.device import usable_device
from brainprior_bids.engine.errors import GeometryError, InputError, UsageError
from brainprior_bids.engine.general import (
    OperatorLikelihood,
    core_of,
    foreign_variance,
    sliced,
)
from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.engine.likelihood import OUTSIDE
from brainprior_bids.engine.memory import tells_of_memory
from brainprior_bids.engine.operators.resample import AffineResample
from brainprior_bids.engine.samplers.daps import DAPS_1K, DapsSettings, sample_daps
from brainprior_bids.engine.samplers.exact import sample_exact
from brainprior_bids.engine.schedules import edm_schedule


@tells_of_memory
def restore_on_mni305(
    scan: ArrayLike | Tensor,
    *,
    grid: Grid,
    acquisition: Acquisition,
    mask: ArrayLike | Tensor,
    mask_1mm: ArrayLike | Tensor,
    to_mni305: ArrayLike,
    contrast: str,
    prior: native.PriorLike,
    log_bias: ArrayLike | Tensor | None = None,
    noise_sd: float | None = None,
    sampler: str = "exact",
    n_samples: int = 4,
    n_steps: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
    sigma_max: float = native.SIGMA_MAX,
    sigma_min: float = native.SIGMA_MIN,
    daps: DapsSettings = DAPS_1K,
) -> native.Restoration:
    """Draw posterior samples of the brain on the grid ``MNI305``.

    Parameters, units and errors are those of ``restore``, without refinement of bias and noise
    and without "map". The affine may hold any rotation.

    Returns
    -------
    Restoration
        Its images lie on ``MNI305`` (or the part of the brain that fits it), ``log_bias`` on the
        scan's grid; ``mean`` is that of the samples.

    Raises
    ------
    ConvergenceError
        If conjugate gradients do not converge.
    """
    began = time.perf_counter()
    warnings: list[str] = []
    if sampler not in ("exact", "daps"):
        raise UsageError(f"restore_on_mni305: sampler must be exact or daps, got {sampler!r}.")
    if n_samples < 1:
        raise UsageError(f"restore_on_mni305: n_samples must be at least 1, got {n_samples}.")
    device = usable_device(device)
    fine = grid.one_millimetre()
    volume = native._volume("scan", scan, grid.shape)
    inside = native._volume("mask", mask, grid.shape)
    inside_1mm = native._volume("mask_1mm", mask_1mm, fine.shape).clamp(0, 1)
    field = (
        torch.zeros(grid.shape)
        if log_bias is None
        else native._volume("log_bias", log_bias, grid.shape)
    )
    matrix = np.asarray(to_mni305, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or native._singular(matrix):
        raise GeometryError(
            f"restore_on_mni305: to_mni305 must be an invertible 4 x 4 matrix, got\n{matrix}."
        )
    brain = inside > 0.5
    if not bool(brain.any()) or not bool((inside_1mm > 0.5).any()):
        raise InputError("restore_on_mni305: the brain mask is empty. Pass another mask.")
    if not bool(torch.isfinite(volume[brain]).all()):
        raise InputError("restore_on_mni305: voxels inside the brain are NaN or infinite.")
    native._check_spacing(grid, acquisition, warnings)
    field = field - field[brain].mean()
    unit = float(torch.quantile(native._at_most(volume[brain] / field[brain].exp()), 0.99))
    if not unit > 0:
        raise InputError(
            f"restore_on_mni305: the 99th percentile inside the brain is {unit}, expected above 0."
        )

    axis = acquisition.slice_axis
    data, thinned = native._reduce(volume.nan_to_num(0, 0, 0) / unit, fine.shape)
    shape = native._triple(data.shape)
    box = brain_box((inside_1mm > 0).numpy(), shape, axis)
    profile, sensed = native._profiles(grid, fine, shape, acquisition)
    share = native._share(inside_1mm, sensed)[box.data_slices]
    data = data[box.data_slices]
    bias = native._interpolate(field, shape)[box.data_slices].exp()
    in_brain = share >= OUTSIDE
    initial = (
        native._noise_before(data, share, axis, warnings)
        if noise_sd is None
        else float(noise_sd) * thinned
    )

    around = fine.crop(box.start, box.stop)
    support = _support(inside_1mm, fine, matrix)
    part = brain_box(support.numpy(), MNI305.shape, axis)
    home = MNI305.crop(part.start, part.stop)
    resample = AffineResample(home, around, matrix)
    operator = sliced(resample, box, axis, profile, torch.where(in_brain, bias, 1.0))
    likelihood = OperatorLikelihood(
        torch.where(in_brain, data, 0.0),
        operator=operator,
        spectrum=prior.spectrum(contrast),
        spacing_mm=(1.0, 1.0, 1.0),
        support=support[part.image_slices],
        noise_sd=initial,
        extra=foreign_variance(share),
        core=core_of(share),
        device=device,
    )
    coordinates = torch.from_numpy(home.points_mm()).to(device)

    def denoise(x_t: Tensor, sigma: float) -> Tensor:
        answer = prior.denoise(x_t[None, None], sigma, coordinates=coordinates, contrast=contrast)
        return answer[0, 0]

    sigmas = daps.levels() if sampler == "daps" else edm_schedule(n_steps, sigma_max, sigma_min)
    samples: NDArray[np.float32] = np.zeros((n_samples, *MNI305.shape), np.float32)
    residuals, seeds = [], []
    left_over = torch.zeros(box.data_shape)
    for index in range(n_samples):
        seeds.append(native.sample_seed(seed, index))
        generator = torch.Generator().manual_seed(seeds[-1])
        if sampler == "daps":
            x0 = sample_daps(
                denoise, likelihood, daps, shape=home.shape, generator=generator, device=device
            )
        else:
            nothing = torch.zeros(home.shape, device=device)
            x0 = sample_exact(
                denoise,
                likelihood,
                sigmas,
                shape=home.shape,
                generator=generator,
                device=device,
                start=likelihood.draw(nothing, native.SIGMA_BLIND, generator),
            )
        z = likelihood.standardised_residual(x0)
        residuals.append(residual_of(z, likelihood.core))
        left_over += torch.where(likelihood.core, z, 0.0).cpu() / n_samples
        samples[(index, *part.image_slices)] = x0.cpu().numpy() * unit
    return native.Restoration(
        grid=MNI305,
        samples=samples,
        mean=samples.mean(0, dtype=np.float32),
        sd=samples.std(0, ddof=1, dtype=np.float32) if n_samples > 1 else None,
        log_bias=field.numpy().astype(np.float32),
        noise_sd_initial=initial / thinned,
        noise_sd=initial / thinned,
        residuals=residuals,
        residual_map=native._on_scan(left_over, box, shape, grid.shape).numpy(),
        unit=unit,
        calls=daps.calls if sampler == "daps" else n_steps,
        sampler=sampler,
        schedule=[float(s) for s in sigmas],
        seeds=seeds,
        inner_iterations=float(np.mean(likelihood.iterations)) if likelihood.iterations else 0.0,
        box=part,
        seconds=time.perf_counter() - began,
        warnings=[*warnings, *judge(residuals), *getattr(prior, "warnings", ())],
    )


def _support(mask_1mm: Tensor, fine: Grid, to_mni305: NDArray[np.float64]) -> Tensor:
    """The voxels of ``MNI305`` that lie in the brain, bool."""
    box = brain_box((mask_1mm > 0).numpy(), fine.shape, 0)
    corners = np.array(list(itertools.product(*zip(box.start, box.stop, strict=True)))).T
    voxels = np.linalg.inv(MNI305.affine) @ to_mni305 @ fine.affine
    mapped = voxels[:3, :3] @ corners + voxels[:3, 3:]
    start = native._triple(np.clip(np.floor(mapped.min(1)), 0, MNI305.shape))
    stop = native._triple(np.clip(np.ceil(mapped.max(1)) + 1, 0, MNI305.shape))
    support = torch.zeros(MNI305.shape, dtype=torch.bool)
    if all(a < b for a, b in zip(start, stop, strict=True)):
        where = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        part = AffineResample(fine, MNI305.crop(start, stop), np.linalg.inv(to_mni305))
        support[where] = part(mask_1mm) > 0.5
    if not bool(support.any()):
        raise GeometryError(
            "restore_on_mni305: no voxel of the brain lies on the MNI305 grid. Check to_mni305."
        )
    return support
