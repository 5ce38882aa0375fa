# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of a scan: conform, parcellate, lesion, bias, affine to MNI305.

``prepare`` runs all steps on one scan and keeps the results in memory. Each node of the command
runs one of them and writes files; both call the same functions:

==============  ========================================
step            function
==============  ========================================
conform         ``conform_scan``
parcellate      ``anatomy.brain.find_brain``
lesion          ``anatomy.lesion.find_lesion``
n4              ``anatomy.bias.find_bias``
affine          ``align_to_mni305``
==============  ========================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainprior_bids.anatomy.affine import AffineFit
from brainprior_bids.anatomy.bias import BiasField, find_bias
from brainprior_bids.anatomy.brain import BrainSources, find_brain
from brainprior_bids.anatomy.conform import Conformed, conform
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.interleaves import treatment
from brainprior_bids.anatomy.lesion import Lesion, find_lesion
from brainprior_bids.anatomy.padding import unmeasured
from brainprior_bids.anatomy.parcellation import Parcellation
from brainprior_bids.anatomy.rescue import find_affine, template_folder
from brainprior_bids.anatomy.resolution import Sizes
from brainprior_bids.anatomy.slices import hidden_voxels, without_slices
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import load_parcellation

ScanLike = str | Path | nib.spatialimages.SpatialImage


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan with everything that the engine needs, and the result of each step.

    Attributes
    ----------
    conformed : Conformed
        The scan on closest-canonical axes, and facts about its header.
    brain : Parcellation
        Mask, structures and their table, without the lesion.
    lesion : Lesion or None
        Set if there is a lesion mask.
    bias : BiasField or None
        N4's field with the slice gains; None if not requested.
    affine : AffineFit or None
        Scanner to MNI305 and its residuals; None if not requested.
    """

    conformed: Conformed
    brain: Parcellation
    lesion: Lesion | None
    bias: BiasField | None
    affine: AffineFit | None

    @property
    def values(self) -> NDArray[np.float32]:
        """(i, j, k) scan on ``grid``, scanner units."""
        values: NDArray[np.float32] = self.conformed.image.get_fdata(dtype=np.float32)
        return values

    @property
    def grid(self) -> Grid:
        """The scan's own grid, closest-canonical (RAS) axes."""
        return self.conformed.grid

    @property
    def acquisition(self) -> Acquisition:
        """Slice geometry on the axes of ``grid``."""
        return self.conformed.acquisition

    @property
    def mask(self) -> NDArray[np.float32]:
        """(i, j, k) share of each voxel of the scan in brain or lesion, 0 to 1."""
        return self.brain.mask_scan if self.lesion is None else self.lesion.mask_scan

    @property
    def mask_1mm(self) -> NDArray[np.uint8]:
        """Brain and lesion on ``grid.one_millimetre()``, 1 inside."""
        return self.brain.mask if self.lesion is None else self.lesion.mask_1mm

    @property
    def hidden(self) -> NDArray[np.uint8] | None:
        """(i, j, k): 1 in the lesion and in lost slices, which are treated as missing, or None."""
        lesion = None if self.lesion is None else self.lesion.hidden
        axis = self.acquisition.slice_axis
        return hidden_voxels(lesion, self.brain.lost, self.grid.shape, axis=axis)

    @property
    def log_bias(self) -> NDArray[np.float32] | None:
        """(i, j, k) natural log of the bias field on ``grid``, mean 0 in the brain, or None."""
        return None if self.bias is None else self.bias.log_bias

    @property
    def interleave_motion(self) -> NDArray[np.float64] | None:
        """(n, 4, 4) scanner RAS mm of each interleave to the first, if the participant moved in
        between and the scan can be restored with this motion.
        """
        motion = None if self.bias is None else self.bias.interleaves
        if motion is None or not motion.moved or motion.obstacle is not None:
            return None
        return motion.to_reference

    @property
    def observation(self) -> Observation:
        """The scan as the engine takes it: lesion and lost slices hidden, motion between the
        interleaves stated where it is known accurately.
        """
        return Observation(
            self.values,
            self.grid,
            self.acquisition,
            self.mask,
            log_bias=self.log_bias,
            hidden=self.hidden,
            interleave_motion=self.interleave_motion,
        )

    @property
    def to_mni305(self) -> NDArray[np.float64] | None:
        """(4, 4) scanner RAS mm to MNI305 RAS mm; None if not requested."""
        return None if self.affine is None else np.asarray(self.affine.matrix, np.float64)

    @property
    def warnings(self) -> list[str]:
        """Warnings of all steps, in their order; whether motion is corrected comes last."""
        steps = (self.conformed, self.brain, self.lesion, self.bias, self.affine)
        warnings = [text for step in steps if step is not None for text in step.warnings]
        motion = None if self.bias is None else self.bias.interleaves
        if motion is not None and motion.moved:
            warnings.append(treatment(motion.obstacle))
        return warnings


def prepare(
    scan: ScanLike,
    *,
    metadata: Mapping[str, Any] | None = None,
    slice_thickness_mm: float | None = None,
    slice_axis: int | None = None,
    effective_resolution: str | Sizes = "auto",
    network: ParcellationNetwork | None = None,
    sources: BrainSources | None = None,
    lesion: Path | None = None,
    dilate_mm: float = 0.0,
    unbias: bool = True,
    align: bool = True,
    threads: int = 1,
    folder: Path | None = None,
) -> Prepared:
    """Conform, parcellate, bias field and affine to MNI305 of one scan.

    Parameters
    ----------
    scan : path or nibabel image
        A whole head or a brain, three-dimensional.
    metadata : Mapping, optional
        The scan's BIDS metadata, above all ``SliceThickness`` in mm.
    slice_thickness_mm : float, optional
        Takes precedence over ``SliceThickness``.
    slice_axis : {0, 1, 2}, optional
        On closest-canonical axes: 0 for sagittal slices, 1 coronal, 2 axial.
    effective_resolution : "auto", "off" or 3 floats
        Whether the scan was interpolated: see ``anatomy.resolution``.
    network : ParcellationNetwork, optional
        Default: the embedded one, on the CPU.
    sources : BrainSources, optional
        Sources of mask and structures; default: ``network``.
    lesion : Path, optional
        Mask on the scan's grid, above 0 in the lesion; the scan is treated as missing there.
    dilate_mm : float
        Dilation of the lesion mask.
    unbias, align : bool
        False: without the bias field, without the affine.
    threads : int
        For N4 and external programs.
    folder : Path, optional
        Folder in which external programs write; default: a temporary folder.

    Raises
    ------
    InputError, GeometryError
        As ``conform_scan``, ``find_brain`` and ``find_lesion``.
    AnatomyError
        If there is no brain, too little of it for N4, or no plausible affine.
    DivergenceError
        If N4's field is not finite.
    """
    conformed = conform_scan(
        scan,
        metadata=metadata,
        slice_thickness_mm=slice_thickness_mm,
        slice_axis=slice_axis,
        effective_resolution=effective_resolution,
    )
    image = conformed.image
    brain = find_brain(
        image,
        network=network or load_parcellation(),
        sources=sources,
        slice_axis=conformed.acquisition.slice_axis,
        threads=threads,
        folder=folder,
    )
    hole = None
    if lesion is not None:
        hole = find_lesion(
            lesion,
            conformed.grid,
            mask_1mm=brain.mask,
            mask_scan=brain.mask_scan,
            dilate_mm=dilate_mm,
        )
    measured = brain.mask_scan if hole is None else hole.measured
    measured = without_slices(measured, brain.lost, axis=conformed.acquisition.slice_axis)
    bias = find_bias(image, measured, conformed.acquisition, threads=threads) if unbias else None
    affine = align_to_mni305(image, brain.mask, brain.table) if align else None
    return Prepared(conformed, brain, hole, bias, affine)


def conform_scan(
    scan: ScanLike,
    *,
    metadata: Mapping[str, Any] | None = None,
    slice_thickness_mm: float | None = None,
    slice_axis: int | None = None,
    effective_resolution: str | Sizes = "auto",
) -> Conformed:
    """``conform`` for a file, or for an image in memory, which is treated like its file.

    Parameters and errors are those of ``conform``; an image is called "scan" in messages.
    """
    options: dict[str, Any] = {
        "metadata": metadata or {},
        "slice_thickness_mm": slice_thickness_mm,
        "slice_axis": slice_axis,
        "effective_resolution": effective_resolution,
    }
    if isinstance(scan, str | Path):
        return conform(Path(scan), **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii"
        nib.save(scan, path)
        return conform(path, **options)


def align_to_mni305(
    image: nib.Nifti1Image, mask_1mm: ArrayLike, table: Sequence[Mapping[str, Any]]
) -> AffineFit:
    """Scanner to MNI305: from structures and brain surface, or by the template if they fail.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k) conformed scan.
    mask_1mm : array
        Brain on the image's ``Grid.one_millimetre``, above 0 inside.
    table : sequence of mappings
        As ``Parcellation.table``.

    Raises
    ------
    AnatomyError
        If neither way yields a plausible transform; the message has both reasons.
    """
    grid = Grid(image.shape, image.affine).one_millimetre()
    inside = np.asarray(mask_1mm) > 0
    return find_affine(
        table,
        surface(inside, grid, unmeasured(image, inside)),
        image=image,
        mask=nib.Nifti1Image(inside.astype(np.uint8), np.array(grid.affine)),
        templates=template_folder(),
    )
