# SPDX-License-Identifier: Apache-2.0
"""The one public entry: a scan and what is known of it in, posterior samples at 1 mm out.

``y = b * (A x) + n``: the scan y in its own units, brain and surroundings, not divided by its
bias field; x the brain on a 1 mm grid along the scan's axes. See ``likelihood`` for the symbols.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.anchor import AnchoredLikelihood
from brainprior_bids.engine.bias import CosineField
from brainprior_bids.engine.box import Box, brain_box
from brainprior_bids.engine.consistency import Residual, judge
from brainprior_bids.engine.device import usable_device
from brainprior_bids.engine.errors import (
    GeometryError,
    InputError,
    ShapeMismatchError,
    UsageError,
)
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.inpaint import MaskedLikelihood
from brainprior_bids.engine.likelihood import SliceLikelihood
from brainprior_bids.engine.measured import Measured
from brainprior_bids.engine.memory import tells_of_memory
from brainprior_bids.engine.noise import estimate_noise_sd
from brainprior_bids.engine.operators.fourier import resampling_matrix
from brainprior_bids.engine.operators.slices import (
    SliceProfile,
    boxcar_profile,
    slice_weights,
)
from brainprior_bids.engine.samplers.daps import DAPS_1K, DapsSettings, sample_daps
from brainprior_bids.engine.samplers.eps import sample_eps
from brainprior_bids.engine.samplers.exact import Denoise, sample_exact
from brainprior_bids.engine.samplers.map import estimate_map
from brainprior_bids.engine.schedules import edm_schedule
from brainprior_bids.engine.spectral import SpectralSolver, Spectrum
from brainprior_bids.engine.stacks import Stack
from brainprior_bids.engine.voxels import Voxels

NOISE_FLOOR = 0.005
"""Smallest noise SD assumed, engine unit: the paper's value for restoration."""
RIM_MM = 1.5
"""How far the command's restored image goes beyond the mask. Two masks of one brain differ by a
voxel along their border, and a voxel of brain that is cut off costs more than one of fluid that
is left."""
SIGMA_BLIND = 30.0
"""A level at which a denoiser sees next to nothing: V there is the power of the images
themselves. A chain starts from a draw given the data under that Gaussian alone, which costs no
network call and lets the levels begin where the network has something to say."""
MAX_TURN_DEG = 55.0
"""Of the scan against MNI305: up to 51 degrees cost the mean no more than the place does that its
slices happen to show, 65 degrees 3 % and 77 degrees 6 %."""
SIGMA_MAX = 3.0
SIGMA_MIN = 0.01
EPS_BLIND = 100.0
"""The level at which ``eps`` asks for E[x | y]."""
EPS_SIGMA_MAX = 1.5
"""Where ``eps`` starts from E[x | y]: several times what slices of 8 mm leave open."""
EPS_HOLE_SIGMA_MAX = 20.0
"""The same beside a hole: there the local mean is open as well, over many voxels."""
EPS_IN_PLANE = 2.2
"""Restored voxels to a voxel in the plane of the slices up to which it has."""
EPS_SPACING = 1.4
"""Restored voxels to a slice from which on ``eps`` has learned what 2-D slices are."""
WIDTH_DOUBT = 0.14
"""SD of the true thickness of slices over the stated one: pulses differ from what headers say, in
width and in shape. Chosen on people whose slices were 10 % off and of another shape."""
SAMPLERS = ("auto", "eps", "exact", "daps", "map")
THREE_D = 1.25
"""Slices no further apart than this times the in-plane voxel are k-space encoded (3-D)."""

Observe = Callable[[int, int, float, int], None]


class PriorLike(Protocol):
    """What ``restore`` asks of a prior (``denoiser.Prior`` is one)."""

    def denoise(
        self,
        x: Tensor,
        sigma: float,
        *,
        coordinates: Tensor,
        contrast: str,
        measured: Measured | None = None,
    ) -> Tensor:
        """(n, 1, i, j, k) noisy -> Tweedie mean; ``measured`` only where ``takes_stacks``."""
        ...

    def spectrum(self, contrast: str) -> Spectrum:
        """The calibrated error spectrum of that contrast."""
        ...


@dataclass(frozen=True, eq=False)
class Restoration:
    """What ``restore`` found; images are float32 on ``grid``, in scanner units, without bias."""

    grid: Grid  # 1 mm, the scan's axes and whole field of view
    samples: NDArray[np.float32]  # (n, i, j, k) posterior samples, 0 beyond mask and rim
    mean: NDArray[np.float32]  # (i, j, k) estimate of the posterior mean, see ``restore``
    sd: NDArray[np.float32] | None  # (i, j, k) posterior SD; None for a single sample
    log_bias: NDArray[np.float32]  # on the scan's grid; mean 0 inside the mask
    noise_sd_initial: float  # engine unit, a voxel of the scan, before sampling
    noise_sd: float  # after sampling, mean over samples
    residuals: list[Residual]  # of each sample
    residual_map: NDArray[np.float32]  # on the scan's grid, in SDs of the noise; mean over samples
    unit: float  # scanner units per engine unit
    calls: int  # network calls per sample
    sampler: str
    schedule: list[float]
    seeds: list[int]
    inner_iterations: float  # of the exact solve, mean per level
    box: Box
    seconds: float
    warnings: list[str] = field(default_factory=list)
    not_eps: str | None = None  # why "auto" took "exact"
    anchor: tuple[float, float] | None = None  # its gain to the scan, and its correlation
    predictions: NDArray[np.float32] | None = None  # (1 + n) scans, mean first
    widths: list[float] = field(default_factory=list)  # thickness in each sample over the stated

    @property
    def residual_ratios(self) -> list[float]:
        """RMS of each sample's residual over the SD expected before sampling."""
        return [r.ratio for r in self.residuals]


class LikelihoodOptions(TypedDict):
    """What the likelihoods have in common."""

    share: Tensor
    solver: SpectralSolver
    slice_axis: int
    spectrum: Spectrum
    support: Tensor
    noise_sd: float
    extra: Tensor | None
    log_bias: Tensor
    bias_field: CosineField | None
    bias_positions: list[Tensor]


class SamplerOptions(TypedDict):
    """What the samplers have in common."""

    shape: tuple[int, ...]
    generator: torch.Generator
    device: torch.device
    refine_bias: bool
    refine_noise: bool
    observe: Callable[[int, float, Tensor, Tensor], None]


def sample_seed(seed: int, index: int) -> int:
    """The seed of one sample: the first 63 bits of SHA-256 of ``"<seed>:<index>"``.

    Neighbouring seeds and indices are thereby unrelated.
    """
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def answer_weights(n_samples: int | None, n_calls: int) -> tuple[float, float]:
    """Of a chain's first answer under "eps", and of each later one, in the mean; they sum to 1.

    All estimate ``E[x | y]``. The first (``EPS_BLIND``) owes nothing to the chain's noise but is
    one call's work; the later ones are better and scatter with their sample. So between 2-D slices
    the first counts ``2 / (2 + n_samples)``: chosen on persons 04, 05 and 56 (docs/engine.md),
    where equal weights lose 0.8 dB with one sample, 0.1 dB with four, and nothing with eight.
    ``None``, beside a hole and in 3-D scans: all alike. In a hole one call knows too little.
    """
    if n_samples is None or n_calls == 1:
        return 1 / n_calls, 1 / n_calls
    first = max(2 / (2 + n_samples), 1 / n_calls)
    return first, (1 - first) / (n_calls - 1)


def slice_width(index: int, doubt: float) -> float:
    """The thickness of slices that sample ``index`` assumes, over the stated one.

    1, wider, narrower, and again: any three in a row have mean 1 and SD ``doubt`` (divided by 3,
    not by 2), and the first, or the only one, is as stated.
    """
    return 1 + (0.0, 1.0, -1.0)[index % 3] * math.sqrt(1.5) * doubt


@tells_of_memory
def restore(
    scan: ArrayLike | Tensor,
    *,
    grid: Grid,
    acquisition: Acquisition,
    mask: ArrayLike | Tensor,
    mask_1mm: ArrayLike | Tensor,
    to_mni305: ArrayLike,
    contrast: str,
    prior: PriorLike,
    rim_mm: float = 0.0,
    log_bias: ArrayLike | Tensor | None = None,
    hidden: ArrayLike | Tensor | None = None,
    on_scan: bool = False,
    noise_sd: float | ArrayLike | Tensor | None = None,
    anchor: ArrayLike | Tensor | None = None,
    anchor_sd: float | None = None,
    sampler: str = "auto",
    n_samples: int = 4,
    n_steps: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observe: Observe | None = None,
    sigma_max: float = SIGMA_MAX,
    sigma_min: float = SIGMA_MIN,
    refine_bias: bool = False,
    bias_scale_mm: float = 60.0,
    width_doubt: float = WIDTH_DOUBT,
    daps: DapsSettings = DAPS_1K,
) -> Restoration:
    """Draw posterior samples of the brain at 1 mm.

    Parameters
    ----------
    scan : (i, j, k)
        Closest-canonical (RAS) voxels in scanner units; neither skull-stripped nor divided by
        its bias field.
    grid : Grid
        Of the scan: voxel -> scanner RAS mm.
    acquisition : Acquisition
        Slice axis, thickness, spacing and profile, on those axes.
    mask : (i, j, k) in [0, 1]
        Brain on the scan's grid; sets the intensity unit and the gain of the bias field.
    mask_1mm : array on ``grid.one_millimetre()`` in [0, 1]
        Brain on the restored grid; the result is 0 where it is 0, but for the rim.
    to_mni305 : (4, 4)
        Scanner RAS mm -> MNI305 RAS mm; tells the network where each voxel lies.
    contrast : str
        "T1w", "T2w", "FLAIR" or "unknown".
    prior : Prior
        Its ``tile_mm`` decides whether the network runs in tiles.
    rim_mm : float
        How far beyond ``mask_1mm`` there may be brain: as much is restored with it, so that a
        border that is off by a voxel cuts nothing. The noise is estimated without it.
    log_bias : (i, j, k), optional
        Where the bias field starts (N4): log b. Without it, from 0.
    hidden : (i, j, k), optional
        Above 0 where the scan is not to be believed (a lesion): no measurement there. It must
        lie inside the masks.
    on_scan : bool
        Fill ``Restoration.predictions`` too, as ``hidden`` does.
    noise_sd : float or (i, j, k), optional
        Of a scan voxel, engine unit; given, it is kept. None estimates it from the scan, not
        below ``NOISE_FLOOR``, and may lower it by up to a half while sampling.
    anchor : array on ``grid.one_millimetre()``, optional
        Another tool's image of the same brain, in any unit, and
    anchor_sd : float
        how far it is trusted: SD of its error in a voxel, engine unit. See ``anchor``; not with
        ``hidden``.
    sampler : "auto", "eps", "exact", "daps" or "map"
        "eps" (see ``samplers.eps``) needs a prior that was trained to be told of measurements, a
        bias field that stays, one noise SD, and thick slices with voxels of at most 2.2 mm in
        their plane or a 3-D scan; voxels may be hidden where the scan has those of the restored
        image. "auto" takes it where all that is so, and "exact" elsewhere (``not_eps`` says why).
        ``sigma_max`` is for "exact" and "map". "daps" has its settings in ``daps`` and uses
        neither ``n_steps`` nor ``sigma_max`` and ``sigma_min``. "map" is one point estimate
        without an uncertainty, with ``n_samples=1`` only.
    n_samples, n_steps : int
        Samples, and network calls for each.
    seed : int
        Each sample has a generator of its own, seeded by ``sample_seed(seed, index)``: the same
        bytes on the same machine and settings, whatever the number of samples.
    device : torch device
        Where the volumes live; noise is drawn on the CPU.
    observe : function, optional
        ``observe(step, total, sigma, sample_index)`` after each level.
    refine_bias : bool
        Move the bias field (and the gain) while sampling, rather than keep ``log_bias``.
    bias_scale_mm : float
        Shortest half wave by which it may move.
    width_doubt : float
        SD of the true thickness of 2-D slices over the stated one. Nobody knows it, and it decides
        how bright whole structures become: each sample under "exact" and "eps" is drawn with a
        thickness of its own (``slice_width``), so that the samples differ by it too. 0: all take
        the stated one, as do "daps", "map" and 3-D scans.

    Returns
    -------
    Restoration
        ``mean`` estimates the posterior mean. Under "exact" it is the average, over samples and
        every second level, of ``E[x | x_t, y]``, which a chain knows in closed form: the same
        expectation as that of the samples with less of their randomness (Rao-Blackwell), which
        counts when samples are few. Under "eps" it is the same over all levels, where the
        network itself gives it, by ``answer_weights``. Otherwise it is the mean of the samples.

    Raises
    ------
    ShapeMismatchError
        If an array does not lie on its grid.
    GeometryError
        If the slices do not fit the field of view or the affine is singular.
    InputError
        If the mask is empty, the brain is constant or not positive, the noise SD is not above
        0, NaN lies inside the brain, in a mask or in the bias, or an array is complex.
    UsageError
        If an option makes no sense, or the device is not there.
    MemoryShortageError
        If memory runs out even in the thinnest tiles. A fallback to tiles is a warning.
    ConvergenceError, DivergenceError
        From the sampler.
    """
    began = time.perf_counter()
    warnings: list[str] = []
    if sampler not in SAMPLERS:
        raise UsageError(f"restore: sampler must be one of {SAMPLERS}, got {sampler!r}.")
    if n_samples < 1:
        raise UsageError(f"restore: n_samples must be at least 1, got {n_samples}.")
    if sampler == "map" and n_samples > 1:
        raise UsageError(
            f"restore: 'map' is a point estimate, its spread is no uncertainty; got n_samples "
            f"{n_samples}. Use n_samples=1, or the sampler 'exact'."
        )
    if anchor is not None and hidden is not None:
        raise UsageError("restore: another tool's image is taken without a lesion mask.")
    if not 0 <= width_doubt <= 0.3:
        raise UsageError(f"restore: width_doubt must be between 0 and 0.3, got {width_doubt}.")
    device = usable_device(device)
    fine = grid.one_millimetre()
    volume = _volume("scan", scan, grid.shape)
    inside = _volume("mask", mask, grid.shape)
    inside_1mm = _volume("mask_1mm", mask_1mm, fine.shape).clamp(0, 1)
    matrix = np.asarray(to_mni305, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or _singular(matrix):
        raise GeometryError(
            f"restore: to_mni305 must be an invertible 4 x 4 matrix, got\n{matrix}."
        )
    start_bias = (
        torch.zeros(grid.shape) if log_bias is None else _volume("log_bias", log_bias, grid.shape)
    )
    for name, values in (("mask", inside), ("mask_1mm", inside_1mm), ("log_bias", start_bias)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"restore: {name} holds NaN or infinite values. Make it anew.")
    brain = inside > 0.5
    if not bool(brain.any()) or not bool((inside_1mm > 0.5).any()):
        raise InputError(
            "restore: the brain mask is empty. Check the parcellation, or pass another mask."
        )
    covered = torch.zeros(grid.shape) if hidden is None else _volume("hidden", hidden, grid.shape)
    believed = brain & ~(covered > 0)
    if not bool(believed.any()):
        raise InputError("restore: the lesion mask covers the whole brain. Check the mask.")
    missing = ~torch.isfinite(volume)
    if bool((missing & believed).any()):
        raise InputError(
            f"restore: {int((missing & believed).sum())} voxels inside the brain are NaN or "
            "infinite. Repair the image first."
        )
    volume = torch.where(missing, 0.0, volume)
    start_bias = start_bias - start_bias[believed].mean()
    unit = float(torch.quantile(_at_most(volume[believed] / start_bias[believed].exp()), 0.99))
    if not (math.isfinite(unit) and unit > 0):
        raise InputError(
            f"restore: the 99th percentile inside the brain is {unit}, expected above 0. "
            "Is the image all zero, or negative?"
        )

    axis = acquisition.slice_axis
    _check_spacing(grid, acquisition, warnings)
    _check_turn(grid, matrix, warnings)
    data, thinned = _reduce(volume / unit, fine.shape)
    bias_data = _interpolate(start_bias, tuple(data.shape))
    mask_only, inside_1mm = inside_1mm, _with_rim(inside_1mm, fine, rim_mm)
    box = brain_box((inside_1mm > 0).numpy(), _triple(data.shape), axis)
    _, sensed = _profiles(grid, fine, tuple(data.shape), acquisition)
    in_mask = _share(mask_only, sensed)[box.data_slices]
    unseen = _unseen(covered, tuple(data.shape))[box.data_slices]

    estimated = noise_sd is None
    extra = None
    if noise_sd is None:
        initial = _noise_before(data[box.data_slices], in_mask * (1 - unseen), axis, warnings)
    else:
        initial, extra = _noise_given(noise_sd, brain, thinned, tuple(data.shape))
        extra = None if extra is None else extra[box.data_slices]
    spacing = fine.spacing_mm
    order = [axis, *(a for a in range(3) if a != axis)]
    extent = np.array(box.shape) * spacing
    bias_field = CosineField((float(extent[0]), float(extent[1]), float(extent[2])), bias_scale_mm)
    support = F.max_pool3d((inside_1mm[None, None] > 0).float(), 3, 1, 1)[0, 0]
    y = data[box.data_slices]

    @cache
    def measurement(width: float) -> tuple[SliceLikelihood, Tensor]:
        """The likelihood of slices that are so much wider than stated, and their weights."""
        profile, sensed = _profiles(grid, fine, tuple(data.shape), acquisition, width)
        kept = slice(box.data_start[axis], box.data_stop[axis])
        weights = profile[kept, box.start[axis] : box.stop[axis]]
        options = LikelihoodOptions(
            share=_share(inside_1mm, sensed)[box.data_slices],
            solver=SpectralSolver(
                weights,
                _triple([box.shape[a] for a in order]),
                _triple([box.data_shape[a] for a in order]),
                (float(spacing[order[0]]), float(spacing[order[1]]), float(spacing[order[2]])),
                device=device,
            ),
            slice_axis=axis,
            spectrum=prior.spectrum(contrast),
            support=support[box.image_slices],
            noise_sd=initial,
            extra=extra,
            log_bias=bias_data[box.data_slices],
            bias_field=bias_field if refine_bias else None,
            bias_positions=_positions(box, _triple(data.shape), fine.shape, box.data_slices),
        )
        if anchor is not None:
            likelihood: SliceLikelihood = AnchoredLikelihood(
                y,
                anchor=_volume("anchor", anchor, fine.shape)[box.image_slices],
                tau=float(anchor_sd if anchor_sd is not None else 0.0),
                spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
                **options,
            )
        elif hidden is not None:
            likelihood = MaskedLikelihood(y, hidden=unseen, **options)
        else:
            likelihood = SliceLikelihood(y, **options)
        return likelihood, weights

    as_stated, weights = measurement(1.0)
    coordinates = torch.from_numpy(fine.crop(box.start, box.stop).points_mm(to=matrix)).to(device)

    def denoise(x_t: Tensor, sigma: float) -> Tensor:
        answer = prior.denoise(x_t[None, None], sigma, coordinates=coordinates, contrast=contrast)
        return answer[0, 0]

    def with_data(likelihood: SliceLikelihood, weights: Tensor) -> Denoise:
        """``E[x | x_t, y]``, which ``eps`` asks the network for."""
        measured = _measured(likelihood, weights, axis, box)

        def denoise(x_t: Tensor, sigma: float) -> Tensor:
            if isinstance(likelihood, AnchoredLikelihood):
                x_t, sigma = likelihood.with_anchor(x_t, sigma)
            answer = prior.denoise(
                x_t[None, None],
                sigma,
                coordinates=coordinates,
                contrast=contrast,
                measured=measured,
            )
            return likelihood.constrain(answer[0, 0])

        return denoise

    against: str | None = None
    if sampler in ("auto", "eps"):
        against = _against_eps(
            prior,
            box,
            axis,
            hidden=hidden is not None,
            uneven=extra is not None,
            sinc=bool((weights < -0.01).any()),
            refine_bias=refine_bias,
            n_steps=n_steps,
        )
        if sampler == "eps" and against:
            raise UsageError(f"restore: sampler 'eps' cannot be used: {against}. Use 'exact'.")
        sampler = "exact" if against else "eps"
    if sampler == "eps":
        widest = EPS_SIGMA_MAX if hidden is None else EPS_HOLE_SIGMA_MAX
        sigmas = edm_schedule(n_steps - 1, widest, sigma_min)
    elif sampler == "daps":
        sigmas = daps.levels()
    else:
        sigmas = edm_schedule(n_steps, sigma_max, sigma_min)
    n_levels = len(sigmas) - (sampler != "eps")  # of eps the first call has no level
    final = inside_1mm[box.image_slices].to(device) > 0
    samples = np.zeros((n_samples, *fine.shape), np.float32)
    expected = np.zeros(fine.shape, np.float32)
    residuals: list[Residual] = []
    predicting = on_scan or hidden is not None
    predictions = np.zeros((predicting * (1 + n_samples), *grid.shape), np.float32)

    def predict(likelihood: SliceLikelihood, x: Tensor) -> NDArray[np.float32]:
        part = _on_scan(likelihood.forward(x).cpu(), box, tuple(data.shape), grid.shape)
        return (unit * part).numpy()

    left_over = torch.zeros(box.data_shape)
    three_d = _encoded(grid, acquisition)
    few = n_samples if hidden is None and not three_d else None
    answers = answer_weights(few, len(sigmas))
    noises, seeds = [], []
    doubt = width_doubt if sampler in ("exact", "eps") and not three_d else 0.0
    widths = [slice_width(index, doubt) for index in range(n_samples)]
    everywhere = bias_field.basis(
        _positions(
            box,
            _triple(data.shape),
            fine.shape,
            tuple(slice(0, n) for n in grid.shape),
            grid.shape,
        )
    )
    start_and_found = start_bias.clone()
    for index in range(n_samples):
        likelihood, weights = measurement(widths[index])
        likelihood.reset()
        seeds.append(sample_seed(seed, index))
        generator = torch.Generator().manual_seed(seeds[-1])

        conditional = torch.zeros(box.shape, device=device)

        def report(
            step: int,
            sigma: float,
            mean: Tensor,
            _: Tensor,
            index: int = index,
            conditional: Tensor = conditional,
            likelihood: SliceLikelihood = likelihood,
        ) -> None:
            if sampler == "exact" and step % 2 == 0:  # neighbours tell nearly the same
                conditional += likelihood.expect(mean, sigma)
            if sampler == "eps":
                conditional += mean * answers[min(step, 1)]
            if observe is not None:
                observe(step, n_levels, sigma, index)

        options = SamplerOptions(
            shape=box.shape,
            generator=generator,
            device=device,
            refine_bias=refine_bias,
            refine_noise=estimated,
            observe=report,
        )
        if sampler == "daps":
            x0 = sample_daps(denoise, likelihood, daps, **options)
        elif sampler == "eps":
            x0 = sample_eps(
                with_data(likelihood, weights),
                sigmas,
                shape=box.shape,
                generator=generator,
                blind=EPS_BLIND,
                inflation=1.0 if hidden is not None else getattr(prior, "inflation", 1.0),
                device=device,
                observe=report,
            )
        elif sampler == "map":
            start = likelihood.expect(torch.zeros(box.shape, device=device), SIGMA_BLIND)
            x0 = estimate_map(denoise, likelihood, sigmas, start=start, **options)
        else:
            nothing = torch.zeros(box.shape, device=device)
            start = likelihood.draw(nothing, SIGMA_BLIND, generator)
            x0 = sample_exact(denoise, likelihood, sigmas, start=start, **options)
        x0 = x0 * final
        found, z = likelihood.explain(x0)
        residuals.append(found)
        left_over += z.cpu() / n_samples
        noises.append(likelihood.noise_sd / thinned)
        gain = 1.0
        if refine_bias:
            moved = bias_field.evaluate(likelihood.coefficients, everywhere)
            gain = float(moved[brain].mean().exp())
            start_and_found += moved / n_samples
        if predicting:
            predictions[1 + index] = predict(likelihood, x0)
        samples[(index, *box.image_slices)] = x0.cpu().numpy() * (unit * gain)
        if sampler in ("exact", "eps"):
            terms = len(sigmas) // 2 if sampler == "exact" else 1
            conditional *= final / (n_samples * terms)
            if predicting:
                predictions[0] += predict(likelihood, conditional)
            expected[box.image_slices] += conditional.cpu().numpy() * (unit * gain)
        elif predicting:
            predictions[0] += predictions[1 + index] / n_samples
    start_and_found -= start_and_found[believed].mean()
    iterations = [n for width in sorted(set(widths)) for n in measurement(width)[0].iterations]
    warnings += judge(residuals)
    return Restoration(
        grid=fine,
        samples=samples,
        mean=expected if sampler in ("exact", "eps") else samples.mean(0, dtype=np.float32),
        sd=samples.std(0, ddof=1, dtype=np.float32) if n_samples > 1 else None,
        anchor=(
            (as_stated.gain, as_stated.correlation)
            if isinstance(as_stated, AnchoredLikelihood)
            else None
        ),
        predictions=predictions if predicting else None,
        log_bias=start_and_found.numpy().astype(np.float32),
        noise_sd_initial=initial / thinned,
        noise_sd=float(np.mean(noises)),
        residuals=residuals,
        residual_map=_on_scan(left_over, box, tuple(data.shape), grid.shape).numpy(),
        unit=unit,
        calls=daps.calls if sampler == "daps" else n_steps,
        sampler=sampler,
        not_eps=against,
        schedule=[float(s) for s in sigmas],
        seeds=seeds,
        widths=widths,
        inner_iterations=float(np.mean(iterations)) if iterations else 0.0,
        box=box,
        seconds=time.perf_counter() - began,
        warnings=[*warnings, *getattr(prior, "warnings", ())],
    )


def _against_eps(
    prior: PriorLike,
    box: Box,
    axis: int,
    *,
    hidden: bool,
    uneven: bool,
    sinc: bool,
    refine_bias: bool,
    n_steps: int,
) -> str | None:
    """Why ``eps`` cannot be used, or None."""
    takes_holes = getattr(prior, "takes_holes", False)
    if not getattr(prior, "takes_stacks", False):
        return "the prior was not trained to be told of measurements"
    if refine_bias:
        return "it does not move the bias field"
    if uneven:
        return "the noise differs between voxels"
    if n_steps < 2:
        return "it needs at least 2 network calls"
    if box.shape == box.data_shape:
        return None if takes_holes else "the prior was not trained on scans with holes"
    if hidden:
        return "voxels are hidden of a scan that is coarser than the restored image"
    if any(a != axis and box.shape[a] > EPS_IN_PLANE * box.data_shape[a] for a in range(3)):
        return f"voxels in the plane of the slices are above {EPS_IN_PLANE} restored ones"
    thin = box.shape[axis] < EPS_SPACING * box.data_shape[axis]
    if thin and not (sinc and takes_holes):
        return "the slices are as thin as the restored voxels"
    return None


def _measured(likelihood: SliceLikelihood, weights: Tensor, axis: int, box: Box) -> Measured:
    """The scan as ``eps`` is told of it."""
    if box.shape == box.data_shape:
        return _voxels(likelihood)
    return _stack(likelihood, weights, axis)


def _voxels(likelihood: SliceLikelihood) -> Voxels:
    """A scan on the restored grid, divided by its bias field, 0 outside the brain.

    Voxels that are partly outside the brain are hidden.
    """
    nothing = torch.zeros_like(likelihood.support).movedim(0, likelihood.axis)
    known, unknown = likelihood.brain_alone(nothing), likelihood.partly_seen()
    return Voxels(known.cpu(), unknown.cpu(), likelihood.noise_sd)


def _stack(likelihood: SliceLikelihood, weights: Tensor, axis: int) -> Stack:
    """The scan as ``eps`` sees it: divided by its bias field, 0 outside the brain.

    Where a voxel shows brain and something else, what the brain alone would have given is not
    known; the Gaussian estimate of it is put there.
    """
    nothing = torch.zeros_like(likelihood.support).movedim(0, axis)
    gaussian = likelihood.expect(nothing, SIGMA_BLIND)
    alone = likelihood.brain_alone(gaussian).cpu()
    kept = []
    for a in range(3):
        n, m = alone.shape[a], nothing.shape[a]
        if a != axis:
            kept.append(n / m)
            alone = SliceProfile(resampling_matrix(n, m), tuple(alone.shape), a)(alone)
    noise_sd = likelihood.noise_sd / math.sqrt(kept[0] * kept[1])
    return Stack(alone, weights.double().cpu(), axis, noise_sd, (kept[0], kept[1]))


def _with_rim(mask: Tensor, grid: Grid, rim_mm: float) -> Tensor:
    """1 where the mask is above 0 or no further than ``rim_mm`` away; without a rim, the mask."""
    if not 0 <= rim_mm < math.inf:
        raise UsageError(f"restore: rim_mm must be at least 0, got {rim_mm}.")
    reach = [int(rim_mm / s) for s in grid.spacing_mm]
    if not any(reach):
        return mask
    steps = torch.meshgrid(
        *(torch.arange(-n, n + 1) * s for n, s in zip(reach, grid.spacing_mm, strict=True)),
        indexing="ij",
    )
    ball = (torch.stack(steps).norm(dim=0) <= rim_mm).float()
    touched = F.conv3d((mask > 0).float()[None, None], ball[None, None], padding=reach)[0, 0]
    return (touched > 0.5).float()


def _volume(name: str, values: ArrayLike | Tensor, shape: tuple[int, int, int]) -> Tensor:
    tensor = (
        values.detach().cpu()
        if isinstance(values, Tensor)
        else torch.from_numpy(np.ascontiguousarray(np.asarray(values)))
    )
    if tuple(tensor.shape) != shape:
        raise ShapeMismatchError(
            f"restore: {name} must have shape {shape}, got {tuple(tensor.shape)}. "
            "scan, mask and log_bias lie on the scan's grid, mask_1mm on grid.one_millimetre()."
        )
    if tensor.is_complex():
        raise InputError(f"restore: {name} is complex ({tensor.dtype}). Pass its magnitude.")
    return tensor.to(torch.float32)


def _triple(values: Any) -> tuple[int, int, int]:
    return (int(values[0]), int(values[1]), int(values[2]))


def _singular(matrix: NDArray[np.float64]) -> bool:
    return bool(abs(np.linalg.det(matrix[:3, :3])) < 1e-9)


def _at_most(values: Tensor, n: int = 8_000_000) -> Tensor:
    """Every so-manieth value, so that torch.quantile takes it (its limit is 2^24)."""
    return values[:: max(1, -(-values.numel() // n))]


def _check_spacing(grid: Grid, acquisition: Acquisition, warnings: list[str]) -> None:
    """The header's slice spacing is what the voxels have; the acquisition only says it again."""
    spacing = float(grid.spacing_mm[acquisition.slice_axis])
    if abs(acquisition.spacing_mm - spacing) > 0.05 * spacing:
        warnings.append(
            f"Slices are {spacing:.3g} mm apart in the image but "
            f"{acquisition.spacing_mm:.3g} mm by its description; the image is believed."
        )
    extent = float(grid.extent_mm[acquisition.slice_axis])
    for what, value in (
        (f"slices of {acquisition.thickness_mm} mm", acquisition.thickness_mm),
        (f"slices {acquisition.spacing_mm} mm apart", acquisition.spacing_mm),
    ):
        if value > extent * (1 + 1e-6):
            raise GeometryError(
                f"restore: {what} do not fit a field of view of {extent:.4g} mm. Check "
                "SliceThickness and SpacingBetweenSlices."
            )


def _check_turn(grid: Grid, to_mni305: NDArray[np.float64], warnings: list[str]) -> None:
    """Warn of a scan whose axes are turned further from MNI305's than brains in training were."""
    u, _, vt = np.linalg.svd(to_mni305[:3, :3] @ (grid.affine[:3, :3] / grid.spacing_mm))
    turn = math.degrees(math.acos(min(max((float(np.trace(u @ vt)) - 1) / 2, -1.0), 1.0)))
    if turn > MAX_TURN_DEG:
        warnings.append(
            f"The scan's axes are turned by {turn:.0f} degrees against MNI305's; above "
            f"{MAX_TURN_DEG:.0f} the result is a little less accurate than its uncertainty says."
        )


def _reduce(volume: Tensor, fine_shape: tuple[int, int, int]) -> tuple[Tensor, float]:
    """Bring axes that are finer than the image to its grid by a k-space crop.

    The prior knows nothing beyond 1 mm, so the low frequencies are all that the data say of x.
    Returns the data, and the factor by which the crop lowers the SD of white noise.
    """
    factor = 1.0
    for axis in range(3):
        n, m = fine_shape[axis], volume.shape[axis]
        if m > n:
            volume = SliceProfile(resampling_matrix(m, n), tuple(volume.shape), axis)(volume)
            factor *= math.sqrt(n / m)
    return volume, factor


def _on_scan(
    part: Tensor, box: Box, data_shape: tuple[int, ...], scan_shape: tuple[int, int, int]
) -> Tensor:
    """From the box of the data to the scan's grid, 0 outside; the reverse of ``_reduce``."""
    whole = torch.zeros(data_shape)
    whole[box.data_slices] = part
    for axis in range(3):
        n, m = whole.shape[axis], scan_shape[axis]
        if m > n:
            whole = SliceProfile(resampling_matrix(n, m), tuple(whole.shape), axis)(whole)
    return whole


def _unseen(covered: Tensor, shape: tuple[int, ...]) -> Tensor:
    """1 where a data voxel shows anything of the hidden part.

    Where the scan was reduced, its k-space crop spreads a hidden voxel to its neighbours: one
    voxel more is hidden.
    """
    hidden = (covered > 0).float()[None, None]
    if tuple(covered.shape) != tuple(shape):
        hidden = F.max_pool3d(F.adaptive_max_pool3d(hidden, shape), 3, 1, 1)
    return hidden[0, 0]


def _interpolate(volume: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Linear interpolation between grids whose edges meet; for smooth fields."""
    if tuple(volume.shape) == tuple(shape):
        return volume
    return F.interpolate(volume[None, None], size=shape, mode="trilinear")[0, 0]


def _encoded(grid: Grid, acquisition: Acquisition) -> bool:
    """Whether the slices are those of a 3-D scan, encoded in k-space."""
    axis = acquisition.slice_axis
    spacing = float(grid.spacing_mm[axis])
    in_plane = max(float(s) for a, s in enumerate(grid.spacing_mm) if a != axis)
    return spacing <= THREE_D * max(in_plane, 1.0) and abs(acquisition.gap_mm) < 0.1 * spacing


def _profiles(
    grid: Grid,
    fine: Grid,
    data_shape: tuple[int, ...],
    acquisition: Acquisition,
    width: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """W for the slice axis, and per axis a non-negative version of what a data voxel sees.

    ``width`` is the thickness over that of the acquisition.
    """
    axis = acquisition.slice_axis
    sensed = []
    for a in range(3):
        extent = float(fine.extent_mm[a])
        sensed.append(
            slice_weights(
                boxcar_profile(extent / data_shape[a]),
                n_slices=data_shape[a],
                spacing_mm=extent / data_shape[a],
                n_thin=fine.shape[a],
                thin_mm=extent / fine.shape[a],
            )
        )
    if _encoded(grid, acquisition):
        return resampling_matrix(fine.shape[axis], data_shape[axis]), sensed
    extent = float(fine.extent_mm[axis])
    weights = slice_weights(
        acquisition.cumulative(width),
        n_slices=data_shape[axis],
        spacing_mm=extent / data_shape[axis],
        n_thin=fine.shape[axis],
        thin_mm=extent / fine.shape[axis],
    )
    sensed[axis] = weights
    return weights, sensed


def _share(mask_1mm: Tensor, sensed: list[Tensor]) -> Tensor:
    share = mask_1mm
    for axis, weights in enumerate(sensed):
        share = SliceProfile(weights, tuple(share.shape), axis)(share)
    return share.clamp(0, 1)


def _noise_given(
    noise_sd: float | ArrayLike | Tensor,
    brain: Tensor,
    thinned: float,
    data_shape: tuple[int, ...],
) -> tuple[float, Tensor | None]:
    """The smallest SD of the data's voxels, and the variance beyond it where it is a map."""
    if isinstance(noise_sd, (int, float)):
        return float(noise_sd) * thinned, None
    sd = _volume("noise_sd", noise_sd, _triple(brain.shape))
    if not bool(torch.isfinite(sd[brain]).all()) or not bool((sd[brain] > 0).all()):
        raise InputError(
            "restore: the map of the noise SD must be finite and above 0 everywhere in the brain."
        )
    lowest = float(sd[brain].min())
    sd = _interpolate(torch.where(brain, sd, lowest), data_shape)
    return lowest * thinned, (sd.square() - lowest**2).clamp_min(0) * thinned**2


def _noise_before(data: Tensor, share: Tensor, axis: int, warnings: list[str]) -> float:
    found = estimate_noise_sd(data, share > 0.9, axis)
    if found is None:
        warnings.append(
            f"Too few voxels to estimate the noise; an SD of {NOISE_FLOOR} was assumed."
        )
        return NOISE_FLOOR
    return max(found, NOISE_FLOOR)


def _positions(
    box: Box,
    data_shape: tuple[int, int, int],
    fine_shape: tuple[int, int, int],
    part: tuple[slice, ...],
    of_shape: tuple[int, int, int] | None = None,
) -> list[Tensor]:
    """Relative positions (0 and 1 at the box's edges) of the voxels ``part`` of a grid that
    spans the field of view with ``of_shape`` (default: the data's) voxels."""
    positions = []
    for a in range(3):
        n = (of_shape or data_shape)[a]
        index = torch.arange(n, dtype=torch.float64)[part[a]]
        at = (index + 0.5) * fine_shape[a] / n  # in 1 mm voxels from the edge
        positions.append((at - box.start[a]) / (box.stop[a] - box.start[a]))
    return positions
