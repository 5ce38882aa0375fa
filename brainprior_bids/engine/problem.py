# SPDX-License-Identifier: Apache-2.0
"""Observations and a prior -> the posterior problem: data, operators, precisions, support.

The unknown x is defined on the home grid: the 1 mm grid along the reference's axes, on which the
reference is not resampled, or the grid of MNI305 (the form of arXiv 2510.15119), for which the
affine is part of A. Another tool's image changes the prior: see ``conditioning``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor

from brainprior_bids.engine.bias import CosineField
from brainprior_bids.engine.box import Box, brain_box
from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.gaussian.image_space import ImageSpaceSolve, sliced
from brainprior_bids.engine.gaussian.slices import SlicedImage, SpectralSolve
from brainprior_bids.engine.gaussian.spectral import SpectralSolver, Spectrum
from brainprior_bids.engine.grids import MNI305, Grid
from brainprior_bids.engine.likelihood import FOREIGN, FOREIGN_UNSEEN, Likelihood, Term
from brainprior_bids.engine.noise import estimate_noise_sd
from brainprior_bids.engine.nuisance import BiasModel, Nuisances
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.operators.base import LinearOperator
from brainprior_bids.engine.operators.resample import AffineResample, SparseResample
from brainprior_bids.engine.sensing import (
    brain_share,
    hidden_voxels,
    interpolate_field,
    is_3d,
    reduce_to,
    relative_positions,
    sensitivity,
    to_scan_grid,
    triple,
    with_rim,
)

HOMES = ("scan", "MNI305")
NEAR_MM = 1.0
"""Distance from the restored region up to which a network is given the surroundings: in a head,
better than 0 and 2 mm."""
AROUND_MM = 2.0
"""SD of the Gaussian average over the surroundings beyond, within a slice."""
BEYOND = 0.05
"""A slice voxel with a smaller share of the brain and its nearest surroundings shows what lies
beyond."""
NOISE_FLOOR = 0.005
"""Smallest noise SD assumed, engine unit: the paper's value for restoration."""
MAX_TURN_DEG = 55.0
"""Largest angle between the scan's axes and MNI305's without a warning. Up to 51 degrees, the
error of the mean increases no more than by slice positioning; at 65 degrees it increases by 3 %,
at 77 degrees by 6 %."""


@dataclass(frozen=True, eq=False)
class Part:
    """One observation reduced to its data box, in engine units.

    Parameters
    ----------
    observation : Observation
    data_shape : (i', j', k')
        Shape of the scan after axes finer than 1 mm were reduced.
    box : Box
        Box of the brain, on the observation's 1 mm grid and in its data.
    brain, mask : (i, j, k) tensors on the observation's 1 mm grid
        Brain with and without the rim.
    y : (i', j', k') tensor, of the data box
        The scan, not divided by its bias field.
    log_bias, hidden : tensors of the data box
    noise_sd : float
        Noise SD of y: specified, or estimated from y.
    excess : tensor of the data box, optional
        Variance in excess of ``noise_sd``, if there is a map of the noise.
    thinned : float
        SD of y's noise divided by that of the scan's.
    """

    observation: Observation
    data_shape: tuple[int, int, int]
    box: Box
    brain: Tensor
    y: Tensor
    log_bias: Tensor
    hidden: Tensor | None
    noise_sd: float
    excess: Tensor | None
    thinned: float

    @property
    def is_3d(self) -> bool:
        """Whether the slices are encoded in k-space."""
        return is_3d(self.observation.grid, self.observation.acquisition)

    def on_scan_grid(self, volume: Tensor) -> Tensor:
        """From the data box to the whole grid of the scan, 0 outside."""
        return to_scan_grid(volume, self.box, self.data_shape, self.observation.grid.shape)


class Problem:
    """The posterior problem of some scans.

    Parameters
    ----------
    scans : sequence of Observation
        The reference first.
    mask : tensor on ``scans[0].grid.one_millimetre()``, in [0, 1]
        Brain.
    rim_mm : float
        Width of the rim beyond the mask in which there may be brain. The noise is estimated
        without it.
    to_mni305 : (4, 4)
        Scanner RAS mm of the reference -> MNI305 RAS mm.
    home : "scan" or "MNI305"
    nuisances : Nuisances
    device : torch.device

    Attributes
    ----------
    given, scans : list of Observation
        The scans, and their parts: one for each displaced interleave of a scan.
    grid : Grid
        Grid of the result; ``box`` is the part that is computed, ``home`` that part's grid.
    unit : float
        Scanner units of the reference per engine unit.
    final : (i, j, k) bool tensor of the box
        Where the result may differ from 0; ``support`` is a voxel wider.
    coordinates : (3, i, j, k) float32 tensor
        MNI305 mm of the box's voxels.
    warnings : list of str

    Raises
    ------
    InputError
        If the mask is empty, or the reference's brain is outside of a scan's field of view.
    GeometryError
        If no voxel of the brain lies on the MNI305 grid.
    """

    def __init__(
        self,
        scans: Sequence[Observation],
        *,
        mask: Tensor,
        rim_mm: float,
        to_mni305: NDArray[np.float64],
        home: str,
        nuisances: Nuisances,
        device: torch.device,
    ) -> None:
        self.given = list(scans)
        self.scans = [part for scan in scans for part in scan.interleaves()]
        self.nuisances, self.device = nuisances, device
        self.warnings: list[str] = []
        self._to_mni305, self._on_mni305 = to_mni305, home == "MNI305"
        reference = self.scans[0]
        self.unit, self._axis = reference.unit, reference.acquisition.slice_axis
        fine = reference.grid.one_millimetre()
        if not bool((mask > 0.5).any()):
            raise InputError(
                "restore: the brain mask is empty. Check the parcellation, or pass another mask."
            )
        brain = with_rim(mask, fine, rim_mm)
        self._place(fine, brain)
        if not self._on_mni305:
            self._check_turn(reference.grid)
        for scan in self.given:
            self.warn(scan, scan.warnings)
        self.parts = [self._part(scan, fine, brain, mask) for scan in self.scans]
        self._likelihoods: dict[float, Likelihood] = {}
        self._resamplings: dict[str, LinearOperator] = {}

    def warn(self, scan: Observation, texts: Sequence[str]) -> None:
        """Add warnings about a scan; its name is stated if there are several."""
        prefix = "" if len(self.scans) == 1 else f"{scan.name}: "
        self.warnings += [prefix + text for text in texts]

    def _place(self, fine: Grid, brain: Tensor) -> None:
        """The home grid, the computed box and the support."""
        if self._on_mni305:
            inside = _on_mni305(brain, fine, self._to_mni305)
            self.grid, to_mni305 = MNI305, np.eye(4)
            self.box = brain_box(inside.numpy(), MNI305.shape, self._axis)
            self.final = inside[self.box.image_slices]
            support = self.final.float()
        else:
            data_shape = triple(reduce_to(self.scans[0].scan, fine.shape)[0].shape)
            self.grid, to_mni305 = fine, self._to_mni305
            self.box = brain_box((brain > 0).numpy(), data_shape, self._axis)
            self.final = brain[self.box.image_slices] > 0
            support = F.max_pool3d((brain[None, None] > 0).float(), 3, 1, 1)[0, 0]
            support = support[self.box.image_slices]
        self.support, self.final = support, self.final.to(self.device)
        self.home = self.grid.crop(self.box.start, self.box.stop)
        points = torch.from_numpy(self.home.points_mm(to=to_mni305))
        self.coordinates = points.to(self.device)

    def _check_turn(self, grid: Grid) -> None:
        """Warn of a scan whose axes are turned further from MNI305's than in training."""
        axes = grid.affine[:3, :3] / grid.spacing_mm
        u, _, vt = np.linalg.svd(self._to_mni305[:3, :3] @ axes)
        cosine = (float(np.trace(u @ vt)) - 1) / 2
        turn = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
        if turn > MAX_TURN_DEG:
            self.warnings.append(
                f"The scan's axes are turned by {turn:.0f} degrees against MNI305's; above "
                f"{MAX_TURN_DEG:.0f} the result is a little less accurate than its uncertainty "
                "says."
            )

    # ---- the observations ------------------------------------------------------------------

    def _part(self, scan: Observation, fine: Grid, brain: Tensor, mask: Tensor) -> Part:
        """One observation, prepared; ``brain`` and ``mask`` are on the grid ``fine``."""
        own = scan.grid.one_millimetre()
        data, thinned = reduce_to(scan.scan * (scan.gain / self.unit), own.shape)
        shape, axis = triple(data.shape), scan.acquisition.slice_axis
        if not scan.is_reference or own != fine:  # moved, or scanned on other voxels
            resample = AffineResample(fine, own, scan.to_reference)
            brain, mask = resample(brain), resample(mask)
            if not bool((brain > 0.5).any()):
                raise InputError(
                    f"{scan.name}: none of the reference's brain lies in its field of view."
                )
        box = brain_box((brain > 0).numpy(), shape, axis)
        share = brain_share(mask, sensitivity(scan.grid, scan.acquisition, shape)[1])
        hidden = None
        if scan.hidden is not None:
            hidden = hidden_voxels(scan.hidden, shape)[box.data_slices]
        share, y = share[box.data_slices], data[box.data_slices]
        messages: list[str] = []
        if scan.noise_sd is None:
            measured_share = share if hidden is None else share * ~hidden
            noise_sd, excess = _finest_noise(scan, thinned, self.unit), None
            if noise_sd is None:
                noise_sd = _estimated_noise(y, measured_share, axis, messages)
        else:
            noise_sd, excess = given_noise(scan.noise_sd, scan.mask > 0.5, thinned, shape)
        self.warn(scan, messages)
        return Part(
            observation=scan,
            data_shape=shape,
            box=box,
            brain=brain,
            y=y,
            log_bias=interpolate_field(scan.log_bias, shape)[box.data_slices],
            hidden=hidden,
            noise_sd=noise_sd,
            excess=None if excess is None else excess[box.data_slices],
            thinned=thinned,
        )

    @property
    def reference(self) -> Part:
        """The first scan."""
        return self.parts[0]

    @property
    def is_spectral(self) -> bool:
        """Whether A is diagonal in the in-plane frequencies of one scan's own axes."""
        return len(self.scans) == 1 and not self._on_mni305

    @property
    def displaced(self) -> bool:
        """Whether the interleaves of the reference are displaced."""
        return self.given[0].interleave_motion is not None

    @property
    def any_hidden(self) -> bool:
        """Whether voxels of the reference are hidden, other than by its displaced interleaves."""
        return self.given[0].hidden is not None

    @property
    def thickness_is_known(self) -> bool:
        """Whether no scan has 2-D slices."""
        return all(part.is_3d for part in self.parts)

    @cached_property
    def bias_field(self) -> CosineField:
        """Basis on which the reference's bias field may change."""
        extent = (
            np.array(self.reference.box.shape) * self.scans[0].grid.one_millimetre().spacing_mm
        )
        size = (float(extent[0]), float(extent[1]), float(extent[2]))
        return CosineField(size, self.nuisances.bias_scale_mm)

    def bias_on_scan(self, coefficients: Tensor) -> Tensor:
        """The change of the log bias due to the coefficients, on the reference's whole grid."""
        grid, part = self.scans[0].grid, tuple(slice(0, n) for n in self.scans[0].grid.shape)
        positions = relative_positions(
            self.reference.box, grid.shape, grid.one_millimetre().shape, part
        )
        return self.bias_field.evaluate(coefficients, self.bias_field.basis(positions))

    # ---- the likelihood under one slice thickness ------------------------------------------

    def likelihood(self, spectrum: Spectrum, thickness_factor: float = 1.0) -> Likelihood:
        """All scans, with slices ``thickness_factor`` times as thick as stated; cached."""
        if thickness_factor not in self._likelihoods:
            terms = [self._term(part, thickness_factor) for part in self.parts]
            likelihood = Likelihood(terms, self.support, self.device)
            if self.is_spectral:
                likelihood.solve = SpectralSolve(likelihood, spectrum)
            else:
                i, j, k = (float(s) for s in self.home.spacing_mm)
                likelihood.solve = ImageSpaceSolve(likelihood, spectrum, (i, j, k))
            self._likelihoods[thickness_factor] = likelihood
        return self._likelihoods[thickness_factor]

    def slice_weights(self, thickness_factor: float = 1.0) -> Tensor:
        """(n_slices, n_thin) float64: the reference's slice profile, over its box."""
        part = self.reference
        scan, box, a = part.observation, part.box, part.observation.acquisition.slice_axis
        profile, _ = sensitivity(scan.grid, scan.acquisition, part.data_shape, thickness_factor)
        return profile[box.data_start[a] : box.data_stop[a], box.start[a] : box.stop[a]]

    def reference_with_surroundings(self, thickness_factor: float = 1.0) -> Tensor:
        """(i', j', k') the signal of the brain with its rim and the nearest surroundings, up to
        ``NEAR_MM``, in the reference divided by its bias field.

        From a slice voxel that is partly beyond, the part of what lies beyond is subtracted: its
        brightness is the average over the nearby voxels of the slice that are wholly beyond
        (``AROUND_MM``). In a skull-stripped scan it is 0.
        """
        part, scan = self.reference, self.scans[0]
        outside = part.brain[part.box.image_slices].numpy() <= 0
        distance = distance_transform_edt(outside, sampling=scan.grid.one_millimetre().spacing_mm)
        near = torch.zeros_like(part.brain)
        near[part.box.image_slices] = torch.from_numpy(distance <= NEAR_MM).to(near)
        _, weights = sensitivity(scan.grid, scan.acquisition, part.data_shape, thickness_factor)
        share = brain_share(near, weights)[part.box.data_slices].numpy()
        y = (part.y / part.log_bias.exp()).numpy()
        spacing = scan.grid.extent_mm / np.array(part.data_shape)
        sd = np.where(np.arange(3) == scan.acquisition.slice_axis, 0, AROUND_MM / spacing)
        beyond = (share < BEYOND).astype(np.float32)
        count = gaussian_filter(beyond, sd)
        around = gaussian_filter(y * beyond, sd) / (count + 1e-3)  # 0 far from all of them
        alone = np.where(share < 1, np.maximum(y - (1 - share) * around, 0), y)
        return torch.from_numpy(np.where(share > 0, alone, 0).astype(np.float32))

    def measurement_of_reference(self) -> Term:
        """The reference alone, with slices as thick as stated."""
        return self._term(self.reference, 1.0)

    def iterations(self) -> list[int]:
        """Iterations of every inner solve so far, in ascending order of thickness."""
        factors = sorted(self._likelihoods)
        return [n for factor in factors for n in self._likelihoods[factor].solve.iterations]

    def _term(self, part: Part, thickness_factor: float) -> Term:
        scan = part.observation
        profile, axis_weights = sensitivity(
            scan.grid, scan.acquisition, part.data_shape, thickness_factor
        )
        model = None
        if self.nuisances.move_bias and self.is_spectral:
            positions = relative_positions(
                part.box, part.data_shape, scan.grid.one_millimetre().shape, part.box.data_slices
            )
            basis = [axis.to(self.device) for axis in self.bias_field.basis(positions)]
            model = BiasModel(self.bias_field, basis)
        return Term(
            part.y,
            operator=self._operator(part, profile, thickness_factor),
            share=brain_share(part.brain, axis_weights)[part.box.data_slices],
            noise_sd=part.noise_sd,
            log_bias=part.log_bias,
            hidden=part.hidden,
            excess=part.excess,
            bias_model=model,
            foreign=FOREIGN if self.is_spectral else FOREIGN_UNSEEN,
            device=self.device,
        )

    def _operator(self, part: Part, profile: Tensor, thickness_factor: float) -> LinearOperator:
        box, axis = part.box, part.observation.acquisition.slice_axis
        if not self.is_spectral:
            return sliced(self._resampling(part), box, axis, profile)
        order = [axis, *(a for a in range(3) if a != axis)]
        spacing = self.grid.spacing_mm
        solver = SpectralSolver(
            self.slice_weights(thickness_factor),
            triple(tuple(box.shape[a] for a in order)),
            triple(tuple(box.data_shape[a] for a in order)),
            (float(spacing[order[0]]), float(spacing[order[1]]), float(spacing[order[2]])),
            device=self.device,
        )
        return SlicedImage(solver, axis)

    def _resampling(self, part: Part) -> LinearOperator:
        """Home grid -> 1 mm grid along the scan's axes, through the motion; cached per scan."""
        scan = part.observation
        if scan.name not in self._resamplings:
            around = scan.grid.one_millimetre().crop(part.box.start, part.box.stop)
            matrix = scan.to_reference
            if self._on_mni305:
                matrix = self._to_mni305 @ matrix
            self._resamplings[scan.name] = SparseResample(
                self.home, around, matrix, within=self.final.cpu()
            )
        return self._resamplings[scan.name]


def _on_mni305(brain: Tensor, fine: Grid, to_mni305: NDArray[np.float64]) -> Tensor:
    """(181, 217, 181) bool: the brain on the MNI305 grid."""
    index = np.array(np.meshgrid(*([0, n - 1] for n in fine.shape), indexing="ij")).reshape(3, -1)
    voxels = np.linalg.inv(MNI305.affine) @ to_mni305 @ fine.affine
    mapped = voxels[:3, :3] @ index + voxels[:3, 3:]
    start = triple(tuple(np.clip(np.floor(mapped.min(1)), 0, MNI305.shape)))
    stop = triple(tuple(np.clip(np.ceil(mapped.max(1)) + 1, 0, MNI305.shape)))
    inside = torch.zeros(MNI305.shape, dtype=torch.bool)
    if all(a < b for a, b in zip(start, stop, strict=True)):
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        part = AffineResample(fine, MNI305.crop(start, stop), np.linalg.inv(to_mni305))
        inside[region] = part(brain) > 0.5
    if not bool(inside.any()):
        raise GeometryError(
            "restore: no voxel of the brain lies on the MNI305 grid. Check to_mni305."
        )
    return inside


def _finest_noise(scan: Observation, thinned: float, unit: float) -> float | None:
    """The noise of a reduced scan, estimated before the reduction; None if it is not white there.

    Afterwards anatomy fills the highest frequencies, and would be taken for noise.
    """
    if thinned == 1:
        return None
    where = scan.brain.nonzero()
    part = tuple(
        slice(int(a), int(b) + 1) for a, b in zip(where.amin(0), where.amax(0), strict=True)
    )
    sd = estimate_noise_sd(
        scan.scan[part], scan.brain[part], scan.acquisition.slice_axis, only_white=True
    )
    return None if sd is None else max(sd * scan.gain / unit * thinned, NOISE_FLOOR)


def _estimated_noise(y: Tensor, share: Tensor, axis: int, warnings: list[str]) -> float:
    noise_sd = estimate_noise_sd(y, share > 0.9, axis)
    if noise_sd is None:
        warnings.append(
            f"Too few voxels to estimate the noise; an SD of {NOISE_FLOOR} was assumed."
        )
        return NOISE_FLOOR
    return max(noise_sd, NOISE_FLOOR)


def given_noise(
    noise_sd: float | Tensor, brain: Tensor, thinned: float, data_shape: tuple[int, int, int]
) -> tuple[float, Tensor | None]:
    """The smallest SD of the data's voxels, and the excess variance if the SD is a map."""
    if isinstance(noise_sd, float):
        return noise_sd * thinned, None
    lowest = float(noise_sd[brain].min())
    sd = interpolate_field(torch.where(brain, noise_sd, lowest), data_shape)
    return lowest * thinned, (sd.square() - lowest**2).clamp_min(0) * thinned**2
