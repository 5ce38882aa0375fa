# SPDX-License-Identifier: Apache-2.0
"""A template in a folder like TemplateFlow's, for tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SPACE = "MNI152NLin2009cAsym"


def paths_of(home: Path) -> tuple[Path, Path]:
    """Image and brain mask of the template in TemplateFlow's folder."""
    stem = f"tpl-{SPACE}/tpl-{SPACE}_res-01"
    return home / f"{stem}_T1w.nii.gz", home / f"{stem}_desc-brain_mask.nii.gz"


def write_template(home: Path, image: np.ndarray, affine: np.ndarray) -> None:
    """Write a template whose brain is where the image is not 0."""
    for path, data in zip(paths_of(home), (image, image != 0), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine), path)
