# SPDX-License-Identifier: Apache-2.0
"""Files of the nodes: images, and the files of each anatomical step.

Each ``write_*`` writes one step's results to a folder and returns the node's outputs, name to
path.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import BaseInterfaceInputSpec, isdefined
from numpy.typing import DTypeLike, NDArray

from brainprior_bids.bids.files import write_json
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.records import (
    AcquisitionRecord,
    AffineRecord,
    BiasRecord,
    ConformFacts,
    ConformRecord,
    InterleaveRecord,
    LesionRecord,
    ParcellationRecord,
    matrix_rows,
)
from brainprior_bids.typed_json import Record

if TYPE_CHECKING:
    from brainprior_bids.anatomy.affine import AffineFit
    from brainprior_bids.anatomy.bias import BiasField
    from brainprior_bids.anatomy.conform import Conformed
    from brainprior_bids.anatomy.lesion import Lesion
    from brainprior_bids.anatomy.parcellation import Parcellation

Matrix = NDArray[np.float64]


def given(inputs: BaseInterfaceInputSpec) -> dict[str, Any]:
    """The inputs that are set, name to value."""
    return {name: value for name, value in inputs.get().items() if isdefined(value)}


def grid_of(image: nib.Nifti1Image) -> Grid:
    """The grid of a conformed image."""
    return Grid(image.shape[:3], image.affine)


def save(array: np.ndarray, grid: Grid, path: Path) -> str:
    """Write an array on a grid as NIfTI: its own dtype, slope 1, equal sform and qform."""
    image = nib.Nifti1Image(array, np.array(grid.affine))
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 1)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return str(path)


def read_array(path: str | Path, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """The values of an image, in its own dtype or the requested one."""
    return np.asarray(nib.load(path).dataobj, dtype)


def read_acquisition(conform_json: str | Path) -> Acquisition:
    """The slice geometry that ``write_conformed`` wrote."""
    return Acquisition.from_dict(ConformRecord.read(conform_json).acquisition.to_json())


def read_table(structures_json: str | Path) -> list[dict[str, Any]]:
    """The table of structures that ``write_brain`` wrote."""
    return [row.to_json() for row in ParcellationRecord.read(structures_json).table]


def read_lost(structures_json: str | Path | None) -> tuple[int, ...]:
    """The slices without signal that ``write_brain`` wrote; none without a file."""
    return ParcellationRecord.read(structures_json).lost_slices if structures_json else ()


def read_matrix(affine_json: str | Path) -> Matrix:
    """The (4, 4) matrix, scanner to MNI305 RAS mm, that ``write_affine`` wrote."""
    return np.array(AffineRecord.read(affine_json).matrix, np.float64)


def write_record(record: Record, path: Path) -> str:
    """Write a step's record."""
    return str(write_json(path, record.to_json()))


def write_conformed(conformed: Conformed, folder: Path) -> dict[str, str]:
    """Outputs of Conform."""
    out_file = folder / "scan.nii.gz"
    nib.save(conformed.image, out_file)
    record = ConformRecord(
        acquisition=AcquisitionRecord.from_json(conformed.acquisition.to_dict()),
        facts=ConformFacts.from_json(conformed.facts),
        warnings=tuple(conformed.warnings),
    )
    return {
        "out_file": str(out_file),
        "conform_json": write_record(record, folder / "conform.json"),
    }


def write_brain(brain: Parcellation, scan_grid: Grid, folder: Path) -> dict[str, str]:
    """Outputs of Parcellate."""
    grid = scan_grid.one_millimetre()
    structures = np.asarray(brain.structures, np.int16)
    mask = np.asarray(brain.mask, np.uint8)
    mask_scan = np.asarray(brain.mask_scan, np.float32)
    record = ParcellationRecord.from_json(
        {"table": brain.table, "warnings": brain.warnings, **brain.facts}
    )
    return {
        "structures": save(structures, grid, folder / "structures.nii.gz"),
        "mask": save(mask, grid, folder / "mask.nii.gz"),
        "mask_scan": save(mask_scan, scan_grid, folder / "mask_scan.nii.gz"),
        "structures_json": write_record(record, folder / "structures.json"),
    }


def write_lesion(lesion: Lesion, scan_grid: Grid, folder: Path) -> dict[str, str]:
    """Outputs of Lesion."""
    record = LesionRecord.from_json({**lesion.facts, "warnings": lesion.warnings})
    return {
        "hidden": save(lesion.hidden, scan_grid, folder / "hidden.nii.gz"),
        "mask": save(lesion.mask_1mm, scan_grid.one_millimetre(), folder / "mask.nii.gz"),
        "mask_scan": save(lesion.mask_scan, scan_grid, folder / "mask_scan.nii.gz"),
        "measured": save(lesion.measured, scan_grid, folder / "measured.nii.gz"),
        "lesion_json": write_record(record, folder / "lesion.json"),
    }


def write_bias(bias: BiasField, scan_grid: Grid, folder: Path) -> dict[str, str]:
    """Outputs of N4."""
    values = np.asarray(bias.log_bias, np.float32)
    return {
        "log_bias": save(values, scan_grid, folder / "log_bias.nii.gz"),
        "bias_json": write_record(bias_record(bias), folder / "bias.json"),
    }


def bias_record(bias: BiasField) -> BiasRecord:
    """Slice gains, in per cent and as factors, and the motion between interleaves."""
    gains, motion = bias.gains, None
    if bias.interleaves is not None:
        motion = InterleaveRecord(
            moved=bias.interleaves.moved,
            obstacle=bias.interleaves.obstacle,
            to_reference=tuple(matrix_rows(one) for one in bias.interleaves.to_reference),
            rms_mm=round(bias.interleaves.rms_mm, 3),
            across_mm=round(bias.interleaves.across_mm, 3),
            error_mm=round(bias.interleaves.error_mm, 3),
            mismatch_ratio=round(bias.interleaves.mismatch_ratio, 3),
        )
    if gains is None:
        return replace(BiasRecord.from_json({"warnings": bias.warnings}), interleaves=motion)
    return BiasRecord(
        applied=gains.applied,
        gains=tuple(round(float(gain), 5) for gain in np.exp(gains.log_gains)),
        compared=tuple(bool(one) for one in gains.compared),
        alternation_percent=round(100 * gains.alternation, 3),
        alternation_se_percent=round(100 * gains.alternation_se, 3),
        random_sd_percent=round(100 * gains.gain_sd, 3),
        rms_percent=round(100 * gains.rms, 3),
        evidence=round(gains.evidence, 2),
        warnings=tuple(bias.warnings),
        interleaves=motion,
    )


def write_affine(fit: AffineFit, folder: Path) -> dict[str, str]:
    """Outputs of CentroidAffine."""
    from brainprior_bids.anatomy.spaces import write_itk_affine

    matrix = np.asarray(fit.matrix, np.float64)
    record = AffineRecord(
        matrix=matrix_rows(matrix),
        method=fit.method,
        dof=fit.dof,
        residuals_mm=fit.residuals_mm,
        median_residual_mm=fit.median_residual_mm,
        hull_residual_mm=fit.hull_residual_mm,
        used=tuple(fit.used),
        warnings=tuple(fit.warnings),
    )
    forward, inverse = folder / "to_mni305.txt", folder / "from_mni305.txt"
    return {
        "affine_json": write_record(record, folder / "affine.json"),
        "to_mni305": str(write_itk_affine(forward, matrix)),
        "from_mni305": str(write_itk_affine(inverse, np.linalg.inv(matrix))),
    }
