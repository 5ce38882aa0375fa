# SPDX-License-Identifier: Apache-2.0
"""The public entry point: from observations of a brain and a prior to posterior samples at 1 mm.

``y_k = b_k * (A_k x) + n_k``: each scan y_k in its own units, brain and surroundings, not divided
by its bias field; x the brain on the home grid. See ``likelihood`` for the symbols.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brainprior_bids.engine.conditioning import (
    SIGMA_BLIND,
    Conditioning,
    Denoise,
    GivenDenoiser,
    PriorLike,
)
from brainprior_bids.engine.device import usable_device
from brainprior_bids.engine.errors import InputError, SamplerError, UsageError
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.memory import explains_memory
from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import (
    ImageObservation,
    Observation,
    as_volume,
    checked_matrix,
    observations_of,
)
from brainprior_bids.engine.problem import HOMES, Problem
from brainprior_bids.engine.result import Gathering, Restoration
from brainprior_bids.engine.samplers import conditional, registry
from brainprior_bids.engine.samplers.conditional import answer_weights, sample_conditional
from brainprior_bids.engine.samplers.daps import DAPS_1K, DapsSettings, sample_daps
from brainprior_bids.engine.samplers.exact import sample_exact
from brainprior_bids.engine.samplers.mean import expected_image
from brainprior_bids.engine.schedules import edm_schedule

RIM_MM = 1.5
"""Width of the rim by which the command's restored image extends beyond the mask. Two masks of one
brain differ by a voxel along their border, and losing a voxel of brain costs more than keeping one
of fluid."""
NO_SPREAD = (
    "The prior does not predict the uncertainty, and nothing was sampled: there is no uncertainty "
    "map. Use --sampler conditional, or weights that were trained with --spread."
)
AS_USUAL = Nuisances()
SIGMA_MAX = 3.0
SIGMA_MIN = 0.01

Observe = Callable[[int, int, float, int], None]


def sample_seed(seed: int, index: int) -> int:
    """The seed of one sample: the first 63 bits of SHA-256 of ``"<seed>:<index>"``.

    Neighbouring seeds and indices are therefore unrelated.
    """
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@explains_memory
def restore(
    observations: Observation | ImageObservation | Sequence[Observation | ImageObservation],
    *,
    mask_1mm: ArrayLike | Tensor,
    to_mni305: ArrayLike,
    contrast: str,
    prior: PriorLike,
    rim_mm: float = 0.0,
    home: str = "scan",
    on_scan: bool = False,
    nuisances: Nuisances = AS_USUAL,
    sampler: str = "auto",
    n_samples: int = 4,
    n_steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observe: Observe | None = None,
    sigma_max: float = SIGMA_MAX,
    sigma_min: float = SIGMA_MIN,
    daps: DapsSettings = DAPS_1K,
) -> Restoration:
    """Draw posterior samples of the brain at 1 mm.

    Parameters
    ----------
    observations : Observation, or several
        Scans of one brain, the reference first, and other tools' images of it
        (``ImageObservation``). The result lies on the reference's 1 mm grid, in its unit.
    mask_1mm : array on ``grid.one_millimetre()`` of the reference, in [0, 1]
        Brain; the result is 0 outside the mask and its rim.
    to_mni305 : (4, 4)
        Scanner RAS mm of the reference -> MNI305 RAS mm; the network receives the MNI305
        coordinates of each voxel.
    contrast : str
        "T1w", "T2w", "FLAIR" or "unknown".
    prior : Prior
        Its ``tile_mm`` determines whether the network runs in tiles.
    rim_mm : float
        Width of the rim beyond ``mask_1mm`` that is restored too, so that a border that is off by
        a voxel loses no brain. The noise is estimated without it.
    home : "scan" or "MNI305"
        Grid of the unknown. With "MNI305" the affine is part of the forward model (the form of
        arXiv 2510.15119): for scans rotated beyond the training range of the network, at ten times
        the cost.
    on_scan : bool
        Also fill ``Restoration.predictions``, as for hidden voxels of the reference.
    nuisances : Nuisances
        How slice thickness and bias field are treated.
    sampler : "auto" or a name in ``samplers.registry``
        "auto": "conditional" if the network can be conditioned on the reference's measurements,
        otherwise "exact" (``sampler_reason`` states why). The requirements of "mean" and
        "conditional" are in ``Conditioning.obstacle``.
    n_samples, n_steps : int
        Number of samples, and of noise levels of each chain (None: the default in
        ``samplers.registry``). "mean" draws no samples and makes one call for each of
        the prior's ``positions``; "daps" has its own
        levels in ``daps``.
    seed : int
        Each sample has its own generator, seeded by ``sample_seed(seed, index)``: with the same
        machine and settings the bytes are the same, for any number of samples.
    device : torch device
        Device of the volumes; noise is drawn on the CPU.
    observe : function, optional
        ``observe(step, total, sigma, sample_index)`` after each level.
    sigma_max, sigma_min : float
        Noise levels between which "exact" runs; "conditional" ends at ``sigma_min``.

    Returns
    -------
    Restoration
        ``mean`` estimates the posterior mean, see ``estimate`` in ``samplers.registry``: averages
        of the expectations along a chain are less random than its sample (Rao-Blackwell), which
        matters if there are few samples.

    Raises
    ------
    ShapeMismatchError, GeometryError, InputError
        As ``Observation`` and ``Problem``.
    UsageError
        If an option makes no sense, or the device does not exist.
    MemoryShortageError
        If memory runs out even in the thinnest tiles. A fallback to tiles is a warning.
    ConvergenceError, DivergenceError
        From the sampler.
    """
    began = time.perf_counter()
    scans, images = observations_of(observations)
    _check(sampler, n_samples, home, images)
    torch_device = usable_device(device)
    mask = as_volume("mask_1mm", mask_1mm, scans[0].grid.one_millimetre().shape, "restore")
    if not bool(torch.isfinite(mask).all()):
        raise InputError("restore: mask_1mm holds NaN or infinite values. Recreate it.")
    problem = Problem(
        scans,
        mask=mask.clamp(0, 1),
        rim_mm=rim_mm,
        to_mni305=checked_matrix(to_mni305, "restore: to_mni305"),
        home=home,
        nuisances=nuisances,
        device=torch_device,
    )
    view = Conditioning(prior, problem, contrast, images)
    name, reason = choose_sampler(
        sampler, view.obstacle(), n_steps=n_steps, n_scans=len(problem.scans)
    )
    levels = n_steps
    if levels is None:
        simple = len(scans) == 1 and not problem.any_hidden
        levels = registry.find(name).levels(None, simple=simple)
    chain = Chain(name, problem, view, n_samples, levels, (sigma_max, sigma_min), daps)
    n = n_samples if chain.facts.yields_samples else 0
    gathering = Gathering(problem, n, predicting=on_scan or problem.any_hidden)
    seeds = [sample_seed(seed, index) for index in range(max(n, 1))]
    varies = chain.facts.own_thickness and not problem.thickness_is_known
    factors = [nuisances.thickness_factor(index) if varies else 1.0 for index in range(len(seeds))]
    for index, (own_seed, factor) in enumerate(zip(seeds, factors, strict=True)):
        generator = torch.Generator().manual_seed(own_seed)
        gathering.add(*chain.run(factor, generator, index, observe), sd=chain.sd)
    fits = gathering.scan_fits()
    log_bias = gathering.log_bias - gathering.log_bias[problem.scans[0].brain].mean()
    iterations, reference = problem.iterations(), problem.reference
    return Restoration(
        grid=problem.grid,
        samples=gathering.samples,
        mean=gathering.expected,
        sd=gathering.sd(),
        sd_from=gathering.sd_from,
        log_bias=log_bias.numpy().astype(np.float32),
        noise_sd_initial=reference.noise_sd / reference.thinned,
        noise_sd=float(np.mean(gathering.noises)),
        residuals=gathering.residuals,
        residual_map=fits[0].residual_map,
        scans=fits,
        unit=problem.unit,
        calls=chain.calls,
        sampler=name,
        solve=problem.likelihood(view.spectrum, factors[0]).solve.name,
        schedule=[float(s) for s in chain.sigmas],
        seeds=seeds,
        inner_iterations=float(np.mean(iterations)) if iterations else 0.0,
        box=problem.box,
        seconds=time.perf_counter() - began,
        warnings=[
            *problem.warnings,
            *gathering.warnings(),
            *getattr(prior, "warnings", ()),
            *([NO_SPREAD] if name == "mean" and gathering.sd_from is None else []),
        ],
        sampler_reason=reason,
        images=[] if view.image is None else list(view.image.fits),
        predictions=gathering.predictions if gathering.predicting else None,
        thickness_factors=factors,
    )


def _check(sampler: str, n_samples: int, home: str, images: Sequence[ImageObservation]) -> None:
    """Refuse options that make no sense."""
    if sampler not in registry.NAMES:
        raise UsageError(f"restore: sampler must be one of {registry.NAMES}, got {sampler!r}.")
    if n_samples < 1:
        raise UsageError(f"restore: n_samples must be at least 1, got {n_samples}.")
    if home not in HOMES:
        raise UsageError(f"restore: home must be one of {HOMES}, got {home!r}.")
    if images and home != "scan":
        raise UsageError(
            "restore: another tool's image goes with home='scan' only: resampled to MNI305, its "
            "error would no longer be white."
        )


def choose_sampler(
    asked: str, obstacle: str | None, *, n_steps: int | None, n_scans: int
) -> tuple[str, str | None]:
    """The sampler to use, and the reason if "auto" did not select the default one.

    Parameters
    ----------
    asked : str
        In ``samplers.registry.NAMES``.
    obstacle : str or None
        Why the network cannot be conditioned on the reference's measurements.
    n_steps : int or None
        Number of noise levels; None for the sampler's default.
    n_scans : int
        Number of scans that are combined.

    Raises
    ------
    SamplerError
        If the requested one cannot be used.
    """
    if asked not in ("auto", "conditional", "mean"):
        return asked, None
    if asked != "mean" and n_steps is not None and n_steps < 2:
        obstacle = obstacle or "it needs at least 2 network calls"
    if asked == "mean" and n_scans > 1:
        obstacle = obstacle or "one call can be conditioned on one scan, and several are fused"
    if obstacle is None:
        return ("mean" if asked == "mean" else registry.DEFAULT.name), None
    if asked == "auto":
        return registry.FALLBACK.name, obstacle
    raise SamplerError(asked, obstacle)


class Chain:
    """One sample, drawn by a named sampler.

    Parameters
    ----------
    name : str
        In ``samplers.registry``.
    problem : Problem
    view : Conditioning
        The prior for this problem.
    n_samples, n_steps : int
    sigmas : (float, float)
        Highest and lowest noise level of "exact".
    daps : DapsSettings

    Attributes
    ----------
    sigmas : list of float
        The noise levels; the last is 0.
    calls : int
        Network calls of one sample.
    sd : (i, j, k) tensor or None
        SD of x given the scan, as predicted by the prior in the last run; None if it was not
        predicted.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        view: Conditioning,
        n_samples: int,
        n_steps: int,
        sigmas: tuple[float, float],
        daps: DapsSettings,
    ) -> None:
        self.facts, self.problem, self.view, self.daps = registry.find(name), problem, view, daps
        self.calls, self.total = n_steps, n_steps
        if name == "conditional":
            widest = conditional.HOLE_SIGMA_MAX if problem.any_hidden else conditional.SIGMA_MAX
            self.sigmas = edm_schedule(n_steps - 1, widest, sigmas[1])
            few = None if problem.any_hidden or problem.thickness_is_known else n_samples
            self.answers = answer_weights(few, len(self.sigmas))
        elif name == "mean":
            self.sigmas, self.calls, self.total = [conditional.BLIND, 0.0], len(view.positions), 1
        elif name == "daps":
            self.sigmas = daps.levels()
            self.calls, self.total = daps.calls, len(self.sigmas) - 1
        else:
            self.sigmas = edm_schedule(n_steps, *sigmas)
        self._every_level = name == "conditional" and len(problem.scans) == 1
        self.conditional: Tensor | None = None
        self.sd: Tensor | None = None
        self._answers: dict[float, tuple[Tensor, Tensor | None]] = {}

    def run(
        self, factor: float, generator: torch.Generator, index: int, observe: Observe | None
    ) -> tuple[Likelihood, Tensor, Tensor | None]:
        """The likelihood, its sample, and the chain's estimate of the mean if it has one.

        Parameters
        ----------
        factor : float
            Ratio of assumed to stated slice thickness.
        """
        likelihood = self.problem.likelihood(self.view.spectrum, factor)
        likelihood.reset()
        self.conditional = torch.zeros(self.problem.box.shape, device=self.problem.device)
        given = self.facts.name == "conditional"

        def note(step: int, sigma: float, mean: Tensor, _: Tensor) -> None:
            assert self.conditional is not None
            if self._every_level:
                self.conditional += mean * self.answers[min(step, 1)]
            elif self.facts.name in ("exact", "conditional") and step % 2 == 0:
                # neighbouring levels carry nearly the same information
                terms = len(self.sigmas) // 2
                self.conditional += likelihood.expect(mean, sigma, given=given) / terms
            if observe is not None:
                observe(step, self.total, sigma, index)

        x0 = self._draw(likelihood, factor, generator, note)
        averaged = self.facts.name in ("exact", "conditional")
        return likelihood, x0, self.conditional if averaged else None

    def _draw(
        self,
        likelihood: Likelihood,
        factor: float,
        generator: torch.Generator,
        note: Callable[[int, float, Tensor, Tensor], None],
    ) -> Tensor:
        problem, view, name = self.problem, self.view, self.facts.name
        shape, device = problem.box.shape, problem.device
        if name == "mean" or self._every_level:
            given = view.denoiser_given(likelihood, factor, averaged=name == "mean")
            return self._draw_given(given, factor, generator, note)
        denoise: Denoise = view.denoiser()
        bias, noise = problem.nuisances.move_bias, problem.scans[0].noise_sd is None
        if name == "daps":
            return sample_daps(
                denoise,
                likelihood,
                self.daps,
                shape=shape,
                generator=generator,
                device=device,
                refine_bias=bias,
                refine_noise=noise,
                observe=note,
            )
        with_data, guess = name == "conditional", view.guess
        if with_data:
            denoise = given = view.denoiser_given(likelihood, factor)
            guess, _ = self._first_answer(given, factor)
        return sample_exact(
            denoise,
            likelihood,
            self.sigmas,
            shape=shape,
            generator=generator,
            device=device,
            start=likelihood.draw(guess, SIGMA_BLIND, generator, given=with_data),
            given=with_data,
            refine_bias=bias,
            refine_noise=noise,
            observe=note,
        )

    def _first_answer(self, denoise: GivenDenoiser, factor: float) -> tuple[Tensor, Tensor | None]:
        """E[x | y] and its SD: one call for all samples that assume the same slice thickness."""
        if factor not in self._answers:
            shape, device = self.problem.box.shape, self.problem.device
            expected = expected_image(denoise, shape=shape, device=device)
            self._answers[factor] = expected, denoise.sd
        return self._answers[factor]

    def _draw_given(
        self,
        denoise: GivenDenoiser,
        factor: float,
        generator: torch.Generator,
        note: Callable[[int, float, Tensor, Tensor], None],
    ) -> Tensor:
        """A sample or the mean, from a network conditioned on all measurements."""
        expected, self.sd = self._first_answer(denoise, factor)
        if self.facts.name == "mean":
            note(0, self.sigmas[0], expected, expected)
            return expected
        inflation = 1.0 if self.problem.any_hidden else getattr(self.view.prior, "inflation", 1.0)
        return sample_conditional(
            denoise,
            self.sigmas,
            expected=expected,
            generator=generator,
            inflation=inflation,
            observe=note,
        )
