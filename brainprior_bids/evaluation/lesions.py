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
    """A scan with the inputs of ``restore``, and the depth in the white matter, for lesions."""

    scan: NDArray[np.float32]
    grid: Grid
    acquisition: Acquisition
    mask: NDArray[np.float32]
    mask_1mm: NDArray[np.float32]
    log_bias: NDArray[np.float32]
    to_mni305: NDArray[np.float64]
    contrast: str
    depth_mm: NDArray[np.float64]  # 1 mm grid: depth in the white matter, 0 elsewhere

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
        """(3,) the deepest point of the white matter, scanner mm."""
        deepest = np.unravel_index(self.depth_mm.argmax(), self.depth_mm.shape)
        point: NDArray[np.float64] = self.grid.one_millimetre().affine @ np.append(deepest, 1)
        return point[:3]

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
    fine = case.grid.one_millimetre()
    distance = np.linalg.norm(fine.points_mm() - centre_mm[:, None, None, None], axis=0)
    plain = _restored(case, case.scan, prior, noise_sd, options)
    kept = []
    for size, contrast in itertools.product(sizes_mm, contrasts):
        sphere = distance <= size / 2
        if not sphere.any() or not (case.mask_1mm[sphere] > 0.5).all():
            raise InputError(
                f"check-lesion: a sphere of {size:g} mm at {np.round(centre_mm, 1).tolist()} mm "
                "is not entirely inside the brain. Choose another position with --at."
            )
        share = F.adaptive_avg_pool3d(
            torch.from_numpy(sphere)[None, None].float(), case.grid.shape
        )[0, 0].numpy()
        scan = case.scan * (1 + contrast * share)
        with_lesion = _restored(case, scan, prior, noise_sd, options)
        added = contrast * plain.mean[sphere].mean()
        flat = resample((scan - case.scan) * np.exp(-case.log_bias), case.grid, fine, order=1)
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
