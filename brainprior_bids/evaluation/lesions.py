# SPDX-License-Identifier: Apache-2.0
"""What a restoration leaves of a lesion: one is put into a scan, restored, and measured.

A sphere of given diameter becomes brighter or darker by a given part of the tissue in which it
lies, in the scan's own voxels: a voxel that is half lesion changes by half. The scan is restored
with and without it, with the same random numbers, and the difference of the two results over the
sphere is divided by the difference that was put in. Beside it stands the same figure of the scan
interpolated linearly: thick slices dilute a small lesion before any prior sees it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
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
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.errors import InputError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration

WHITE_MATTER = (2, 41)


@dataclass(frozen=True, eq=False)
class LesionCase:
    """A scan with what ``restore`` needs, and where a lesion may be put."""

    scan: NDArray[np.float32]
    grid: Grid
    acquisition: Acquisition
    mask: NDArray[np.float32]
    mask_1mm: NDArray[np.float32]
    log_bias: NDArray[np.float32]
    to_mni305: NDArray[np.float64]
    contrast: str
    depth_mm: NDArray[np.float64]  # 1 mm grid: how deep in the white matter, 0 elsewhere

    @classmethod
    def from_scan(cls, scan: Prepared, contrast: str) -> LesionCase:
        """The whole field of view of a scan that was prepared with bias field and affine."""
        assert scan.log_bias is not None
        assert scan.to_mni305 is not None
        white = np.isin(scan.brain.structures, WHITE_MATTER)
        return cls(
            scan.values,
            scan.grid,
            scan.acquisition,
            scan.mask,
            scan.mask_1mm.astype(np.float32),
            scan.log_bias,
            scan.to_mni305,
            contrast,
            ndimage.distance_transform_edt(white),
        )

    def deepest_mm(self) -> NDArray[np.float64]:
        """(3,) the place deepest in the white matter, mm."""
        deepest = np.unravel_index(self.depth_mm.argmax(), self.depth_mm.shape)
        place: NDArray[np.float64] = self.grid.one_millimetre().affine @ np.append(deepest, 1)
        return place[:3]

    def crop(self, centre_mm: NDArray[np.float64], size_mm: float) -> LesionCase:
        """The part of the field of view within half of ``size_mm`` along each axis."""
        at = np.linalg.inv(self.grid.affine) @ np.append(centre_mm, 1)
        half = size_mm / 2 / self.grid.spacing_mm
        start = np.maximum(np.round(at[:3] - half), 0).astype(int)
        stop = np.minimum(np.round(at[:3] + half), self.grid.shape).astype(int)
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        grid = self.grid.crop(tuple(start), tuple(stop))
        old, new = self.grid.one_millimetre(), grid.one_millimetre()
        return LesionCase(
            self.scan[part],
            grid,
            self.acquisition,
            self.mask[part],
            resample(self.mask_1mm, old, new, order=0),
            self.log_bias[part],
            self.to_mni305,
            self.contrast,
            resample(self.depth_mm, old, new, order=0).astype(np.float64),
        )


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
    """Part of a lesion's contrast that is left, 1: all of it."""

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
    """One restoration for every lesion, and one without any.

    Parameters
    ----------
    sizes_mm : diameters
    contrasts : relative change of the tissue: -0.3 is darker by 30 %
    noise_sd : float, optional
        Of a scan voxel, engine unit; estimated without.
    options
        Of ``restore``: ``n_samples``, ``seed`` …

    Raises
    ------
    InputError
        If a lesion does not lie wholly in the brain.
    """
    fine = case.grid.one_millimetre()
    away = np.linalg.norm(fine.points_mm() - centre_mm[:, None, None, None], axis=0)
    plain = _restored(case, case.scan, prior, noise_sd, options)
    kept = []
    for size, contrast in itertools.product(sizes_mm, contrasts):
        sphere = away <= size / 2
        if not sphere.any() or not (case.mask_1mm[sphere] > 0.5).all():
            raise InputError(
                f"check-lesion: a sphere of {size:g} mm at {np.round(centre_mm, 1).tolist()} mm "
                "does not lie wholly in the brain. Choose another place with --at."
            )
        share = F.adaptive_avg_pool3d(
            torch.from_numpy(sphere)[None, None].float(), case.grid.shape
        )[0, 0].numpy()
        scan = case.scan * (1 + contrast * share)
        with_lesion = _restored(case, scan, prior, noise_sd, options)
        put_in = contrast * plain.mean[sphere].mean()
        flat = resample((scan - case.scan) * np.exp(-case.log_bias), case.grid, fine, order=1)
        kept.append(
            Kept(
                float(size),
                float(contrast),
                float((with_lesion.mean - plain.mean)[sphere].mean() / put_in),
                float(flat[sphere].mean() / put_in),
                with_lesion.sampler,
            )
        )
    return kept


def _restored(
    case: LesionCase,
    scan: NDArray[np.float32],
    prior: Any,
    noise_sd: float | None,
    options: dict[str, Any],
) -> Restoration:
    observation = Observation(
        scan.astype(np.float32),
        grid=case.grid,
        acquisition=case.acquisition,
        mask=case.mask,
        log_bias=case.log_bias,
        noise_sd=noise_sd,
    )
    return restore(
        observation,
        mask_1mm=case.mask_1mm,
        to_mni305=case.to_mni305,
        contrast=case.contrast,
        prior=prior,
        **options,
    )
