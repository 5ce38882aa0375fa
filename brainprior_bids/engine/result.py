# SPDX-License-Identifier: Apache-2.0
"""The result of a restoration, and how it is gathered from the samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from brainprior_bids.engine.box import Box
from brainprior_bids.engine.consistency import Residual, judge, pooled
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.problem import Problem
from brainprior_bids.engine.samplers.registry import SMOOTHING_MM


@dataclass(frozen=True, eq=False)
class ScanFit:
    """The fit of the result to one scan."""

    name: str
    noise_sd: float  # engine unit, a voxel of the scan, before sampling
    residuals: list[Residual]  # of each sample
    residual_map: NDArray[np.float32]  # on the scan's grid, in SDs of the noise; mean over samples


@dataclass(frozen=True, eq=False)
class Restoration:
    """The result of ``restore``; images are float32 on ``grid``, in scanner units, without bias
    field.
    """

    grid: Grid  # 1 mm: the reference's axes and whole field of view, or MNI305
    samples: NDArray[np.float32]  # (n, i, j, k) posterior samples, 0 beyond mask and rim
    mean: NDArray[np.float32]  # (i, j, k) estimate of the posterior mean, see ``restore``
    sd: NDArray[np.float32] | None  # (i, j, k) posterior SD, if there is one
    sd_from: str | None  # "prior" (predicted) or "samples" (at least two)
    log_bias: NDArray[np.float32]  # on the reference's grid; mean 0 in its brain
    noise_sd_initial: float  # engine unit, a voxel of the reference, before sampling
    noise_sd: float  # after sampling, mean over samples
    residuals: list[Residual]  # of each sample, over all scans
    residual_map: NDArray[np.float32]  # of the reference, see ``ScanFit``
    scans: list[ScanFit]  # of every scan, the reference first
    unit: float  # scanner units per engine unit
    calls: int  # network calls per sample
    sampler: str
    solve: str  # strategy of the linear-Gaussian solve
    schedule: list[float]
    seeds: list[int]
    inner_iterations: float  # of the solve, mean per call
    box: Box
    seconds: float
    warnings: list[str] = field(default_factory=list)
    sampler_reason: str | None = None  # why "auto" did not take the default sampler
    images: list[tuple[float, float]] = field(
        default_factory=list
    )  # gain to the scan, correlation
    predictions: NDArray[np.float32] | None = None  # (1 + n) of the reference, mean first
    thickness_factors: list[float] = field(default_factory=list)  # assumed over stated

    @property
    def residual_ratios(self) -> list[float]:
        """RMS of each sample's residual over the SD expected before sampling."""
        return [r.ratio for r in self.residuals]


def sample_sd(
    samples: NDArray[np.float32], inside: NDArray[np.bool_], spacing_mm: ArrayLike
) -> NDArray[np.float32]:
    """The SD of few samples: the square root of their variance, averaged over neighbours.

    Parameters
    ----------
    samples : (n, i, j, k)
        Two or more.
    inside : (i, j, k)
        Voxels that count; the others are 0 in the result.
    spacing_mm : 3 floats

    Returns
    -------
    (i, j, k) array
        In the unit of the samples.
    """
    weight = inside.astype(np.float32)
    width = SMOOTHING_MM / np.asarray(spacing_mm, np.float64)
    variance = samples.var(0, ddof=1, dtype=np.float32) * weight
    total = gaussian_filter(weight, width, mode="constant")
    mean = gaussian_filter(variance, width, mode="constant") / np.where(inside, total, 1)
    return np.asarray(np.sqrt(mean) * weight, np.float32)


class Gathering:
    """Samples, mean, residuals and predictions of a restoration while it runs.

    Parameters
    ----------
    problem : Problem
    n_samples : int
        0 if only a mean is computed.
    predicting : bool
        Whether to predict the reference on its own grid.
    """

    def __init__(self, problem: Problem, n_samples: int, *, predicting: bool) -> None:
        self.problem, self.n = problem, n_samples
        self.chains = max(n_samples, 1)
        self.samples = np.zeros((n_samples, *problem.grid.shape), np.float32)
        self.expected = np.zeros(problem.grid.shape, np.float32)
        self.predicted = np.zeros(problem.grid.shape, np.float32)  # variance
        self._all_predicted = True
        self.residuals: list[Residual] = []
        self.each: list[list[Residual]] = [[] for _ in problem.parts]
        self.left_over = [torch.zeros(part.box.data_shape) for part in problem.parts]
        self.noises: list[float] = []
        reference = problem.scans[0]
        self.log_bias = reference.log_bias.clone()
        shape = (predicting * (1 + n_samples), *reference.grid.shape)
        self.predictions = np.zeros(shape, np.float32)
        self.predicting = predicting

    def add(
        self,
        likelihood: Likelihood,
        x0: Tensor,
        conditional: Tensor | None,
        *,
        sd: Tensor | None = None,
    ) -> None:
        """Add the result of one chain.

        Parameters
        ----------
        x0 : (i, j, k)
            Its sample, or the mean if nothing is drawn.
        conditional : (i, j, k), optional
            Its estimate of the posterior mean; by default the sample.
        sd : (i, j, k), optional
            SD of the posterior, if the prior predicted it.
        """
        problem, index = self.problem, len(self.noises)
        x0 = x0 * problem.final
        self._explain(likelihood, x0)
        reference = likelihood.reference
        self.noises.append(reference.noise_sd / problem.reference.thinned)
        gain = 1.0
        if problem.nuisances.move_bias and problem.is_spectral:
            moved = problem.bias_on_scan(reference.nuisance.coefficients)
            gain = float(moved[problem.scans[0].mask > 0.5].mean().exp())
            self.log_bias += moved / self.chains
        scale, region = problem.unit * gain, problem.box.image_slices
        estimate = x0 if conditional is None else conditional * problem.final
        self.expected[region] += estimate.cpu().numpy() * (scale / self.chains)
        if sd is None:
            self._all_predicted = False
        else:
            own = (sd * problem.final).square().cpu().numpy()
            self.predicted[region] += own * (scale**2 / self.chains)
        if self.n:
            self.samples[(index, *region)] = x0.cpu().numpy() * scale
        if self.predicting:
            self.predictions[0] += self._predict(likelihood, estimate) / self.chains
            if self.n:
                self.predictions[1 + index] = self._predict(likelihood, x0)

    @property
    def sd_from(self) -> str | None:
        """Source of ``sd``: "prior", "samples", or None."""
        if self._all_predicted:
            return "prior"
        return "samples" if self.n > 1 else None

    def sd(self) -> NDArray[np.float32] | None:
        """(i, j, k) posterior SD: the prior's prediction, else that of two or more samples."""
        if self._all_predicted:
            return np.sqrt(self.predicted)
        if self.n < 2:
            return None
        inside = np.zeros(self.problem.grid.shape, bool)
        inside[self.problem.box.image_slices] = (self.problem.final > 0).cpu().numpy()
        return sample_sd(self.samples, inside, self.problem.grid.spacing_mm)

    def _explain(self, likelihood: Likelihood, x0: Tensor) -> None:
        for k, term in enumerate(likelihood.terms):
            residual, z = term.explain(x0)
            self.each[k].append(residual)
            self.left_over[k] += z.cpu() / self.chains
        single = [residuals[-1] for residuals in self.each]
        if len(single) == 1:
            self.residuals.append(single[0])
            return
        ratio = likelihood.residual_ratio(x0)
        worst = max(single, key=lambda r: max(r.correlation))
        self.residuals.append(Residual(ratio, ratio, worst.correlation, worst.standard_error))

    def _predict(self, likelihood: Likelihood, x: Tensor) -> NDArray[np.float32]:
        """The reference's voxels: of displaced interleaves, each where it was measured."""
        problem = self.problem
        part, axis = problem.reference, problem.given[0].acquisition.slice_axis
        whole = problem.unit * part.on_scan_grid(likelihood.reference.predict(x))
        motion = problem.given[0].interleave_motion
        count = 1 if motion is None else len(motion)
        for p in range(1, count):
            part = problem.parts[p]
            own = part.on_scan_grid(likelihood.terms[p].predict(x)) / part.observation.gain
            whole.movedim(axis, 0)[p::count] = problem.unit * own.movedim(axis, 0)[p::count]
        return whole.numpy()

    def warnings(self) -> list[str]:
        """Warnings about scans that the samples do not explain."""
        fits = self.scan_fits()
        return [
            f"{fit.name}: {text}" if len(fits) > 1 else text
            for fit in fits
            for text in judge(fit.residuals)
        ]

    def scan_fits(self) -> list[ScanFit]:
        """The fit of the result to each scan, displaced interleaves together."""
        parts = iter(zip(self.problem.parts, self.each, self.left_over, strict=True))
        fits = []
        for scan in self.problem.given:
            count = 1 if scan.interleave_motion is None else len(scan.interleave_motion)
            own, residuals, left_over = zip(*islice(parts, count), strict=True)
            fits.append(
                ScanFit(
                    scan.name,
                    float(np.mean([part.noise_sd / part.thinned for part in own])),
                    [pooled(of_sample) for of_sample in zip(*residuals, strict=True)],
                    sum(
                        part.on_scan_grid(left).numpy()
                        for part, left in zip(own, left_over, strict=True)
                    ),
                )
            )
        return fits
