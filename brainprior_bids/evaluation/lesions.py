# SPDX-License-Identifier: Apache-2.0
"""How much of a lesion's contrast a restoration keeps: add a lesion to a scan, restore, measure.

The tissue inside a sphere of given diameter is made brighter or darker by a given fraction, in the
scan's own voxels: a voxel that is half lesion changes by half of it. The scan is restored with and
without the lesion, with the same random numbers, and the difference of the two results over the
sphere is divided by the difference that was added. The linearly interpolated scan is measured in
the same way: thick slices dilute a small lesion before any prior is applied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.prepare import Prepared, prepare
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.bids.files import read_json
from brainprior_bids.engine.errors import InputError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration

WHITE_MATTER = (2, 41)


@dataclass(frozen=True, eq=False)
class LesionCase:
    """A scan with the inputs of ``restore``, and the depth in the white matter, for lesions."""

    observation: Observation
    mask_1mm: NDArray[np.float32]
    to_mni305: NDArray[np.float64]
    contrast: str
    depth_mm: NDArray[np.float64]  # 1 mm grid: depth in the white matter, 0 elsewhere

    @classmethod
    def from_scan(cls, scan: Prepared, contrast: str) -> LesionCase:
        """The whole field of view of a scan that was prepared with bias field and affine."""
        assert scan.to_mni305 is not None
        white = np.isin(scan.brain.structures, WHITE_MATTER)
        return cls(
            scan.observation,
            scan.mask_1mm.astype(np.float32),
            scan.to_mni305,
            contrast,
            ndimage.distance_transform_edt(white),
        )

    @property
    def fine(self) -> Grid:
        """The 1 mm grid of ``mask_1mm`` and ``depth_mm``."""
        return self.observation.grid.one_millimetre()

    def deepest_mm(self) -> NDArray[np.float64]:
        """(3,) the deepest point of the white matter, scanner mm."""
        deepest = np.unravel_index(self.depth_mm.argmax(), self.depth_mm.shape)
        point: NDArray[np.float64] = self.fine.affine @ np.append(deepest, 1)
        return point[:3]

    def crop(self, centre_mm: NDArray[np.float64], size_mm: float) -> LesionCase:
        """The part of the field of view within half of ``size_mm`` along each axis; even slices
        remain even.
        """
        whole = self.observation
        at = np.linalg.inv(whole.grid.affine) @ np.append(centre_mm, 1)
        half = size_mm / 2 / whole.grid.spacing_mm
        start = np.maximum(np.round(at[:3] - half), 0).astype(int)
        start[whole.acquisition.slice_axis] -= start[whole.acquisition.slice_axis] % 2
        stop = np.minimum(np.round(at[:3] + half), whole.grid.shape).astype(int)
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        observation = replace(
            whole,
            scan=whole.scan[part],
            grid=whole.grid.crop(tuple(start), tuple(stop)),
            mask=whole.mask[part],
            log_bias=whole.log_bias[part],
            hidden=None if whole.hidden is None else whole.hidden[part],
        )
        fine = observation.grid.one_millimetre()
        return replace(
            self,
            observation=observation,
            mask_1mm=resample(self.mask_1mm, self.fine, fine, order=0),
            depth_mm=resample(self.depth_mm, self.fine, fine, order=0).astype(np.float64),
        )

    def share(self, centre_mm: NDArray[np.float64], radius_mm: float) -> NDArray[np.float32]:
        """(i, j, k) share of a sphere in the scan's voxels; displaced slices show it displaced."""
        share = np.zeros(self.observation.grid.shape, np.float32)
        for part in self.observation.interleaves():
            place = np.linalg.inv(part.to_reference) @ np.append(centre_mm, 1)
            sphere = torch.from_numpy(self.sphere(place[:3], radius_mm)).float()
            shown = F.adaptive_avg_pool3d(sphere[None, None], share.shape)[0, 0].numpy()
            measured = True if part.hidden is None else ~part.hidden.numpy()
            share = np.where(measured, shown, share)
        return share

    def sphere(self, centre_mm: NDArray[np.float64], radius_mm: float) -> NDArray[np.bool_]:
        """The 1 mm voxels of a sphere."""
        points = self.fine.points_mm() - centre_mm[:, None, None, None]
        inside: NDArray[np.bool_] = np.linalg.norm(points, axis=0) <= radius_mm
        return inside


def prepare_case(
    path: Path, *, contrast: str, thickness_mm: float | None
) -> tuple[LesionCase, list[str]]:
    """Prepare one image as the command does; the JSON next to it is read as its sidecar.

    Returns
    -------
    case : LesionCase
    warnings : list of str

    Raises
    ------
    UsageError
        If that JSON cannot be read.
    BrainpriorError
        As ``anatomy.prepare.prepare``.
    """
    sidecar = path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.nii')}.json")
    try:
        metadata = read_json(sidecar) if sidecar.is_file() else {}
    except ValueError as error:
        raise UsageError(f"check-lesion: {sidecar} cannot be read: {error}. Repair it.") from error
    scan = prepare(path, metadata=metadata, slice_thickness_mm=thickness_mm)
    return LesionCase.from_scan(scan, contrast), list(scan.warnings)


@dataclass(frozen=True)
class Kept:
    """The fraction of a lesion's contrast that remains; 1 is all of it."""

    size_mm: float
    contrast: float
    restored: float
    interpolated: float
    sampler: str


def contrast_kept(
    case: LesionCase,
    prior: Any,
    *,
    centre_mm: NDArray[np.float64],
    sizes_mm: Sequence[float],
    contrasts: Sequence[float],
    noise_sd: float | None = None,
    **options: Any,
) -> list[Kept]:
    """Restore the scan once without a lesion, and once with each lesion.

    Parameters
    ----------
    centre_mm : (3,) array
        Centre of the lesions, scanner mm.
    sizes_mm : sequence of float
        Diameters.
    contrasts : sequence of float
        Relative change of the tissue: -0.3 is darker by 30 %.
    noise_sd : float, optional
        SD of the noise of a scan voxel, in the engine's unit; estimated if not given.
    options
        Of ``restore``: ``n_samples``, ``seed`` …

    Returns
    -------
    list of Kept
        One per size and contrast.

    Raises
    ------
    InputError
        If a lesion is not entirely inside the brain.
    """
    observation, fine = case.observation, case.fine
    plain = _restored(case, observation, prior, noise_sd, options)
    kept = []
    for size, contrast in itertools.product(sizes_mm, contrasts):
        sphere = case.sphere(centre_mm, size / 2)
        if not sphere.any() or not (case.mask_1mm[sphere] > 0.5).all():
            raise InputError(
                f"check-lesion: a sphere of {size:g} mm at {np.round(centre_mm, 1).tolist()} mm "
                "is not entirely inside the brain. Choose another position with --at."
            )
        change = observation.scan.numpy() * (contrast * case.share(centre_mm, size / 2))
        changed = replace(observation, scan=observation.scan.numpy() + change)
        with_lesion = _restored(case, changed, prior, noise_sd, options)
        added = contrast * plain.mean[sphere].mean()
        bias = observation.log_bias.exp().numpy()
        flat = resample(change / bias, observation.grid, fine, order=1)
        kept.append(
            Kept(
                float(size),
                float(contrast),
                float((with_lesion.mean - plain.mean)[sphere].mean() / added),
                float(flat[sphere].mean() / added),
                with_lesion.sampler,
            )
        )
    return kept


def _restored(
    case: LesionCase,
    observation: Observation,
    prior: Any,
    noise_sd: float | None,
    options: dict[str, Any],
) -> Restoration:
    return restore(
        replace(observation, noise_sd=noise_sd),
        mask_1mm=case.mask_1mm,
        to_mni305=case.to_mni305,
        contrast=case.contrast,
        prior=prior,
        **options,
    )
