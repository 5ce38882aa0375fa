# SPDX-License-Identifier: Apache-2.0
"""One scan from Python, without BIDS: the steps of the command with the embedded networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib

from brainprior_bids.anatomy.prepare import Prepared, prepare
from brainprior_bids.engine.conditioning import PriorLike
from brainprior_bids.engine.restore import RIM_MM, restore
from brainprior_bids.engine.result import Restoration
from brainprior_bids.engine.weights import load_prior


def restore_scan(
    scan: str | Path | nib.spatialimages.SpatialImage,
    *,
    contrast: str,
    metadata: Mapping[str, Any] | None = None,
    lesion: Path | None = None,
    prior: PriorLike | None = None,
    **options: Any,
) -> Restoration:
    """Conform, parcellate, N4, affine to MNI305 and restore one scan.

    These are the steps of the command (``anatomy.prepare``), with its fallbacks and warnings;
    sidecars, reports and quality metrics are the command's alone.

    Parameters
    ----------
    scan : path or nibabel image
        A whole head or a brain, three-dimensional.
    contrast : str
        "T1w", "T2w", "FLAIR" or "unknown".
    metadata : mapping, optional
        BIDS fields that describe the acquisition, above all "SliceThickness" in mm; without them
        the header is used.
    lesion : path, optional
        Mask on the scan's grid, above 0 in the lesion; the scan is treated as missing there.
    prior : Prior, optional
        Default: the embedded one.
    **options
        Further options of ``engine.restore.restore``: ``n_samples``, ``seed``, ``device`` …

    Returns
    -------
    Restoration
        Images on ``grid``: 1 mm, the frame of the scan, scanner units; ``warnings`` of all steps.

    Raises
    ------
    BrainpriorError
        As ``prepare`` and ``restore`` do.
    """
    prepared = prepare(scan, metadata=metadata, lesion=lesion, threads=2)
    result = _restore(prepared, contrast, prior or load_prior(), {"rim_mm": RIM_MM, **options})
    return replace(result, warnings=[*prepared.warnings, *result.warnings])


def _restore(
    scan: Prepared, contrast: str, prior: PriorLike, options: Mapping[str, Any]
) -> Restoration:
    assert scan.to_mni305 is not None
    return restore(
        scan.observation,
        mask_1mm=scan.mask_1mm,
        to_mni305=scan.to_mni305,
        contrast=contrast,
        prior=prior,
        **options,
    )
