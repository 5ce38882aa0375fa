# SPDX-License-Identifier: Apache-2.0
"""The brain of a scan at 1 mm, without bias field, for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.conform import read_geometry
from brainprior_bids.anatomy.prepare import prepare
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork

THICKEST_MM = 1.5
"""Largest voxel size of a 1 mm scan."""


@dataclass(frozen=True, eq=False)
class ExtractedBrain:
    """A brain in the form that the prior processes.

    Attributes
    ----------
    data : (i, j, k) float32 array
        Bias-free, 99th percentile = 1, 0 outside the mask.
    mask : (i, j, k) bool array
    structures : (i, j, k) int16 array
        FreeSurfer values.
    grid : Grid
        Grid of all three: about 1 mm, the scan's axes and edges, RAS.
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
        Divide by N4's field.

    Raises
    ------
    InputError
        If a voxel is thicker than ``THICKEST_MM``, and as ``prepare``.
    GeometryError, AnatomyError, DivergenceError
        As ``prepare``.
    """
    spacing_mm = read_geometry(path, metadata=metadata or {}).grid.spacing_mm
    if spacing_mm.max() > THICKEST_MM:
        raise InputError(
            "Expected voxels of about 1 mm, got "
            f"{np.round(spacing_mm, 2).tolist()} mm. Leave the scan out."
        )
    scan = prepare(path, metadata=metadata, network=network, unbias=unbias)
    assert scan.to_mni305 is not None
    data = scan.values if scan.log_bias is None else scan.values / np.exp(scan.log_bias)
    grid, mask = scan.grid.one_millimetre(), scan.mask_1mm > 0
    brain = resample(data, scan.grid, grid) if grid != scan.grid else data
    brain = np.where(mask, np.maximum(brain, 0), 0).astype(np.float32)
    brain /= np.float32(np.percentile(brain[mask], 99))
    return ExtractedBrain(brain, mask, scan.brain.structures, grid, scan.to_mni305, scan.warnings)
