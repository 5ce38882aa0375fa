# SPDX-License-Identifier: Apache-2.0
"""Several scans of one brain in one likelihood: crossed stacks of slices, repeated scans.

``y_k = b_k * (D_k R_k x) + n_k`` for every run k, joined. x lies on the 1 mm grid of the first
run, the reference. R_k takes it to the 1 mm grid along run k's axes by the rigid motion between
the two (linear interpolation; nothing for the reference), D_k makes run k's slices of it, b_k is
its bias field and n_k its noise. What a slice of one run averages away, another run may show.

The runs' precisions decide what each has to say. A rotation inside A leaves no closed form: the
inner problem is solved by conjugate gradients (see ``general``), so the sampler is ``exact``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from brainprior_bids.engine import restore as native
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.box import Box, brain_box
from brainprior_bids.engine.consistency import Residual, judge, residual_of
from brainprior_bids.engine.device import usable_device
from brainprior_bids.engine.errors import (
    GeometryError,
    InputError,
    ShapeMismatchError,
    UsageError,
)
from brainprior_bids.engine.general import (
    OperatorLikelihood,
    core_of,
    foreign_variance,
    sliced,
)
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import OUTSIDE
from brainprior_bids.engine.memory import tells_of_memory
from brainprior_bids.engine.operators.base import LinearOperator, Stack
from brainprior_bids.engine.operators.resample import AffineResample, SparseResample
from brainprior_bids.engine.samplers.exact import sample_exact
from brainprior_bids.engine.schedules import edm_schedule

NOT_EPS = "runs are fused, and eps takes one stack of slices"


@dataclass(frozen=True, eq=False)
class Run:
    """One scan and how it lies to the reference.

    Parameters
    ----------
    name : str
        For messages.
    scan, mask, log_bias : (i, j, k)
        As in ``restore``, on ``grid``.
    grid, acquisition
        As in ``restore``.
    to_reference : (4, 4)
        Rigid: scanner RAS mm of this run -> those of the first run. Identity for the first.
    gain : float
        By which scan / bias is multiplied to be as bright as the reference's.
    """

    name: str
    scan: NDArray[np.float32]
    grid: Grid
    acquisition: Acquisition
    mask: NDArray[np.float32]
    log_bias: NDArray[np.float32] | None
    to_reference: NDArray[np.float64]
    gain: float = 1.0


@dataclass(frozen=True, eq=False)
class Explained:
    """What was found of one run; see ``Restoration`` for the units."""

    name: str
    noise_sd: float
    residuals: list[Residual]
    residual_map: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one run measured and how: data, operator from the image, share of brain in a voxel."""

    y: Tensor
    operator: LinearOperator
    share: Tensor


@dataclass(frozen=True, eq=False)
class _Part:
    """One run made ready, on its own box."""

    run: Run
    data: Tensor  # divided by unit and gain, bias in it
    bias: Tensor
    brain: Tensor  # on the 1 mm grid along the run's axes
    resample: LinearOperator
    noise_sd: float
    thinned: float
    box: Box
    shape: tuple[int, int, int]

    def seen(self, width: float) -> _Seen:
        """By slices that are ``width`` times as thick as stated."""
        grid, acquisition, box = self.run.grid, self.run.acquisition, self.box
        doubtful = 1.0 if native._encoded(grid, acquisition) else width
        profile, sensed = native._profiles(
            grid, grid.one_millimetre(), self.shape, acquisition, doubtful
        )
        share = native._share(self.brain, sensed)[box.data_slices]
        inside = share >= OUTSIDE
        bias = torch.where(inside, self.bias, 1.0)
        operator = sliced(self.resample, box, acquisition.slice_axis, profile, bias)
        return _Seen(torch.where(inside, self.data, 0.0), operator, share)


@tells_of_memory
def fuse(
    runs: Sequence[Run],
    *,
    mask_1mm: ArrayLike | Tensor,
    to_mni305: ArrayLike,
    contrast: str,
    prior: native.PriorLike,
    rim_mm: float = 0.0,
    sampler: str = "auto",
    n_samples: int = 4,
    n_steps: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observe: native.Observe | None = None,
    sigma_max: float = native.SIGMA_MAX,
    sigma_min: float = native.SIGMA_MIN,
    width_doubt: float = native.WIDTH_DOUBT,
) -> tuple[native.Restoration, list[Explained]]:
    """Draw posterior samples of the brain that all runs show.

    Parameters
    ----------
    runs : sequence of Run
        The first is the reference: the result lies on its 1 mm grid, in its unit.
    mask_1mm : array on ``runs[0].grid.one_millimetre()``
        Brain; the result is 0 where it is 0, but for the rim.
    to_mni305, contrast, prior, rim_mm, n_samples, n_steps, seed, device, observe, width_doubt
        As in ``restore``; ``to_mni305`` is the reference's. All runs of a sample are assumed to
        be off by one factor: one scanner made them.
    sampler : "auto" or "exact"
        The same: "exact".

    Returns
    -------
    (Restoration, list of Explained)
        ``residuals`` of the restoration are over all runs; its ``residual_map`` and ``log_bias``
        are the reference's. Then what was found of each run.

    Raises
    ------
    UsageError, InputError, ShapeMismatchError, GeometryError
        As ``restore``, naming the run.
    ConvergenceError
        If conjugate gradients do not converge.
    """
    began = time.perf_counter()
    warnings: list[str] = []
    if sampler not in ("auto", "exact"):
        raise UsageError(f"fuse: sampler must be auto or exact, got {sampler!r}.")
    if len(runs) < 2:
        raise UsageError(f"fuse: expected at least two runs, got {len(runs)}.")
    if n_samples < 1:
        raise UsageError(f"fuse: n_samples must be at least 1, got {n_samples}.")
    device = usable_device(device)
    first = runs[0]
    fine = first.grid.one_millimetre()
    inside = native._volume("mask_1mm", mask_1mm, fine.shape).clamp(0, 1)
    if not bool((inside > 0.5).any()):
        raise InputError("fuse: the brain mask is empty. Pass another mask.")
    inside = native._with_rim(inside, fine, rim_mm)
    matrix = np.asarray(to_mni305, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or native._singular(matrix):
        raise GeometryError(f"fuse: to_mni305 must be an invertible 4 x 4 matrix, got\n{matrix}.")

    unit, start_bias = _unit(first)
    spot = brain_box((inside > 0).numpy(), fine.shape, first.acquisition.slice_axis)
    home = fine.crop(spot.start, spot.stop)
    brain = inside[spot.image_slices]
    parts = [_prepare(run, brain, home, unit, warnings) for run in runs]
    noise_sd = min(part.noise_sd for part in parts)
    support = torch.nn.functional.max_pool3d((brain[None, None] > 0).float(), 3, 1, 1)[0, 0]

    @cache
    def measurement(width: float) -> tuple[OperatorLikelihood, Stack, list[Tensor]]:
        """The likelihood of slices that are so much wider than stated; where each run counts."""
        found = [part.seen(width) for part in parts]
        operator = Stack([seen.operator for seen in found])
        cores = [core_of(seen.share) for seen in found]
        extra = [
            (foreign_variance(seen.share) + (part.noise_sd**2 - noise_sd**2)).flatten()
            for seen, part in zip(found, parts, strict=True)
        ]
        likelihood = OperatorLikelihood(
            torch.cat([seen.y.flatten() for seen in found]),
            operator=operator,
            spectrum=prior.spectrum(contrast),
            spacing_mm=native_spacing(home),
            support=support,
            noise_sd=noise_sd,
            extra=torch.cat(extra),
            core=torch.cat([core.flatten() for core in cores]),
            device=device,
        )
        return likelihood, operator, cores

    coordinates = torch.from_numpy(home.points_mm(to=matrix)).to(device)

    def denoise(x_t: Tensor, sigma: float) -> Tensor:
        answer = prior.denoise(x_t[None, None], sigma, coordinates=coordinates, contrast=contrast)
        return answer[0, 0]

    sigmas = edm_schedule(n_steps, sigma_max, sigma_min)
    final = (brain > 0).to(device)
    samples = np.zeros((n_samples, *fine.shape), np.float32)
    expected = np.zeros(fine.shape, np.float32)
    together: list[Residual] = []
    single: list[list[Residual]] = [[] for _ in parts]
    left_over = [torch.zeros(part.box.data_shape) for part in parts]
    seeds = []
    sliced_runs = [run for run in runs if not native._encoded(run.grid, run.acquisition)]
    doubt = width_doubt if sliced_runs else 0.0
    widths = [native.slice_width(index, doubt) for index in range(n_samples)]
    for index in range(n_samples):
        likelihood, operator, cores = measurement(widths[index])
        seeds.append(native.sample_seed(seed, index))
        generator = torch.Generator().manual_seed(seeds[-1])
        conditional = torch.zeros(home.shape, device=device)

        def report(
            step: int,
            sigma: float,
            mean: Tensor,
            _: Tensor,
            index: int = index,
            conditional: Tensor = conditional,
            likelihood: OperatorLikelihood = likelihood,
        ) -> None:
            if step % 2 == 0:  # neighbours tell nearly the same
                conditional += likelihood.expect(mean, sigma)
            if observe is not None:
                observe(step, len(sigmas) - 1, sigma, index)

        nothing = torch.zeros(home.shape, device=device)
        x0 = sample_exact(
            denoise,
            likelihood,
            sigmas,
            shape=home.shape,
            generator=generator,
            device=device,
            start=likelihood.draw(nothing, native.SIGMA_BLIND, generator),
            observe=report,
        )
        x0 = x0 * final
        z = likelihood.standardised_residual(x0).cpu()
        for k, (core, values) in enumerate(zip(cores, operator.split(z), strict=True)):
            single[k].append(residual_of(values, core))
            left_over[k] += torch.where(core, values, 0.0) / n_samples
        ratio = likelihood.residual_ratio(x0)
        worst = max((s[-1] for s in single), key=lambda r: max(r.correlation))
        together.append(Residual(ratio, ratio, worst.correlation, worst.standard_error))
        samples[(index, *spot.image_slices)] = x0.cpu().numpy() * unit
        conditional *= final / (n_samples * (len(sigmas) // 2))
        expected[spot.image_slices] += conditional.cpu().numpy() * unit
    maps = [
        native._on_scan(left, part.box, part.shape, run.grid.shape).numpy()
        for left, part, run in zip(left_over, parts, runs, strict=True)
    ]
    for run, found in zip(runs, single, strict=True):
        warnings += [f"{run.name}: {text}" for text in judge(found)]
    iterations = [n for width in sorted(set(widths)) for n in measurement(width)[0].iterations]
    done = native.Restoration(
        grid=fine,
        samples=samples,
        mean=expected,
        sd=samples.std(0, ddof=1, dtype=np.float32) if n_samples > 1 else None,
        log_bias=start_bias.numpy().astype(np.float32),
        noise_sd_initial=parts[0].noise_sd / parts[0].thinned,
        noise_sd=parts[0].noise_sd / parts[0].thinned,
        residuals=together,
        residual_map=maps[0],
        unit=unit,
        calls=n_steps,
        sampler="exact",
        schedule=[float(s) for s in sigmas],
        seeds=seeds,
        widths=widths,
        inner_iterations=float(np.mean(iterations)),
        box=spot,
        seconds=time.perf_counter() - began,
        warnings=[*warnings, *getattr(prior, "warnings", ())],
        not_eps=NOT_EPS,
    )
    return done, [
        Explained(run.name, part.noise_sd / part.thinned, found, left)
        for run, part, found, left in zip(runs, parts, single, maps, strict=True)
    ]


def native_spacing(grid: Grid) -> tuple[float, float, float]:
    """Voxel size as three floats."""
    i, j, k = (float(s) for s in grid.spacing_mm)
    return i, j, k


def _unit(run: Run) -> tuple[float, Tensor]:
    """Scanner units of the brain's 99th percentile, and the centred log bias."""
    volume, inside, field = _volumes(run)
    brain = inside > 0.5
    field = field - field[brain].mean()
    unit = float(torch.quantile(native._at_most(volume[brain] / field[brain].exp()), 0.99))
    if not (math.isfinite(unit) and unit > 0):
        raise InputError(
            f"{run.name}: the 99th percentile inside the brain is {unit}, expected above 0. "
            "Is the image all zero, or negative?"
        )
    return unit, field


def _volumes(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Scan, mask and log bias; NaN outside the brain is 0."""
    try:
        volume = native._volume("scan", run.scan, run.grid.shape)
        inside = native._volume("mask", run.mask, run.grid.shape)
        field = (
            torch.zeros(run.grid.shape)
            if run.log_bias is None
            else native._volume("log_bias", run.log_bias, run.grid.shape)
        )
    except (InputError, ShapeMismatchError) as error:
        raise type(error)(f"{run.name}: {error}") from error
    brain = inside > 0.5
    if not bool(brain.any()):
        raise InputError(f"{run.name}: the brain mask is empty. Pass another mask.")
    missing = ~torch.isfinite(volume)
    if bool((missing & brain).any()):
        raise InputError(
            f"{run.name}: {int((missing & brain).sum())} voxels inside the brain are NaN or "
            "infinite. Repair the image first."
        )
    return torch.where(missing, 0.0, volume), inside, field


def _prepare(run: Run, brain: Tensor, home: Grid, unit: float, warnings: list[str]) -> _Part:
    """Data and operator of one run; ``brain`` lies on ``home``."""
    volume, inside, field = _volumes(run)
    field = field - field[inside > 0.5].mean()
    if not (math.isfinite(run.gain) and run.gain > 0):
        raise InputError(f"{run.name}: the gain must be above 0, got {run.gain}.")
    said: list[str] = []
    native._check_spacing(run.grid, run.acquisition, said)
    warnings += [f"{run.name}: {text}" for text in said]
    fine, axis = run.grid.one_millimetre(), run.acquisition.slice_axis
    data, thinned = native._reduce(volume * (run.gain / unit), fine.shape)
    shape = native._triple(data.shape)
    here = AffineResample(home, fine, run.to_reference)(brain)
    if not bool((here > 0.5).any()):
        raise InputError(f"{run.name}: none of the reference's brain lies in its field of view.")
    box = brain_box((here > 0).numpy(), shape, axis)
    _, sensed = native._profiles(run.grid, fine, shape, run.acquisition)
    y, share = data[box.data_slices], native._share(here, sensed)[box.data_slices]
    said = []
    found = native._noise_before(y, share, axis, said)
    warnings += [f"{run.name}: {text}" for text in said]
    around = fine.crop(box.start, box.stop)
    return _Part(
        run,
        y,
        native._interpolate(field, shape)[box.data_slices].exp(),
        here,
        SparseResample(home, around, run.to_reference, within=brain > 0),
        found,
        thinned,
        box,
        shape,
    )
