# SPDX-License-Identifier: Apache-2.0
"""Masks and labels from other sources: other programs, derivatives, the scan's own edge.

From any source, a mask becomes one piece without holes on the restored grid, and labels become the
structures of ``data/structures.tsv``; both are checked before they are used.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.nifti import open_image, read_values
from brainprior_bids.anatomy.padding import beyond, unmeasured
from brainprior_bids.anatomy.parcellation import (
    CSF,
    LARGEST_ML,
    SCATTERED,
    SMALLEST_PART_ML,
    Parcellation,
    fill_holes,
    largest_component,
    structure_names,
    structures_table,
)
from brainprior_bids.anatomy.separable import resample_separable
from brainprior_bids.anatomy.spaces import check_placed, resample
from brainprior_bids.engine.errors import AnatomyError, InputError
from brainprior_bids.engine.grids import Grid

Mask = NDArray[np.bool_]

SMALL_PARTS = {25: 2, 57: 41, 77: 0, 30: 12, 62: 51, 31: 4, 63: 43, 72: 14}
"""FreeSurfer's lesions, vessels, plexus, fifth ventricle -> the structure they are counted with.
0: the white matter of the nearer side, as the parts of the corpus callosum."""
NEARER_SIDE = (77, 78, 79, 251, 252, 253, 254, 255)
AGREEMENT = 0.85
"""Dice with the network's own mask below which a supplied mask causes a warning."""
FEWEST_STRUCTURES = 4


def assemble(
    structures: NDArray[np.integer],
    mask: Mask,
    confidence: Mapping[int, float],
    *,
    image: nib.Nifti1Image,
    restored_grid: Grid,
    warnings: Sequence[str] = (),
) -> Parcellation:
    """A parcellation from labels and a mask on the restored grid.

    Parameters
    ----------
    structures : (I, J, K) integer array
        Values of ``data/structures.tsv``; removed outside ``mask``; fluid (24) where the mask has
        no label.
    mask : (I, J, K) bool array
        Where the image was padded with one value, it is cut off (``padding.unmeasured``).
    confidence : mapping
        Value -> confidence, for the table; 1 where absent.
    image : Nifti1Image
        (i, j, k) conformed scan.

    Raises
    ------
    AnatomyError
        If fewer than four compact structures are left.
    """
    empty = unmeasured(image, mask)
    mask = mask & ~empty
    labels = np.where(mask, structures, 0).astype(np.int16)
    labels[mask & (labels == 0)] = CSF
    sure = np.ones(max(structure_names()) + 1, np.float32)
    for value, share in confidence.items():
        sure[value] = share
    outside = beyond(empty, mask, restored_grid.spacing_mm)
    table = structures_table(labels, sure[labels], restored_grid, restored_grid, beyond=outside)
    compact = [row["name"] for row in table if row["index"] not in SCATTERED]
    if len(compact) < FEWEST_STRUCTURES:
        raise AnatomyError(
            f"Expected at least {FEWEST_STRUCTURES} inner structures inside the mask, got "
            f"{compact}. Do mask and labels belong to this scan, and are the labels FreeSurfer's?"
        )
    mask_scan = resample_separable(torch.from_numpy(mask).float(), image.shape).numpy()
    return Parcellation(labels, mask.astype(np.uint8), mask_scan, table, list(warnings))


def checked_mask(
    mask: Mask, grid: Grid, *, source: str, network_mask: Mask | None = None
) -> tuple[Mask, list[str]]:
    """A mask in one piece, without holes, with a plausible volume; warnings about corrections.

    Raises
    ------
    AnatomyError
        If the volume is not plausible.
    """
    warnings = []
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    piece = largest_component(mask)
    lost = float((mask.sum() - piece.sum()) * voxel_ml)
    if lost > 1:
        warnings.append(f"The mask of {source} had separate parts of {lost:.0f} ml; removed.")
    filled = fill_holes(piece)
    holes = float((filled.sum() - piece.sum()) * voxel_ml)
    if holes > 1:
        warnings.append(f"The mask of {source} had holes of {holes:.0f} ml; filled.")
    volume = float(filled.sum() * voxel_ml)
    if not SMALLEST_PART_ML <= volume <= LARGEST_ML:
        raise AnatomyError(
            f"The mask of {source} has {volume:.0f} ml, expected {SMALLEST_PART_ML:.0f} to "
            f"{LARGEST_ML:.0f}. Is it a brain mask, and of this scan?"
        )
    if network_mask is not None:
        overlap = dice(filled, network_mask)
        if overlap < AGREEMENT:
            warnings.append(
                f"The mask of {source} and that of the embedded network disagree (Dice "
                f"{overlap:.2f}): look at the mask."
            )
    return filled, warnings


def dice(one: Mask, other: Mask) -> float:
    """Overlap of two masks of one shape: 1 if equal, 0 if disjoint."""
    return 2 * float((one & other).sum()) / max(float(one.sum() + other.sum()), 1.0)


def own_edge(image: nib.Nifti1Image) -> tuple[Mask, float]:
    """The foreground of a scan that may be skull-stripped. Background has the value on the faces
    of the field of view, up to a hundredth of the bright end (interpolation rings).

    Returns
    -------
    support : (i, j, k) bool array
        One piece, holes filled.
    empty : float
        Share of the other voxels that are exactly background: near 1 for a stripped scan, near 0
        if there is air with noise.
    """
    data = image.get_fdata(dtype=np.float32)
    faces = np.concatenate([data.take(i, a).ravel() for a in range(3) for i in (0, -1)])
    background = float(np.median(faces))
    bright = float(np.percentile(data, 99.5)) - background
    away = np.abs(data - background)
    support = fill_holes(largest_component(away > 0.01 * max(bright, 1e-12)))
    outside = ~support
    empty = float((away[outside] <= 1e-6 * max(bright, 1e-12)).mean()) if outside.any() else 0.0
    return support, empty


def stripped_edge(image: nib.Nifti1Image, mask_scan: NDArray[np.float32]) -> Mask | None:
    """The scan's own edge if it is already skull-stripped, else None.

    A scan counts as stripped if its background is exactly empty and nearly all of its foreground
    lies within 5 mm of the network's brain.
    """
    support, empty = own_edge(image)
    brain = mask_scan > 0.5
    if empty < 0.9 or not brain.any():
        return None
    spacing = Grid(image.shape, image.affine).spacing_mm
    distance = ndimage.distance_transform_edt(~brain, sampling=tuple(spacing))
    beyond = float((support & (distance > 5)).sum()) / float(brain.sum())
    covered = float((support & brain).sum()) / float(brain.sum())
    return support if beyond < 0.03 and covered > 0.85 else None


def mask_from_file(path: Path, grid: Grid, *, name: str) -> Mask:
    """A mask image (not 0 inside) of any grid in the scan's space, on ``grid``.

    Raises
    ------
    InputError
        If it cannot be read, is not a 3-D mask, or is outside of the scan.
    GeometryError
        If its header does not state its position.
    """
    values, source = _read(path, name)
    inside = values > 0.5 * float(values.max())
    moved: Mask = resample(inside.astype(np.float32), source, grid, order=1) >= 0.5
    total_mm3 = float(inside.sum() * np.prod(source.spacing_mm))
    inside_mm3 = float(moved.sum() * np.prod(grid.spacing_mm))
    if inside_mm3 < 0.5 * total_mm3:
        raise InputError(
            f"{name}: only {100 * inside_mm3 / max(total_mm3, 1e-9):.0f} % of the mask "
            f"{path.name} is in the scan's field of view. Was it drawn in this scan's space?"
        )
    return moved


def labels_from_file(path: Path, grid: Grid, *, name: str) -> NDArray[np.int16]:
    """A label image with FreeSurfer's values (aseg, aparc+aseg, SynthSeg), on ``grid``.

    Raises
    ------
    InputError
        If it cannot be read or has hardly any of FreeSurfer's inner structures.
    GeometryError
        If its header does not state its position.
    """
    values, source = _read(path, name)
    labels = values.round().astype(np.int32)
    for value, target in SMALL_PARTS.items():
        if target:
            labels[labels == value] = target
    for low, target in ((1000, 3), (2000, 42), (3000, 2), (4000, 41)):
        labels[(labels > low) & (labels < low + 1000)] = target
    middle = np.isin(labels, NEARER_SIDE)
    if middle.any():
        sided = np.isin(labels, (2, 41))
        if sided.any():
            _, nearest = ndimage.distance_transform_edt(~sided, return_indices=True)
            labels[middle] = labels[tuple(index[middle] for index in nearest)]
    labels[~np.isin(labels, list(structure_names()))] = 0
    inner = set(np.unique(labels).tolist()) - {0, *SCATTERED}
    if len(inner) < FEWEST_STRUCTURES:
        raise InputError(
            f"{name}: {path.name} has {len(inner)} of FreeSurfer's inner structures, expected at "
            f"least {FEWEST_STRUCTURES}. Give an aseg, an aparc+aseg or SynthSeg's output; a map "
            "of grey matter, white matter and fluid is not enough."
        )
    moved = resample(labels.astype(np.float32), source, grid, order=0)
    return moved.astype(np.int16)


def _read(path: Path, name: str) -> tuple[NDArray[np.float32], Grid]:
    image = nib.squeeze_image(open_image(path, name))
    values = np.asarray(read_values(image, path, name), np.float32)
    if values.ndim != 3 or not np.isfinite(values).all() or not values.any():
        raise InputError(f"{name}: expected a 3-D image that is not empty in {path}.")
    check_placed(image, f"{name}: {path.name}")
    return values, Grid(values.shape, image.affine)


def synthseg_command(image: Path, labels: Path, *, threads: int, cuda: bool) -> list[str]:
    """SynthSeg of FreeSurfer, version 7.3 or later."""
    command = ["mri_synthseg", "--i", str(image), "--o", str(labels), "--threads", str(threads)]
    return command if cuda else [*command, "--cpu"]


def synthstrip_command(
    image: Path, mask: Path, *, model: Path | None, threads: int, cuda: bool
) -> list[str]:
    """SynthStrip of FreeSurfer, or nipreps-synthstrip if there is a model file.

    Raises
    ------
    InputError
        If neither is installed.
    """
    gpu = ["-g"] if cuda else []
    if model is not None and shutil.which("nipreps-synthstrip"):
        return ["nipreps-synthstrip", "-i", str(image), "-m", str(mask), "--model", str(model),
                "-n", str(threads), *gpu]  # fmt: skip
    if shutil.which("mri_synthstrip"):
        own = ["--model", str(model)] if model is not None else []
        return ["mri_synthstrip", "-i", str(image), "-m", str(mask), *own, *gpu]
    raise InputError(
        "SynthStrip: neither mri_synthstrip (FreeSurfer) nor nipreps-synthstrip with "
        "--synthstrip-model FILE is there. Install one of them, or use --skull-strip embedded."
    )


def run_program(command: Sequence[str], output: Path) -> dict[str, Any]:
    """Run a program that writes ``output``; returns the command, for the provenance.

    Raises
    ------
    AnatomyError
        If it fails or writes no output; the message has its last lines.
    """
    try:
        result = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise AnatomyError(f"{command[0]} cannot be run: {error.strerror}.") from error
    if result.returncode != 0 or not output.exists():
        output_tail = " / ".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise AnatomyError(
            f"{command[0]} ended with {result.returncode} and "
            f"{'an' if output.exists() else 'no'} output; its messages: {output_tail or 'none'}."
        )
    return {"command": list(command), "program": shutil.which(command[0])}
