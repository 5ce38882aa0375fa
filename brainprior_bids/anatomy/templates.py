# SPDX-License-Identifier: Apache-2.0
"""Templates of standard spaces in TemplateFlow's folder; nothing is downloaded.

The files are looked up by their paths: importing ``templateflow`` alone writes a skeleton of empty
files into its folder, and its ``get`` fetches what is missing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid

SERVER = "https://templateflow.s3.amazonaws.com"
MNI152_FROM_MNI305 = np.array(
    [
        [0.9975, -0.0073, 0.0176, -0.0429],
        [0.0146, 1.0009, -0.0024, 1.5496],
        [-0.0130, -0.0093, 0.9971, 1.1840],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""FreeSurfer's published affine, mm to mm."""


def templateflow_home() -> Path:
    """TemplateFlow's folder, which need not exist."""
    home = os.environ.get("TEMPLATEFLOW_HOME")
    return Path(home) if home else Path(os.path.expanduser("~/.cache/templateflow"))


def is_fetched(path: Path) -> bool:
    """Whether a file exists; TemplateFlow's skeleton has empty files in place of missing ones."""
    return path.is_file() and path.stat().st_size > 0


@dataclass(frozen=True)
class Template:
    """A 1 mm T1w template and its brain mask.

    Parameters
    ----------
    space : str
        TemplateFlow's name, as in ``space-``.
    image, mask : Path
    """

    space: str
    image: Path
    mask: Path

    @property
    def address(self) -> str:
        """Address at which TemplateFlow publishes the image that defines the space; it is not
        fetched.
        """
        return f"{SERVER}/tpl-{self.space}/{self.image.name}"

    @cached_property
    def grid(self) -> Grid:
        """Grid of both."""
        image = nib.load(self.image)
        return Grid(image.shape, image.affine)

    def mask_array(self) -> NDArray[np.bool_]:
        """(i, j, k) brain."""
        return np.asarray(nib.load(self.mask).dataobj) > 0.5

    def brain(self) -> NDArray[np.float32]:
        """(i, j, k) image, 0 outside of the brain; arbitrary units."""
        image = nib.load(self.image).get_fdata(dtype=np.float32)
        return np.where(self.mask_array(), image, np.float32(0))


def find_template(space: str) -> Template:
    """The template of a space in TemplateFlow's folder.

    Raises
    ------
    UsageError
        If it is missing or unreadable; the message says how to fetch it.
    """
    folder = templateflow_home()
    stem = folder / f"tpl-{space}" / f"tpl-{space}_res-01"
    template = Template(
        space,
        stem.with_name(f"{stem.name}_T1w.nii.gz"),
        stem.with_name(f"{stem.name}_desc-brain_mask.nii.gz"),
    )
    for path in (template.image, template.mask):
        if not is_fetched(path):
            what = "is an empty placeholder" if path.is_file() else "is missing"
            raise UsageError(_not_there(space, f"{path} {what}"))
        try:
            image = nib.load(path)
            same = image.shape == template.grid.shape and np.allclose(
                image.affine, template.grid.affine, atol=1e-3
            )
        except Exception as error:  # any error of nibabel for a broken file
            raise UsageError(_not_there(space, f"{path} cannot be read ({error})")) from error
        if len(image.shape) != 3 or not same:
            raise UsageError(
                _not_there(space, f"{path} has another grid than {template.image.name}")
            )
    return template


def _not_there(space: str, problem: str) -> str:
    return (
        f"--output-spaces {space}: {problem}, and nothing is downloaded during a run. Fetch the "
        'template once, where there is a network: python -c "from templateflow.api import get; '
        f"get('{space}', resolution=1, desc=None, suffix='T1w'); "
        f"get('{space}', resolution=1, desc='brain', suffix='mask')\". If it is in another "
        "folder, set TEMPLATEFLOW_HOME to it."
    )
