# SPDX-License-Identifier: Apache-2.0
"""Templates of standard spaces in TemplateFlow's folder; nothing is downloaded.

niworkflows checks the name of a space as for fMRIPrep, and TemplateFlow lists its files. Both are
imported only where a space needs a template and TemplateFlow's folder is there: their import lists
the whole folder (some seconds), and would fill an empty one with placeholders.
"""

from __future__ import annotations

import difflib
import os
import zipfile
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.grids import Grid

WITHOUT_TEMPLATE = ("anat", "T1w", "MNI305")
"""Output spaces that need no template, for messages."""
SURFACES = ("fsaverage", "fsnative", "fslr", "onavg")
"""Surface spaces of fMRIPrep, in lower case; a density may follow (``fsaverage5``)."""
FUNCTIONAL = (
    "func", "bold", "boldref", "run", "sbref", "session", "individual", "dwi", "asl", "petref"
)  # fmt: skip
"""Spaces of fMRIPrep and its relatives that only a functional or diffusion image has."""
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
MNI152_CENTRE_MM = (0.0, -22.0, 9.5)
MNI152_BRAIN_ML = 1883.0
"""Centre and volume of the brain mask of MNI152 (nilearn's, 1 mm)."""


def templateflow_home() -> Path:
    """TemplateFlow's folder, which need not exist."""
    home = os.environ.get("TEMPLATEFLOW_HOME")
    return Path(home or user_cache_dir("templateflow")).absolute()


def is_fetched(path: Path) -> bool:
    """Whether a file exists; TemplateFlow's skeleton has empty files in place of missing ones."""
    return path.is_file() and path.stat().st_size > 0


@dataclass(frozen=True)
class Template:
    """A 1 mm T1w template and its brain mask.

    Parameters
    ----------
    space : str
        As in ``space-``: TemplateFlow's name, with ``+3`` for its cohort 3.
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
        name, _, cohort = self.space.partition("+")
        folder = f"tpl-{name}/cohort-{cohort}" if cohort else f"tpl-{name}"
        return f"{SERVER}/{folder}/{self.image.name}"

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

    def from_mni305(self) -> NDArray[np.float64]:
        """(4, 4) start of a registration, MNI305 mm to the template's mm.

        For a template in another frame than MNI152, a shift and one scale that give the brains the
        same centre and volume.
        """
        if self.space.startswith("MNI152"):
            return MNI152_FROM_MNI305
        inside = self.mask_array()
        volume_ml = inside.sum() * np.prod(self.grid.spacing_mm) / 1000
        centre = self.grid.affine @ [*np.argwhere(inside).mean(0), 1.0]
        scale = np.diag([*(np.cbrt(volume_ml / MNI152_BRAIN_ML),) * 3, 1.0])
        scale[:3, 3] = centre[:3] - scale[:3, :3] @ MNI152_CENTRE_MM
        return scale @ MNI152_FROM_MNI305


def find_template(space: str) -> Template:
    """The template of a space in TemplateFlow's folder.

    Parameters
    ----------
    space : str
        TemplateFlow's name, with ``+3`` for its cohort 3.

    Raises
    ------
    UsageError
        If there is no such template, or if its files are missing or unreadable; the message says
        how to fetch them.
    """
    folder = templateflow_home()
    _refuse_unknown(space, folder)
    try:
        empty = not folder.is_dir() or not any(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"--output-spaces {as_asked(space)}: TemplateFlow's folder {folder} cannot be read "
            f"({error.strerror}). Check its permissions, or set TEMPLATEFLOW_HOME."
        ) from error
    if empty:
        raise UsageError(_not_there(space, f"TemplateFlow's folder {folder} is missing or empty"))
    template = Template(space, *_listed(space, folder))
    for path in (template.image, template.mask):
        if not is_fetched(path):
            problem = "is an empty placeholder" if path.is_file() else "is missing"
            raise UsageError(_not_there(space, f"{path} {problem}", found=path))
        try:
            image = nib.load(path)
            same = image.shape == template.grid.shape and np.allclose(
                image.affine, template.grid.affine, atol=1e-3
            )
        except Exception as error:  # any error of nibabel for a broken file
            problem = f"{path} cannot be read ({error})"
            raise UsageError(_not_there(space, problem, found=path)) from error
        if len(image.shape) != 3 or not same:
            problem = f"{path} has another grid than {template.image.name}"
            raise UsageError(_not_there(space, problem, found=path))
    return template


def as_asked(space: str) -> str:
    """A space as the command line and fMRIPrep write it."""
    return space.replace("+", ":cohort-")


@cache
def templateflow_names() -> tuple[str, ...]:
    """The templates with a T1w image and a brain mask that TemplateFlow offers.

    The list is in TemplateFlow's package. It is read without a network and without an import, so
    that nothing is written to TemplateFlow's folder. Empty if the package has no such list.
    """
    package = find_spec("templateflow")
    places = package.submodule_search_locations if package else None
    try:
        with zipfile.ZipFile(Path((places or [""])[0]) / "conf" / "templateflow-skel.zip") as file:
            names = file.namelist()
    except (OSError, zipfile.BadZipFile):
        return ()
    ends = ("_T1w.nii.gz", "desc-brain_mask.nii.gz")
    having = [{_template_of(name) for name in names if name.endswith(end)} for end in ends]
    return tuple(
        name
        for name in sorted(having[0] & having[1])
        if name not in WITHOUT_TEMPLATE and not name.startswith(SURFACES)
    )


def _template_of(path: str) -> str:
    """``MNI152Lin`` of ``tpl-MNI152Lin/tpl-MNI152Lin_res-01_T1w.nii.gz``."""
    return path.partition("/")[0].removeprefix("tpl-")


def is_surface(name: str) -> bool:
    """Whether a space of fMRIPrep is a surface."""
    return name.lower().startswith(SURFACES)


def _refuse_unknown(space: str, folder: Path) -> None:
    """Refuse surfaces, functional spaces, and names that no template has.

    A template that is in TemplateFlow's folder is accepted, whether or not TemplateFlow lists it.
    """
    name = space.partition("+")[0]
    start = f"--output-spaces {as_asked(space)}"
    if is_surface(name):
        raise UsageError(
            f"{start} is a surface. brainprior makes no surfaces; leave it out, and run fMRIPrep "
            "or FreeSurfer on the result."
        )
    if name.lower() in FUNCTIONAL:
        raise UsageError(
            f"{start} is the space of a functional or diffusion image. brainprior processes "
            "anatomical images only; leave it out."
        )
    names = templateflow_names()
    if not names or name in names or (folder / f"tpl-{name}").is_dir():
        return
    known = {other.lower(): other for other in (*WITHOUT_TEMPLATE, *names)}
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.7)
    hint = (
        f"Did you mean {' or '.join(known[other] for other in near)}?"
        if near
        else f"Expected {', '.join(WITHOUT_TEMPLATE)}, or one of {', '.join(names)}."
    )
    raise UsageError(
        f"{start}: TemplateFlow has no template of that name with a T1w and a brain mask. {hint}"
    )


@cache
def _listed(space: str, folder: Path) -> tuple[Path, Path]:
    """The paths of image and brain mask: those of the first resolution, or the only ones."""
    client = _client(folder)
    _check_name(space, client, folder)
    name, _, cohort = space.partition("+")
    paths = []
    for desc, suffix, what in ((None, "T1w", "T1w image"), ("brain", "mask", "brain mask")):
        query = {"desc": desc, "suffix": suffix, "cohort": cohort or None, "atlas": None}
        found = [
            path
            for resolution in (1, None)
            for path in client.ls(name, resolution=resolution, extension=".nii.gz", **query)
        ]
        if not found:
            raise UsageError(
                _not_there(space, f"{folder} lists no 1 mm {what} of it")
                + " If TemplateFlow has none, leave the space out."
            )
        paths.append(Path(found[0]))
    return paths[0], paths[1]


def _client(folder: Path) -> Any:
    """TemplateFlow's client of a folder: its own, which has listed the folder, if it is that."""
    os.environ["TEMPLATEFLOW_HOME"] = str(folder)  # read at the import; "" would be "."
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        import niworkflows.utils.spaces  # noqa: F401 and matplotlib
        from templateflow import TemplateFlowClient, api, conf
    except OSError as error:  # no folder can be written, not even a temporary one
        raise UsageError(
            f"TemplateFlow's folder {folder} could not be listed ({error}). Set TMPDIR to a "
            "folder that can be written."
        ) from error
    return api if folder == conf.TF_HOME else TemplateFlowClient(folder, autoupdate=False)


def _check_name(space: str, client: Any, folder: Path) -> None:
    """Refuse what is no 3-D template, or not one of its cohorts."""
    from niworkflows.utils.spaces import Reference

    asked, templates = as_asked(space), client.templates()
    if space.partition("+")[0] not in templates:
        raise UsageError(
            _not_there(space, f"{folder} has only {', '.join(templates) or 'no template'}")
            + " Other spaces are anat, T1w and MNI305."
        )
    try:
        (reference,) = Reference.from_string(asked)
    except ValueError as error:
        raise UsageError(f"--output-spaces {asked}: {' '.join(str(error).split())}") from error
    if reference.dim != 3:
        raise UsageError(
            f"--output-spaces {asked} is a surface. brainprior makes no surfaces; leave it out, "
            "and run fMRIPrep or FreeSurfer on the result."
        )


def _not_there(space: str, problem: str, *, found: Path | None = None) -> str:
    """``found``: one of the files as TemplateFlow lists it."""
    name, _, cohort = space.partition("+")
    which = f"'{name}', cohort='{cohort}'" if cohort else f"'{name}'"
    resolution = 1 if found is None or "_res-" in found.name else None
    return (
        f"--output-spaces {as_asked(space)}: {problem}, and nothing is downloaded during a run. "
        'Fetch the template once, where there is a network: python -c "from templateflow.api '
        f"import get; get({which}, resolution={resolution}, desc=None, suffix='T1w'); "
        f"get({which}, resolution={resolution}, desc='brain', suffix='mask')\". If it is in "
        "another folder, set TEMPLATEFLOW_HOME to it."
    )
