# SPDX-License-Identifier: Apache-2.0
"""Registration of the brain to the template, if the structures yield no affine to MNI305.

The node calls ``find_affine``. It uses the structures first. If they fail or are too far from
their expected positions, the brain is registered affinely (antspyx, mutual information) to
TemplateFlow's MNI305, if that is on this machine. The result is judged by the same structures and
the same rules before it is used. Nothing is downloaded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.affine import (
    UNUSUAL_RESIDUAL_MM,
    AffineFit,
    fit_affine,
    judge_affine,
)
from brainprior_bids.anatomy.templates import is_fetched, templateflow_home
from brainprior_bids.engine.errors import AnatomyError
from brainprior_bids.records import AffineMethod

if TYPE_CHECKING:  # antspyx takes seconds to import and is needed only if the structures fail
    import ants

Matrix = NDArray[np.float64]

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
"""RAS to LPS and back."""
TEMPLATE = "tpl-MNI305/tpl-MNI305_T1w.nii.gz"
TEMPLATE_MASK = "tpl-MNI305/tpl-MNI305_desc-brain_mask.nii.gz"
WORK_MM = 3.0
SEED = "1"


def template_folder() -> Path | None:
    """TemplateFlow's folder if it holds MNI305 with its brain mask, else None; no network."""
    folder = templateflow_home()
    return folder if all(is_fetched(folder / n) for n in (TEMPLATE, TEMPLATE_MASK)) else None


def find_affine(
    table: Sequence[Mapping[str, Any]],
    surface: tuple[Matrix, NDArray[np.bool_]] | None,
    *,
    image: nib.Nifti1Image,
    mask: nib.Nifti1Image,
    templates: Path | None,
) -> AffineFit:
    """Scanner to MNI305: from structures, or by the template if they fail.

    Parameters
    ----------
    table : sequence of mappings
        As ``Parcellation.table``.
    surface : (points, cut), optional
        From ``hull.surface``.
    image, mask : Nifti1Image
        The scan and its brain mask, any grids.
    templates : Path or None
        ``template_folder()``.

    Raises
    ------
    AnatomyError
        If neither way yields a plausible transform; the message has both reasons.
    """
    fit: AffineFit | None = None
    try:
        fit = fit_affine(table, surface=surface)
        if fit.median_residual_mm <= UNUSUAL_RESIDUAL_MM:
            return fit
        problem = (
            f"the structures are {fit.median_residual_mm:.1f} mm from their expected positions"
        )
    except AnatomyError as error:
        problem = str(error)
    why = None
    if templates is None:
        why = (
            "MNI305 is not in TemplateFlow's folder on this machine, so the scan could not be "
            "registered to it instead (fetch it with templateflow.api.get('MNI305'))"
        )
    elif find_spec("ants") is None:
        why = (
            "antspyx is not installed, so the scan could not be registered to MNI305 instead "
            "(install antspyx)"
        )
    if why is not None:
        if fit is None:
            raise AnatomyError(f"{problem} And {why}.")
        return replace(fit, warnings=[*fit.warnings, f"The affine is unreliable, and {why}."])
    matrix = register_to_template(image, mask, templates, start=fit.matrix if fit else None)
    try:
        rescued = judge_affine(matrix, table, surface=surface)
    except AnatomyError as error:
        if fit is None:
            raise AnatomyError(
                f"{problem} Registration to the template failed too: {error}"
            ) from (error)
        return replace(
            fit,
            warnings=[*fit.warnings, f"Registration to the template was no better: {error}"],
        )
    if fit is not None and rescued.median_residual_mm >= fit.median_residual_mm:
        return replace(
            fit, warnings=[*fit.warnings, "Registration to the template was no better."]
        )
    return replace(
        rescued,
        method=AffineMethod.TEMPLATE,
        warnings=[
            "The structures yielded no affine to MNI305; the brain was registered to the template "
            f"instead (antspyx). The reason: {problem}",
            *rescued.warnings,
        ],
    )


def register_to_template(
    image: nib.Nifti1Image, mask: nib.Nifti1Image, templates: Path, *, start: Matrix | None
) -> Matrix:
    """(4, 4) scanner RAS mm to MNI305 RAS mm: rigid, then affine, mutual information, at 3 mm."""
    import ants

    target = nib.load(templates / TEMPLATE)
    brain = np.asarray(nib.load(templates / TEMPLATE_MASK).dataobj) > 0
    fixed = to_ants(np.where(brain, target.get_fdata(dtype=np.float32), 0), target.affine)
    index = np.linalg.inv(mask.affine) @ image.affine
    inside = ndimage.affine_transform(
        np.asarray(mask.dataobj, np.float32),
        index[:3, :3],
        index[:3, 3],
        image.shape,
        order=1,
    )
    moving = to_ants(image.get_fdata(dtype=np.float32) * (inside > 0.5), image.affine)
    small = ants.resample_image(fixed, (WORK_MM,) * 3)
    with tempfile.TemporaryDirectory() as folder, fixed_seed():
        return transform_matrix(register_affine(small, moving, start=start, folder=Path(folder)))


def register_affine(
    fixed: ants.ANTsImage, moving: ants.ANTsImage, *, start: Matrix | None, folder: Path
) -> str:
    """Path of an ants affine file in ``folder``: affine registration by mutual information.

    Parameters
    ----------
    fixed, moving : ants image
        Images of brains, 0 outside.
    start : (4, 4) array, optional
        Moving RAS mm to fixed RAS mm, from which it starts; default: the centres of mass.
    """
    import ants

    options: dict[str, Any] = {}
    if start is not None:
        write_transform(folder / "start.mat", start)
        options["initial_transform"] = str(folder / "start.mat")
    result = ants.registration(
        fixed=fixed,
        moving=moving,
        type_of_transform="Affine",
        aff_iterations=(200, 100, 50),
        aff_shrink_factors=(4, 2, 1),
        aff_smoothing_sigmas=(2, 1, 0),
        aff_random_sampling_rate=0.5,
        outprefix=f"{folder}/",
        **options,
    )
    return str(result["fwdtransforms"][0])


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Fix the seed of ANTs, which draws the voxels for mutual information at random."""
    before = os.environ.get("ANTS_RANDOM_SEED")
    os.environ["ANTS_RANDOM_SEED"] = SEED
    try:
        yield
    finally:
        if before is None:
            del os.environ["ANTS_RANDOM_SEED"]
        else:
            os.environ["ANTS_RANDOM_SEED"] = before


def to_ants(data: NDArray[np.floating], affine: NDArray[np.float64]) -> ants.ANTsImage:
    """An ants image of an array with a RAS affine."""
    import ants

    lps = FLIP @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return ants.from_numpy(
        np.ascontiguousarray(data, np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )


def transform_matrix(path: str) -> Matrix:
    """(4, 4) moving RAS mm to fixed RAS mm of an ants affine file (which maps fixed to moving)."""
    import ants

    transform = ants.read_transform(path)
    numbers = np.array(transform.parameters)
    centre = np.array(transform.fixed_parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = numbers[:9].reshape(3, 3)
    matrix[:3, 3] = numbers[9:] + centre - matrix[:3, :3] @ centre
    return np.linalg.inv(FLIP @ matrix @ FLIP)


def write_transform(path: Path, matrix: Matrix) -> None:
    """An ants affine file from (4, 4) moving RAS mm to fixed RAS mm."""
    import ants

    lps = FLIP @ np.linalg.inv(matrix) @ FLIP
    transform = ants.create_ants_transform(
        transform_type="AffineTransform", dimension=3, matrix=lps[:3, :3], translation=lps[:3, 3]
    )
    ants.write_transform(transform, str(path))
