# SPDX-License-Identifier: Apache-2.0
"""Degrade a brain, restore it with every method, and compare the results with the truth.

The truth is a brain at 1 mm (``Participant``); a ``Condition`` specifies how its scan is simulated
(by ``degrade``, whose slice profile is not the engine's) and how it is restored. ``measure``
returns a JSON-serialisable record with one row per method:

* ``linear``, ``cubic``: interpolation along all axes;
* ``tikhonov``, ``tv``: given the true slice weights, penalties tuned on other participants;
* ``sample``: one posterior sample; ``restored``: ``desc-restored`` of all samples.

Every image is multiplied by its least-squares gain on the truth. With a block (``crop_mm``) the
engine and the classical methods are given only that block of the scan; its outer millimetres,
which have less context than in a whole brain, are excluded from all metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, wasserstein_distance

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.extract import ExtractedBrain, extract_brain
from brainprior_bids.anatomy.parcellation import parcellate, structure_names
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.denoiser import Prior
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration
from brainprior_bids.evaluation.baselines import interpolate, tikhonov, total_variation
from brainprior_bids.evaluation.degrade import (
    Recipe,
    averaging_weights,
    coarse_in_plane,
    degrade,
    thick_slices,
)
from brainprior_bids.evaluation.metrics import compare, crps, matching_gain
from brainprior_bids.evaluation.perceptual import lpips_distance
from brainprior_bids.evaluation.scans import Volume
from brainprior_bids.training.synthesis import bounding_box, brain_mask, load_labels
from brainprior_bids.training.synthesis import synthesise_brain as draw_brain

MARGIN_MM = 7
"""Margin of a block that is excluded from metrics; along k at least one slice and 3 mm."""
SURROUND_MM = 10
"""Empty margin around a whole brain."""
METHODS = ("linear", "cubic", "tikhonov", "tv", "sample", "restored")
TIKHONOV_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TV_PENALTIES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
SPREADS = (0.02, 0.03, 0.045, 0.07, 0.1, 0.15)
"""Candidates for the mean SD of Tikhonov's posterior, in the brain's unit; see ``tikhonov_sd``."""
UNTUNED = {"tikhonov": 0.01, "tv": 0.001, "spread": 0.045}
"""Penalties without a validation set; tuned on two participants at 5 mm, noise 0.01."""
GREY, WHITE, FLUID = (3, 42), (2, 41), (4, 43)
FEWEST = 50
"""Voxels of a structure that is compared."""
HISTOGRAM = np.linspace(0, 1.4, 71)


@dataclass(frozen=True, eq=False)
class Participant:
    """The truth of one participant.

    Attributes
    ----------
    name, contrast : str
    data : (i, j, k) float32 array
        Voxels of 1 mm, RAS; 99th percentile 1, no bias field, 0 outside the brain.
    inside : (i, j, k) bool array
    structures : (i, j, k) int16 array
        The parcellation of the truth; for a synthetic brain, the labels of its map.
    to_mni305 : (4, 4) array
        Voxel index to MNI305 mm.
    """

    name: str
    contrast: str
    data: NDArray[np.float32]
    inside: NDArray[np.bool_]
    structures: NDArray[np.int16]
    to_mni305: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Write the file; it is moved into place when complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            name=self.name,
            contrast=self.contrast,
            data=self.data,
            inside=self.inside,
            structures=self.structures,
            to_mni305=self.to_mni305,
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Participant:
        """Read a file written by ``save``."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                str(arrays["name"]),
                str(arrays["contrast"]),
                arrays["data"],
                arrays["inside"],
                arrays["structures"],
                arrays["to_mni305"],
            )


def from_scan(path: Path, name: str, contrast: str, network: ParcellationNetwork) -> Participant:
    """A scan of about 1 mm, with or without its skull."""
    return _participant(extract_brain(path, network=network), name, contrast)


def from_labels(
    path: Path, name: str, contrast: str, network: ParcellationNetwork, folder: Path
) -> Participant:
    """A brain synthesised from a label map; ``name`` and ``contrast`` seed the random numbers.

    The affine is estimated as for a scan; the structures are those of the map.

    Raises
    ------
    UsageError
        If the voxels of the map are not 1 mm.
    """
    labels, affine = load_labels(path)
    mask = brain_mask(labels)
    box = bounding_box(mask, SURROUND_MM)
    seed = [int.from_bytes(name.encode(), "big") % 2**63, len(contrast)]
    data = draw_brain(labels, contrast, np.random.default_rng(seed), mask=mask)
    start = np.eye(4)
    start[:3, 3] = [edge.start for edge in box]
    folder.mkdir(parents=True, exist_ok=True)
    image_path = folder / f"{name}_{contrast}.nii.gz"
    nib.save(nib.Nifti1Image(data[box], affine @ start), image_path)
    brain = extract_brain(image_path, network=network, unbias=False)
    image_path.unlink()
    participant = _participant(brain, name, contrast)
    if brain.grid.shape != data[box].shape:
        raise UsageError(f"{path.name}: expected a label map of 1 mm voxels.")
    known = np.isin(labels[box], list(structure_names()))
    around = bounding_box(brain.mask, 0)
    structures = np.where(known, labels[box], 0)[around].astype(np.int16)
    return Participant(
        name, contrast, participant.data, participant.inside, structures, participant.to_mni305
    )


def _participant(brain: ExtractedBrain, name: str, contrast: str) -> Participant:
    box = bounding_box(brain.mask, 0)
    start = np.eye(4)
    start[:3, 3] = [edge.start for edge in box]
    return Participant(
        name,
        contrast,
        brain.data[box],
        brain.mask[box],
        brain.structures[box],
        brain.to_mni305 @ brain.grid.affine @ start,
    )


@dataclass(frozen=True)
class Condition:
    """How a scan is simulated, and how it is restored.

    Attributes
    ----------
    study : str
        Name of the study.
    variant : str
        Row of the ablation study.
    spacing_mm, noise_sd, width, profile, in_plane_mm, rician, bias_sd
        As ``degrade.Recipe``; ``width`` is the true over the stated thickness.
    field : {"none", "n4"}
        For a scan with a bias field: the estimate of it that every method is given.
    move_bias : bool
        Whether the engine refines this estimate while sampling.
    assumed_noise : float or None
        SD of the noise that the engine is given; None: the engine estimates it.
    sampler, n_samples, n_steps
        As in ``restore``.
    crop_mm : (int, int, int) or None
        Block in the middle of the brain; None: the whole brain.
    segment : bool
        Parcellate every image.
    seed : int
    """

    study: str = "restoration"
    variant: str = ""
    spacing_mm: float = 5.0
    noise_sd: float = 0.01
    width: float = 1.0
    profile: str = "pulse"
    in_plane_mm: float | None = None
    rician: bool = False
    bias_sd: float = 0.0
    field: str = "none"
    move_bias: bool = False
    assumed_noise: float | None = None
    sampler: str = "auto"
    n_samples: int = 8
    n_steps: int | None = None
    crop_mm: tuple[int, int, int] | None = (80, 96, 80)
    segment: bool = False
    seed: int = 0

    @property
    def kind(self) -> str:
        """Kind of degraded scan, for file names; penalties are tuned for each kind."""
        plane = "" if self.in_plane_mm is None else f"-{self.in_plane_mm:g}inplane"
        law = "-rician" if self.rician else ""
        return f"{self.spacing_mm:g}mm{plane}-noise{self.noise_sd:g}{law}"

    @property
    def name(self) -> str:
        """Name of the result's file."""
        return f"{self.kind}-{self.variant}" if self.variant else self.kind


AXIS = 2
"""Slices are axial."""


@dataclass(frozen=True, eq=False)
class Case:
    """A degraded scan and the truth behind it, on 1 mm voxels."""

    scan: Volume
    truth: Volume
    slice_weights: NDArray[np.float64]  # (slices, fine)
    inside: NDArray[np.bool_]  # brain, fine
    mask: NDArray[np.float32]  # fraction of every scan voxel that is brain
    judged: NDArray[np.bool_]  # where metrics are computed, fine
    structures: NDArray[np.int16]
    log_bias: NDArray[np.float32]  # the estimate that the methods are given, scan's grid
    to_mni305: NDArray[np.float64]  # mm of the grids to MNI305 mm

    @property
    def flat(self) -> Volume:
        """The scan divided by the bias field that every method is given."""
        return Volume((self.scan.data / np.exp(self.log_bias)).astype(np.float32), self.scan.grid)


def period(spacing_mm: float) -> int:
    """The smallest whole number of millimetres that is a multiple of the voxel size.

    Raises
    ------
    UsageError
        If there is none up to 60 mm.
    """
    for whole in range(1, 61):
        share = whole / spacing_mm
        if abs(share - round(share)) < 1e-6 and round(share) > 0:
            return whole
    raise UsageError(
        f"evaluate: voxels of {spacing_mm} mm do not fit into a whole number of millimetres."
    )


def make_case(participant: Participant, condition: Condition) -> Case:
    """Degrade the whole brain, then crop scan and truth to the block.

    Raises
    ------
    UsageError
        If no brain is left in the block, or a voxel size has no ``period``.
    """
    in_plane = condition.in_plane_mm or 1.0
    sizes = [in_plane, in_plane, in_plane]
    sizes[AXIS] = condition.spacing_mm
    periods = np.array([period(size) for size in sizes])
    shape = np.array(participant.data.shape)
    extra = -(shape + 2 * SURROUND_MM) % periods
    pad = [(SURROUND_MM, SURROUND_MM + int(e)) for e in extra]
    truth, inside = np.pad(participant.data, pad), np.pad(participant.inside, pad)
    structures = np.pad(participant.structures, pad)
    grid = Grid(truth.shape, np.eye(4))
    to_mni305 = participant.to_mni305.copy()
    to_mni305[:3, 3] -= to_mni305[:3, :3] @ np.full(3, SURROUND_MM)
    recipe = Recipe(
        axis=AXIS,
        spacing_mm=condition.spacing_mm,
        thickness_mm=condition.spacing_mm,
        profile=condition.profile,
        width=condition.width,
        in_plane_mm=condition.in_plane_mm,
        noise_sd=condition.noise_sd,
        bias_sd=condition.bias_sd,
        rician=condition.rician,
    )
    name = int.from_bytes(f"{participant.name} {participant.contrast}".encode(), "big") % 2**63
    rng = np.random.default_rng([name, condition.seed])
    data, thick = degrade(truth, grid, recipe, rng, unit=1.0)
    share, _ = thick_slices(
        inside.astype(np.float32),
        grid,
        axis=AXIS,
        spacing_mm=condition.spacing_mm,
        thickness_mm=condition.spacing_mm * condition.width,
        profile=condition.profile,
    )
    if condition.in_plane_mm is not None:
        between = Grid(share.shape, np.diag([1.0, 1.0, condition.spacing_mm, 1.0]))
        share, _ = coarse_in_plane(share, between, axis=AXIS, spacing_mm=condition.in_plane_mm)
    share = np.clip(share, 0, 1)
    log_bias = np.zeros(data.shape, np.float32)
    if condition.field == "n4":
        log_bias = n4(nib.Nifti1Image(data, np.array(thick.affine)), share, threads=1)
    weights = averaging_weights(
        grid.shape[AXIS],
        1.0,
        condition.spacing_mm,
        condition.spacing_mm * condition.width,
        condition.profile,
    )
    judged = inside.copy()
    start, stop = np.zeros(3, int), np.array(grid.shape)
    if condition.crop_mm is not None:
        ends = np.array([w.start + w.stop for w in bounding_box(inside, 0)])
        size = np.minimum(np.array(condition.crop_mm) // periods * periods, stop)
        start = np.clip(np.round((ends - size) / 2 / periods) * periods, 0, stop - size).astype(
            int
        )
        stop = start + size
        judged = np.zeros_like(inside)
        margin = [MARGIN_MM, MARGIN_MM, MARGIN_MM]
        margin[AXIS] = max(MARGIN_MM, round(condition.spacing_mm) + 3)
        middle = tuple(slice(a + m, b - m) for a, b, m in zip(start, stop, margin, strict=True))
        judged[middle] = inside[middle]
    fine = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    first = np.round(start / sizes).astype(int)
    last = np.round(stop / sizes).astype(int)
    coarse = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    part = weights[coarse[AXIS], fine[AXIS]]
    if not judged[fine].any():
        raise UsageError(
            f"evaluate: {participant.name} has no brain voxel {MARGIN_MM} mm inside a block of "
            f"{condition.crop_mm} mm. Pass a larger --crop."
        )
    return Case(
        scan=Volume(data[coarse], thick.crop(_triple(first), _triple(last))),
        truth=Volume(truth[fine], grid.crop(_triple(start), _triple(stop))),
        slice_weights=part / part.sum(1, keepdims=True),
        inside=inside[fine],
        mask=share[coarse].astype(np.float32),
        judged=judged[fine],
        structures=structures[fine],
        log_bias=log_bias[coarse],
        to_mni305=to_mni305,
    )


def _triple(values: NDArray[np.integer]) -> tuple[int, int, int]:
    return (int(values[0]), int(values[1]), int(values[2]))


def in_slices(case: Case) -> NDArray[np.float32]:
    """The flat scan with 1 mm voxels in the plane of its slices (cubic where they are larger)."""
    flat = case.flat
    if flat.data.shape[:2] == case.truth.data.shape[:2]:
        return flat.data
    affine = np.array(flat.grid.affine)
    affine[:, :2] = case.truth.grid.affine[:, :2]
    affine[:2, 3] = case.truth.grid.affine[:2, 3]
    shape = (*case.truth.data.shape[:2], flat.data.shape[2])
    return interpolate(flat.data, flat.grid, Grid(shape, affine), order=3)


def tune(participant: Participant, condition: Condition) -> dict[str, dict[str, float]]:
    """Mean squared error of every penalty, and CRPS of every spread with every Tikhonov penalty.

    Keys are the numbers as text; for a spread, "penalty spread".
    """
    errors: dict[str, dict[str, float]] = {"tikhonov": {}, "tv": {}, "spread": {}}
    case = make_case(participant, condition)
    data = in_slices(case)
    truth = case.truth.data

    def error(image: NDArray[np.float32]) -> float:
        return float(np.mean((image - truth)[case.judged] ** 2))

    for penalty in TIKHONOV_PENALTIES:
        image = tikhonov(data, case.slice_weights, axis=AXIS, penalty=penalty)
        errors["tikhonov"][str(penalty)] = error(image)
        for spread in SPREADS:
            sd = tikhonov_sd(case.slice_weights, penalty, spread)
            errors["spread"][f"{penalty} {spread}"] = gaussian_crps(image, sd, truth, case.judged)
    for penalty in TV_PENALTIES:
        image = total_variation(data, case.slice_weights, axis=AXIS, penalty=penalty)
        errors["tv"][str(penalty)] = error(image)
    return errors


def choose(errors: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """The penalties with the smallest mean error, from ``tune`` on each participant."""
    best = {}
    for method in ("tikhonov", "tv"):
        mean = {k: float(np.mean([e[method][k] for e in errors])) for k in errors[0][method]}
        best[method] = float(min(mean, key=lambda k: mean[k]))
    spreads = {
        spread: float(np.mean([e["spread"][f"{best['tikhonov']} {spread}"] for e in errors]))
        for spread in SPREADS
    }
    best["spread"] = min(spreads, key=lambda k: spreads[k])
    return best


def tikhonov_sd(
    slice_weights: NDArray[np.float64], penalty: float, spread: float
) -> NDArray[np.float64]:
    """(fine,) SD of the Gaussian posterior whose mean is the Tikhonov estimate.

    Prior precision ``DᵀD`` and noise of variance ``penalty``, up to a common amplitude: the
    covariance is ``a (WᵀW / penalty + DᵀD)^-1``, and ``a`` makes the mean SD equal ``spread``.
    """
    difference = np.diff(np.eye(slice_weights.shape[1]), axis=0)
    precision = slice_weights.T @ slice_weights / penalty + difference.T @ difference
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    return sd * spread / sd.mean()


def gaussian_crps(
    mean: NDArray[np.float32],
    sd: NDArray[np.floating[Any]],
    truth: NDArray[np.float32],
    inside: NDArray[np.bool_],
) -> float:
    """Mean CRPS of normal distributions, in units of the truth's 99th percentile.

    Parameters
    ----------
    mean, truth : (i, j, k) arrays
    sd : array
        Broadcast to (i, j, k).
    inside : (i, j, k) bool array
        Where they are compared.

    Gneiting and Raftery, JASA 102 (2007), equation 21.
    """
    everywhere = np.maximum(np.broadcast_to(sd, truth.shape)[inside], np.finfo(np.float32).tiny)
    z = (truth[inside].astype(np.float64) - mean[inside]) / everywhere
    score = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi)
    return float((everywhere * score).mean() / np.percentile(truth[inside], 99))


def restored(
    case: Case, condition: Condition, contrast: str, *, prior: Prior, device: str = "cpu"
) -> Restoration:
    """Restore a case with the engine, as its condition specifies."""
    observation = Observation(
        case.scan.data,
        grid=case.scan.grid,
        acquisition=Acquisition(AXIS, condition.spacing_mm, condition.spacing_mm),
        mask=case.mask,
        log_bias=case.log_bias,
        noise_sd=condition.assumed_noise,
    )
    return restore(
        observation,
        mask_1mm=case.inside,
        to_mni305=case.to_mni305,
        contrast=contrast,
        prior=prior,
        nuisances=Nuisances(move_bias=condition.move_bias),
        sampler=condition.sampler,
        n_samples=condition.n_samples,
        n_steps=condition.n_steps,
        seed=condition.seed,
        device=device,
    )


def measure(
    participant: Participant,
    condition: Condition,
    *,
    prior: Prior,
    penalties: Mapping[str, float],
    network: ParcellationNetwork | None = None,
    own_labels: bool = False,
    device: str = "cpu",
    picture: Path | None = None,
) -> dict[str, Any]:
    """Degrade, restore, compare: one record.

    Parameters
    ----------
    penalties : Mapping
        From ``choose``.
    network : ParcellationNetwork, optional
        For conditions with ``segment``.
    own_labels : bool
        Whether ``participant.structures`` are the true ones (a label map's).
    picture : Path, optional
        PNG of truth, slices, cubic, TV, restored, a sample and the SD.

    Raises
    ------
    UsageError
        As ``make_case``.
    """
    began = time.perf_counter()
    case = make_case(participant, condition)
    images, result = all_images(
        case, condition, participant.contrast, prior=prior, penalties=penalties, device=device
    )
    truth = case.truth.data
    record: dict[str, Any] = {
        "participant": participant.name,
        "contrast": participant.contrast,
        **asdict(condition),
        "voxels": int(case.judged.sum()),
        "penalties": dict(penalties),
        "methods": {
            method: {
                **compare(image, truth, case.judged),
                "lpips": lpips_distance(image, truth, case.judged),
                **tissue_contrast(image, case.structures, case.judged),
                "histogram_distance": float(
                    wasserstein_distance(image[case.judged][::7], truth[case.judged][::7])
                ),
            }
            for method, image in images.items()
        },
        "truth": tissue_contrast(truth, case.structures, case.judged),
        "histograms": {
            method: np.histogram(image[case.judged], HISTOGRAM)[0].tolist()
            for method, image in {"truth": truth, **images}.items()
        },
        "sampler_used": result.sampler,
        "noise_found": result.noise_sd,
        "residual_ratios": result.residual_ratios,
        "warnings": result.warnings,
        **_spread(case, result, penalties),
    }
    if condition.segment and network is not None:
        record["segmentation"] = _segment(case, images, network, own_labels=own_labels)
    if picture is not None:
        _picture(picture, case, images, result, f"{participant.name} {participant.contrast}")
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record


def all_images(
    case: Case,
    condition: Condition,
    contrast: str,
    *,
    prior: Prior,
    penalties: Mapping[str, float],
    device: str = "cpu",
) -> tuple[dict[str, NDArray[np.float32]], Restoration]:
    """The image of every method, each with its least-squares gain, and the restoration."""
    images = classical(case, penalties)
    found = restored(case, condition, contrast, prior=prior, device=device)
    samples = {"sample": found.samples[0]} if len(found.samples) else {}
    images |= {**samples, "restored": found.mean}
    truth = case.truth.data
    images = {
        method: (image * matching_gain(image, truth, case.judged)).astype(np.float32)
        for method, image in images.items()
    }
    return images, found


def classical(case: Case, penalties: Mapping[str, float]) -> dict[str, NDArray[np.float32]]:
    """Interpolations, Tikhonov and TV on the fine grid, not multiplied by a gain."""
    flat, grid, data = case.flat, case.truth.grid, in_slices(case)
    return {
        "linear": interpolate(flat.data, flat.grid, grid, order=1),
        "cubic": interpolate(flat.data, flat.grid, grid, order=3),
        "tikhonov": tikhonov(data, case.slice_weights, axis=AXIS, penalty=penalties["tikhonov"]),
        "tv": total_variation(data, case.slice_weights, axis=AXIS, penalty=penalties["tv"]),
    }


def _spread(case: Case, result: Restoration, penalties: Mapping[str, float]) -> dict[str, Any]:
    """CRPS of the samples, of the predicted SD and of the tuned Tikhonov posterior; error / SD.

    The SD map is that of the samples about their mean, or predicted by the prior (``sd_from``).
    """
    truth, judged = case.truth.data, case.judged
    image = tikhonov(in_slices(case), case.slice_weights, axis=AXIS, penalty=penalties["tikhonov"])
    sd = tikhonov_sd(case.slice_weights, penalties["tikhonov"], penalties["spread"])
    facts: dict[str, Any] = {
        "crps": crps(result.samples, truth, judged) if len(result.samples) else None,
        "crps_tikhonov": gaussian_crps(image, sd, truth, judged),
    }
    if result.sd is not None:
        error = (result.mean - truth)[judged]
        predicted = result.sd[judged]
        if result.sd_from == "prior":
            facts["crps_predicted"] = gaussian_crps(result.mean, result.sd, truth, judged)
            facts["error_over_sd_by_decile"] = by_decile(error, predicted)
        else:
            predicted = predicted * math.sqrt(1 + 1 / len(result.samples))
        facts["error_over_sd"] = float(np.sqrt(np.mean(error**2) / np.mean(predicted**2)))
        facts["sd_error_correlation"] = float(np.corrcoef(np.abs(error), predicted)[0, 1])
    return facts


def by_decile(error: NDArray[np.float32], sd: NDArray[np.float32]) -> list[float]:
    """RMS of the errors divided by the RMS of their SD, by decile of the SD (smallest first)."""
    order = np.argsort(sd, kind="stable")
    return [
        float(np.sqrt(np.mean(error[part] ** 2) / np.mean(sd[part] ** 2)))
        for part in np.array_split(order, 10)
    ]


def tissue_contrast(
    image: NDArray[np.float32], structures: NDArray[np.int16], inside: NDArray[np.bool_]
) -> dict[str, float | None]:
    """Mean of each tissue, and the grey-white contrast.

    ``cnr`` is |white - grey| divided by the root of the mean of their variances. A value is None
    if a tissue is missing or has no variance.
    """
    values = {
        name: image[np.isin(structures, labels) & inside].astype(np.float64)
        for name, labels in (("grey", GREY), ("white", WHITE), ("fluid", FLUID))
    }
    facts: dict[str, float | None] = {
        name: float(v.mean()) if v.size > 100 else None for name, v in values.items()
    }
    grey, white = facts["grey"], facts["white"]
    facts["cnr"] = None
    if grey is not None and white is not None:
        noise = math.sqrt((values["grey"].var() + values["white"].var()) / 2)
        facts["cnr"] = abs(white - grey) / noise if noise > 0 else None
    return facts


def _segment(
    case: Case,
    images: Mapping[str, NDArray[np.float32]],
    network: ParcellationNetwork,
    *,
    own_labels: bool,
) -> dict[str, dict[str, Any]]:
    """Dice and volume errors of the parcellations of the scan, cubic, TV, restored and a sample.

    The reference of a synthetic brain is its label map, and the parcellation of the true image is
    a row too. Otherwise the reference is the parcellation of the true image on the same grid (a
    shift by one voxel would move the network's 2 mm voxels, which alone costs 0.1 of Dice).
    """
    found = parcellations(case, images, network)
    reference = case.structures if own_labels else found.pop("true")
    wanted = [index for index, name in structure_names().items() if name != "CSF"]
    table: dict[str, dict[str, Any]] = {}
    for method, labels in found.items():
        row = label_agreement(labels, reference, case.inside, wanted)
        row["mean_dice"] = float(np.mean(list(row["dice"].values())))
        off = np.abs(list(row["volume_error"].values()))
        row["mean_absolute_volume_error"] = float(np.mean(off))
        table[method] = row
    return table


def parcellations(
    case: Case, images: Mapping[str, NDArray[np.float32]], network: ParcellationNetwork
) -> dict[str, NDArray[np.int16]]:
    """The embedded parcellation of the truth (``true``), the thick slices (``degraded``), cubic,
    TV, restored and sample, on the truth's grid.
    """
    found = {}
    for method in ("true", "degraded", "cubic", "tv", "restored", "sample"):
        if method == "degraded":
            volume = case.flat
            data = np.where(case.mask > 0.5, volume.data, 0)
        elif method == "true" or method in images:
            image = case.truth.data if method == "true" else images[method]
            volume, data = case.truth, np.where(case.inside, image, 0)
        else:
            continue
        scan = nib.Nifti1Image(data.astype(np.float32), np.array(volume.grid.affine))
        parts = parcellate(scan, network=network, restored_grid=case.truth.grid)
        found[method] = parts.structures
    return found


def label_agreement(
    labels: NDArray[np.integer[Any]],
    reference: NDArray[np.integer[Any]],
    inside: NDArray[np.bool_],
    wanted: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Dice and relative error of the volume of each label; ``FEWEST`` voxels in the reference."""
    dice, off = {}, {}
    for index in wanted:
        true, own = (reference == index) & inside, (labels == index) & inside
        if true.sum() < FEWEST:
            continue
        dice[index] = float(2 * (true & own).sum() / (true.sum() + own.sum()))
        off[index] = float(own.sum() / true.sum() - 1)
    return {"dice": dice, "volume_error": off}


def _picture(
    path: Path,
    case: Case,
    images: Mapping[str, NDArray[np.float32]],
    result: Restoration,
    caption: str,
) -> None:
    from brainprior_bids.evaluation.figure import Column, draw

    blocks = interpolate(case.flat.data, case.scan.grid, case.truth.grid, order=0)
    top = 1.05

    def column(title: str, image: NDArray[np.float32]) -> Column:
        return Column(title, np.where(case.judged, image, 0), top)

    columns = [column("truth", case.truth.data), column("slices", blocks)]
    shown = [method for method in ("cubic", "tv", "restored", "sample") if method in images]
    columns += [column(method, images[method]) for method in shown]
    if result.sd is not None:
        columns.append(Column("SD", np.where(case.judged, result.sd, 0), 0.2, "magma"))
    draw(path, columns, inside=case.judged, spacing_mm=(1.0, 1.0, 1.0), caption=caption)
