# SPDX-License-Identifier: Apache-2.0
"""Standard spaces: nonlinear registration to a template (ANTs' SyN), and resampling through it.

The restored brain is registered to the template's brain: an affine by mutual information, starting
from the affine to MNI305, then SyN. SyN uses the local correlation for a T1w, the contrast of the
template, and mutual information for other contrasts. The transforms are composite ITK files in
HDF5, as fMRIPrep writes them, which ``antsApplyTransforms -t`` takes as one.

``from-A_to-B`` resamples A on the grid of B, as in ``anatomy.spaces``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.rescue import fixed_seed, register_affine, to_ants
from brainprior_bids.anatomy.spaces import Kind
from brainprior_bids.anatomy.templates import Template, as_asked
from brainprior_bids.engine.errors import AnatomyError

WORK_MM = 2.0
"""Voxel size of the registration, and of the displacement field in the files."""
ITERATIONS = (100, 70, 20)
"""Iterations of SyN at 8, 4 and 2 mm."""
SLOPPY_MM, SLOPPY_ITERATIONS = 4.0, (20, 20, 10)
"""With ``--sloppy``: a coarse alignment."""
CORRELATION_RADIUS = 2
"""In voxels of ``WORK_MM``: 4 mm, as in fMRIPrep."""
HISTOGRAM_BINS = 32
MARGIN_MM = 16.0
"""Around the template's brain, in which the displacement is found; beyond it the affine holds."""
MNI152_CODE, OTHER_TEMPLATE_CODE = 4, 5
"""NIfTI's codes of sform and qform."""
INTERPOLATORS = {
    Kind.IMAGE: "bSpline",
    Kind.SPREAD: "linear",
    Kind.MASK: "linear",
    Kind.LABELS: "genericLabel",
}


class Metric(StrEnum):
    """Metric of the nonlinear stage, by ANTs' names."""

    CORRELATION = "CC"
    INFORMATION = "mattes"

    @property
    def words(self) -> str:
        """Description in words, for records and the methods text."""
        return {
            Metric.CORRELATION: "local cross-correlation",
            Metric.INFORMATION: "mutual information",
        }[self]

    @property
    def sampling(self) -> int:
        """ANTs' parameter: a radius in voxels, or a number of bins."""
        return CORRELATION_RADIUS if self is Metric.CORRELATION else HISTOGRAM_BINS


def metric(contrast: str) -> Metric:
    """The metric for an image of this contrast; the templates are T1w."""
    return Metric.CORRELATION if contrast == "T1w" else Metric.INFORMATION


@dataclass(frozen=True)
class Warp:
    """The files of a nonlinear registration.

    Parameters
    ----------
    to_template, from_template : Path
        Composite ITK transforms, HDF5: the scan on the template's grid, and back.
    """

    to_template: Path
    from_template: Path


def register(
    image: nib.Nifti1Image,
    mask: nib.Nifti1Image,
    template: Template,
    *,
    to_mni305: NDArray[np.float64],
    contrast: str,
    folder: Path,
    sloppy: bool = False,
) -> Warp:
    """Register a brain to a template.

    Parameters
    ----------
    image, mask : Nifti1Image
        (i, j, k) of one grid, in the scan's space; arbitrary units.
    template : Template
    to_mni305 : (4, 4) array
        Scanner RAS mm to MNI305 RAS mm, from which the registration starts.
    contrast : str
        ``T1w``, or another one.
    folder : Path
        Where the two files are written.
    sloppy : bool
        For tests: larger voxels and few iterations, none at the finest level.

    Raises
    ------
    AnatomyError
        If the registration fails.
    """
    import ants

    inside = np.asarray(mask.dataobj) > 0
    moving = to_ants(np.where(inside, image.get_fdata(dtype=np.float32), 0), image.affine)
    voxel_mm = SLOPPY_MM if sloppy else WORK_MM
    fixed = ants.resample_image(to_ants(*around_the_brain(template)), (voxel_mm,) * 3)
    compared = metric(contrast)
    with tempfile.TemporaryDirectory() as scratch, fixed_seed():
        try:
            affine = register_affine(
                fixed, moving, start=template.from_mni305() @ to_mni305, folder=Path(scratch)
            )
            result = ants.registration(
                fixed=fixed,
                moving=moving,
                type_of_transform="SyNOnly",
                initial_transform=affine,
                syn_metric=compared.value,
                syn_sampling=compared.sampling,
                reg_iterations=SLOPPY_ITERATIONS if sloppy else ITERATIONS,
                write_composite_transform=True,
                outprefix=f"{scratch}/syn",
            )
        except RuntimeError as error:
            space = as_asked(template.space)
            raise AnatomyError(
                f"The registration to {space} failed ({error}). Look at the brain mask; "
                f"without {space} in --output-spaces the scan is restored all the same."
            ) from error
        warp = Warp(folder / f"to_{template.space}.h5", folder / f"from_{template.space}.h5")
        copy_without_times(Path(result["fwdtransforms"]), warp.to_template)
        copy_without_times(Path(result["invtransforms"]), warp.from_template)
    return warp


def around_the_brain(template: Template) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The template's brain and a margin of 16 mm, and its affine: half of the field of view."""
    brain, grid = template.brain(), template.grid
    margin = np.ceil(MARGIN_MM / grid.spacing_mm).astype(int)
    voxels = np.argwhere(brain)
    start = np.maximum(voxels.min(0) - margin, 0)
    stop = np.minimum(voxels.max(0) + 1 + margin, grid.shape)
    part = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    return brain[part], np.asarray(grid.crop(tuple(start), tuple(stop)).affine)


def copy_without_times(source: Path, target: Path) -> None:
    """Copy a transform in HDF5 without the times of its writing, which ITK stores in it.

    The same registration then gives the same bytes.
    """
    import h5py

    with h5py.File(source) as old, h5py.File(target, "w") as new:

        def copy(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(
                    name,
                    data=item[()],
                    dtype=item.dtype,
                    chunks=item.chunks,
                    compression=item.compression,
                )

        old.visititems(copy)


def resample_through(
    image: nib.Nifti1Image,
    template: Template,
    transforms: Sequence[Path],
    *,
    kind: Kind = Kind.IMAGE,
) -> nib.Nifti1Image:
    """The image on the template's grid, interpolated once; as ``anatomy.spaces.move``.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k) in the scan's space.
    template : Template
    transforms : sequence of Path
        As for ``antsApplyTransforms``: the last one is next to the image.
    kind : Kind

    Returns
    -------
    Nifti1Image
        float32; of a mask uint8, of labels int16. Its forms' code is that of MNI152 or of another
        template.
    """
    import ants

    grid = template.grid
    reference = to_ants(np.zeros(grid.shape, np.float32), grid.affine)
    values = image.get_fdata(dtype=np.float32)

    def through(array: NDArray[np.float32], interpolator: str) -> NDArray[np.float32]:
        moved = ants.apply_transforms(
            fixed=reference,
            moving=to_ants(array, image.affine),
            transformlist=[str(path) for path in transforms],
            interpolator=interpolator,
        )
        return np.asarray(moved.numpy(), np.float32)

    if kind is Kind.MASK:
        data = (through((values > 0).astype(np.float32), "linear") >= 0.5).astype(np.uint8)
    elif kind is Kind.LABELS:
        data = np.rint(through(values, INTERPOLATORS[kind])).astype(np.int16)
    else:
        data = through(values, INTERPOLATORS[kind])
        np.maximum(data, min(float(values.min()), 0.0), out=data)
        data[through((values != 0).astype(np.float32), "linear") < 0.5] = 0
    result = nib.Nifti1Image(data, np.array(grid.affine))
    code = MNI152_CODE if template.space.startswith("MNI152") else OTHER_TEMPLATE_CODE
    result.set_sform(grid.affine, code)
    result.set_qform(grid.affine, code)
    result.header.set_slope_inter(1, 0)
    result.header.set_xyzt_units("mm", "sec")
    return result


def agreement(mask: NDArray[np.bool_], template: Template) -> float:
    """Dice of a brain mask on the template's grid with the template's own."""
    own = template.mask_array()
    return float(2 * (mask & own).sum() / max(1, mask.sum() + own.sum()))
