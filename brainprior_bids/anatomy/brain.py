# SPDX-License-Identifier: Apache-2.0
"""The steps before a restoration, in one call: a scan in, its brain at 1 mm without bias out.

Training and evaluation need what the workflow's nodes conform, parcellate, n4 and affine find,
and nothing of a restoration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.external import assemble, checked_mask, stripped_edge
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.parcellation import Parcellation, parcellate
from brainprior_bids.anatomy.rescue import find_affine, template_folder
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork

THICKEST_MM = 1.5
"""A voxel above this is no 1 mm scan."""


@dataclass(frozen=True, eq=False)
class ExtractedBrain:
    """A brain as the prior sees it.

    Attributes
    ----------
    data : (i, j, k) float32 array
        Bias-free, 99th percentile = 1, 0 outside the mask.
    mask : (i, j, k) bool array
    structures : (i, j, k) int16 array
        FreeSurfer values.
    grid : Grid
        Of all three: about 1 mm, the scan's axes and edges, RAS.
    to_mni305 : (4, 4) array
        Scanner RAS mm to MNI305 RAS mm.
    warnings : list of str
    """

    data: NDArray[np.float32]
    mask: NDArray[np.bool_]
    structures: NDArray[np.int16]
    grid: Grid
    to_mni305: NDArray[np.float64]
    warnings: list[str] = field(default_factory=list)


def with_own_edge(
    image: nib.Nifti1Image, found: Parcellation, grid: Grid
) -> tuple[Parcellation, list[str]]:
    """The parcellation inside the scan's own edge where it is skull-stripped; else as it is.

    Parameters
    ----------
    image : Nifti1Image
        The conformed scan.
    found : Parcellation
        Of the network, on ``grid``.
    grid : Grid
        The scan's 1 mm grid.

    Returns
    -------
    parcellation, warnings

    Raises
    ------
    AnatomyError
        As ``checked_mask`` and ``assemble``.
    """
    edge = stripped_edge(image, found.mask_scan)
    if edge is None:
        return found, []
    scan_grid = Grid(image.shape, image.affine)
    own = resample(edge, scan_grid, grid, order=1) >= 0.5
    own, warnings = checked_mask(own, grid, source="the scan's own edge")
    known = {row["index"]: row["confidence"] for row in found.table}
    made = assemble(found.structures, own, known, scan_grid=scan_grid, restored_grid=grid)
    return made, warnings


def extract_brain(
    path: Path,
    *,
    network: ParcellationNetwork,
    metadata: Mapping[str, Any] | None = None,
    unbias: bool = True,
) -> ExtractedBrain:
    """Skull-strip, correct, scale and align one scan of about 1 mm.

    Parameters
    ----------
    path : Path
        NIfTI with or without scalp; a stripped scan keeps its own edge.
    network : ParcellationNetwork
    metadata : Mapping, optional
        The scan's BIDS metadata.
    unbias : bool
        Divide by the field that N4 finds.

    Raises
    ------
    InputError
        If a voxel is thicker than ``THICKEST_MM``, and as ``conform``.
    AnatomyError
        If no brain is found, or no affine fits it.
    """
    conformed = conform(path, metadata=metadata or {})
    image = conformed.image
    scan_grid = Grid(image.shape, image.affine)
    if scan_grid.spacing_mm.max() > THICKEST_MM:
        raise InputError(
            "Expected voxels of about 1 mm, got "
            f"{np.round(scan_grid.spacing_mm, 2).tolist()} mm. Leave the scan out."
        )
    grid = scan_grid.one_millimetre()
    found = parcellate(image, network=network, restored_grid=grid)
    warnings = [*conformed.warnings, *found.warnings]
    found, more = with_own_edge(image, found, grid)
    warnings += more
    mask = found.mask > 0
    data = image.get_fdata(dtype=np.float32)
    if unbias:
        data = data / np.exp(n4(image, found.mask_scan, threads=1))
    brain = resample(data, scan_grid, grid) if grid != scan_grid else data
    brain = np.where(mask, np.maximum(brain, 0), 0).astype(np.float32)
    brain /= np.float32(np.percentile(brain[mask], 99))
    stored = nib.Nifti1Image(mask.astype(np.uint8), np.array(grid.affine))
    fit = find_affine(
        found.table, surface(mask, grid), image=image, mask=stored, templates=template_folder()
    )
    return ExtractedBrain(
        brain, mask, found.structures, grid, np.asarray(fit.matrix), [*warnings, *fit.warnings]
    )
