# SPDX-License-Identifier: Apache-2.0
"""One scan from Python, without BIDS: the steps of the command with the embedded networks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainprior_bids.anatomy.affine import fit_affine
from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.brain import with_own_edge
from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.restore import RIM_MM, PriorLike, Restoration, restore
from brainprior_bids.engine.weights import load_parcellation, load_prior


def restore_scan(
    scan: str | Path | nib.spatialimages.SpatialImage,
    *,
    contrast: str,
    metadata: Mapping[str, Any] | None = None,
    prior: PriorLike | None = None,
    **options: Any,
) -> Restoration:
    """Conform, parcellate, N4, affine to MNI305 and restore one scan.

    The command does the same and besides it checks the result, reports, and falls back where a
    step fails; here a failure is an exception.

    Parameters
    ----------
    scan : path or nibabel image
        A whole head or a brain, three-dimensional.
    contrast : str
        "T1w", "T2w", "FLAIR" or "unknown".
    metadata : mapping, optional
        BIDS fields that say how it was made, above all "SliceThickness" in mm; without them the
        header counts.
    prior : Prior, optional
        Default: the embedded one.
    **options
        Further ones of ``engine.restore.restore``: ``n_samples``, ``seed``, ``device`` and others.

    Returns
    -------
    Restoration
        Images on ``grid``: 1 mm, the frame of the scan, scanner units; ``warnings`` of all steps.

    Raises
    ------
    BrainpriorError
        As ``conform``, ``parcellate``, ``fit_affine`` and ``restore`` do.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        if isinstance(scan, (str, Path)):
            path = Path(scan)
        else:
            nib.save(scan, path)
        conformed = conform(path, metadata=metadata or {})
        image = nib.Nifti1Image(
            conformed.image.get_fdata(dtype=np.float32), conformed.image.affine
        )
    grid = Grid(image.shape, image.affine)
    restored_grid = grid.one_millimetre()
    found = parcellate(image, network=load_parcellation(), restored_grid=restored_grid)
    brain, stripped = with_own_edge(image, found, restored_grid)
    fit = fit_affine(brain.table, surface=surface(brain.mask > 0, restored_grid))
    done = restore(
        image.get_fdata(dtype=np.float32),
        grid=grid,
        acquisition=conformed.acquisition,
        mask=brain.mask_scan,
        mask_1mm=brain.mask,
        to_mni305=fit.matrix,
        contrast=contrast,
        prior=prior or load_prior(),
        log_bias=n4(image, brain.mask_scan),
        **{"rim_mm": RIM_MM, **options},
    )
    before = [*conformed.warnings, *found.warnings, *stripped, *fit.warnings]
    return replace(done, warnings=[*before, *done.warnings])
