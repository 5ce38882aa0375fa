# SPDX-License-Identifier: Apache-2.0
"""From a scan to its brain mask and structures.

The scan is averaged or interpolated to 2 mm along its own axes, the network gives the probability
of every class, and the probabilities are interpolated to the grid of the restored image (same
axes and edges, about 1 mm). No step rotates anything, so left stays left.

The brain mask consists of all structures and the fluid between the gyri: the hull, as from
skull-stripping programs, not the tissue alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from brainprior_bids.anatomy.padding import beyond, touching, unmeasured
from brainprior_bids.anatomy.separable import along, averaging_matrix, resample_separable
from brainprior_bids.engine.denoiser import fast_dtype
from brainprior_bids.engine.errors import AnatomyError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork, normalise_intensity

NETWORK_MM = 2.0
SMALLEST_ML, LARGEST_ML = 400.0, 2500.0
"""Plausible volume of a whole brain with its fluid, neonates excluded."""
SMALLEST_PART_ML = 150.0
"""Smallest volume that counts as a brain if the field of view cuts through it."""
CSF = 24
SCATTERED = (2, 3, 5, 41, 42, 44, CSF)
"""Structures that can consist of several pieces at 2 mm: white matter, cortex, fluid, and the
inferior horns of the ventricles, whose front and back are joined by less than a voxel."""


@dataclass(frozen=True)
class Parcellation:
    """The brain mask and the structures of a scan.

    Attributes
    ----------
    structures : (I, J, K) int16 array
        FreeSurfer values on the restored grid, 0 outside the mask.
    mask : (I, J, K) uint8 array
        Brain with the fluid between the gyri, on the restored grid.
    mask_scan : (i, j, k) float32 array
        Share of every voxel of the scan that lies in the mask, 0-1.
    table : list of dict
        Per structure found: ``index``, ``name``, ``volume_mm3``, ``confidence`` (mean of the
        largest class probability), ``centroid_mm`` (scanner RAS), ``cut_share`` (area on the
        faces of the field of view over volume^(2/3)).
    warnings : list of str
    facts : dict
        JSON-able: the sources of mask and structures, the weights, the fit of the slices
        (``anatomy.brain.find_brain``); empty from ``parcellate``.
    lost : tuple of int
        Slices of the scan that have no signal and are not used.
    """

    structures: NDArray[np.int16]
    mask: NDArray[np.uint8]
    mask_scan: NDArray[np.float32]
    table: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    lost: tuple[int, ...] = ()


@cache
def structure_names() -> dict[int, str]:
    """FreeSurfer value -> name of every structure, from ``data/structures.tsv``."""
    text = (files("brainprior_bids") / "data" / "structures.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    return {int(row[0]): row[1] for row in rows}


def mirrored(value: int) -> int:
    """The structure on the other side; the same one for midline structures."""
    names = structure_names()
    name = names.get(value, "")
    for side, other in (("Left-", "Right-"), ("Right-", "Left-")):
        if name.startswith(side):
            partner = other + name.removeprefix(side)
            return next(index for index, found in names.items() if found == partner)
    return value


@torch.no_grad()
def class_probabilities(
    volume: Tensor, network: ParcellationNetwork, *, mirror: bool = True
) -> Tensor:
    """(i, j, k) at 2 mm, RAS -> (classes, i, j, k) probabilities on the CPU, float32.

    Parameters
    ----------
    mirror : bool
        Average with the result for the left-right mirrored volume, labels exchanged.
    """
    device = next(network.parameters()).device
    size = volume.shape
    pad: list[int] = []
    for n in reversed(size):
        extra = -n % network.multiple
        pad += [extra // 2, extra - extra // 2]
    x = torch.nn.functional.pad(normalise_intensity(volume), pad)[None, None].to(device)
    dtype = fast_dtype(device)
    inner = tuple(slice(pad[4 - 2 * a], pad[4 - 2 * a] + size[a]) for a in range(3))

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = network(x)[0]
        return torch.softmax(logits.float(), dim=0)

    probabilities = run(x)
    if mirror:
        exchange = [network.classes.index(mirrored(value)) for value in network.classes]
        probabilities += run(x.flip(2)).flip(1)[exchange]
        probabilities /= 2
    return probabilities[(slice(None), *inner)].cpu()


def parcellate(
    image: nib.Nifti1Image, *, network: ParcellationNetwork, restored_grid: Grid
) -> Parcellation:
    """Brain mask and structures of one scan.

    Parameters
    ----------
    image : Nifti1Image
        (i, j, k), closest-canonical (RAS) axes, any contrast, with or without scalp.
    network : ParcellationNetwork
        From ``engine.weights.load_parcellation``.
    restored_grid : Grid
        Same axes and edges as the scan, about 1 mm (``Grid.one_millimetre``).

    Raises
    ------
    ShapeMismatchError
        If ``restored_grid`` does not share the scan's axes and edges.
    AnatomyError
        If no plausible brain is found.
    """
    scan_grid = Grid(image.shape, image.affine)
    _check_edges(scan_grid, restored_grid)
    data = torch.from_numpy(np.ascontiguousarray(image.get_fdata(dtype=np.float32)))
    coarse = tuple(max(round(float(e) / NETWORK_MM), 1) for e in scan_grid.extent_mm)
    probabilities = class_probabilities(resample_separable(data, coarse), network)
    coarse_mm = scan_grid.extent_mm / np.array(coarse)
    coarse_mm3 = float(np.prod(coarse_mm))
    names = structure_names()
    channels = {v: c for c, v in enumerate(network.classes) if v in names}
    inside = probabilities[list(channels.values())].sum(0).numpy()
    empty = unmeasured(image, inside)
    inside[empty] = 0
    inside, warnings = _clean_mask(
        inside, coarse_mm3, beyond=beyond(empty, inside > 0.5, coarse_mm)
    )
    matrices = [averaging_matrix(n, m) for m, n in zip(restored_grid.shape, coarse, strict=True)]
    coarse_box, fine_box, matrices = _box(inside, matrices)
    within = inside[coarse_box]
    part = _interpolate(within, matrices) >= 0.5
    labels, best = _structures(
        probabilities[(slice(None), *coarse_box)], channels, within, part, matrices
    )
    mask = np.zeros(restored_grid.shape, np.uint8)
    mask[fine_box] = part
    empty = unmeasured(image, mask)
    mask[empty] = labels[empty[fine_box]] = 0
    structures = np.zeros(restored_grid.shape, np.int16)
    structures[fine_box] = labels
    mask_scan = resample_separable(torch.from_numpy(mask).float(), scan_grid.shape).numpy()
    box_grid = restored_grid.crop(
        (fine_box[0].start, fine_box[1].start, fine_box[2].start),
        (fine_box[0].stop, fine_box[1].stop, fine_box[2].stop),
    )
    outside = beyond(empty, mask > 0, restored_grid.spacing_mm)[fine_box]
    table = structures_table(labels, best, box_grid, restored_grid, beyond=outside)
    compact = [row for row in table if row["index"] not in SCATTERED]
    if len(compact) < 4:
        raise AnatomyError(
            f"parcellate: expected a brain with its inner structures, found only "
            f"{[row['name'] for row in table]}. Check that it is a head, and the "
            "orientation in its header."
        )
    confidence = float(np.mean([row["confidence"] for row in table]))
    if confidence < 0.6:
        warnings.append(
            f"Structures were found with a mean confidence of {confidence:.2f} (usually above "
            "0.7): look at the mask and the structures."
        )
    return Parcellation(structures, mask, mask_scan, table, warnings)


def _check_edges(scan: Grid, restored: Grid) -> None:
    """Both grids must cover the same box along the same axes."""
    corners = [
        (grid.affine @ np.append(np.array(c) * grid.shape - 0.5, 1))[:3]
        for c in np.ndindex(2, 2, 2)
        for grid in (scan, restored)
    ]
    gap = max(
        float(np.linalg.norm(a - b)) for a, b in zip(corners[::2], corners[1::2], strict=True)
    )
    if gap > 0.1:
        raise ShapeMismatchError(
            f"parcellate: the restored grid must have the scan's axes and edges, corners are "
            f"{gap:.1f} mm apart. Make it with scan_grid.one_millimetre()."
        )


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest piece (faces touch) of a mask."""
    components, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = components == np.argmax(sizes)
    return largest


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill everything that is not connected to the outside; faster than scipy's iteration."""
    outside, _ = ndimage.label(~np.pad(mask, 1))
    filled: NDArray[np.bool_] = (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return filled


def _clean_mask(
    inside: NDArray[np.float32], voxel_mm3: float, *, beyond: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], list[str]]:
    """Probability of brain with one component and no holes, and warnings.

    Thin bridges (one voxel of 2 mm) to other tissue do not join a component. The brain is cut
    where the mask touches ``beyond``, as on the faces of the field of view.
    """
    brain = inside > 0.5
    core = largest_component(ndimage.binary_erosion(brain))
    component = largest_component(brain & ndimage.binary_dilation(core, iterations=2))
    filled = fill_holes(component)
    volume = filled.sum() * voxel_mm3 / 1000
    faces = [f for a in range(3) for f in (filled.take(0, a), filled.take(-1, a))]
    inner = [f for a in range(3) for f in touching(filled, beyond, a)]
    face_cm2 = voxel_mm3 ** (2 / 3) / 100
    padded = sum(int(f.sum()) for f in inner) * face_cm2
    cut = sum(int(f.sum()) for f in faces) * face_cm2 + padded
    warnings = []
    partial = cut > 10
    smallest = SMALLEST_PART_ML if partial else SMALLEST_ML
    if not smallest <= volume <= LARGEST_ML:
        raise AnatomyError(
            f"parcellate: expected a brain of {smallest:.0f} to {LARGEST_ML:.0f} ml, found "
            f"{volume:.0f} ml. Check that it is a head scan, its contrast, and the voxel size in "
            "its header."
        )
    if partial:
        warnings.append(
            f"The field of view cuts through the brain ({cut:.0f} cm2 of the mask lie on its "
            f"border{_filled_up(padded)}): only the part inside is restored."
        )
    near = ndimage.binary_dilation(filled)
    cleaned = np.where(near, inside, 0).astype(np.float32)
    cleaned[filled & ~brain] = 1.0
    return cleaned, warnings


def _filled_up(cut_cm2: float) -> str:
    """The part of the warning about a border inside the image."""
    return f", {cut_cm2:.0f} of them where the image was padded with one value" * (cut_cm2 > 1)


Box = tuple[slice, slice, slice]


def _box(
    values: NDArray[np.float32], matrices: Sequence[NDArray[np.float32]]
) -> tuple[Box, Box, list[NDArray[np.float32]]]:
    """The box where ``values`` is not 0, the same box on the fine grid, and the matrices between
    them.
    """
    (found,) = ndimage.find_objects((values > 0).astype(np.int8))
    coarse, fine, cut = [], [], []
    for s, n, matrix in zip(found, values.shape, matrices, strict=True):
        wide = slice(max(s.start - 1, 0), min(s.stop + 1, n))
        rows = np.flatnonzero(matrix[:, wide].any(1))
        out = slice(int(rows[0]), int(rows[-1]) + 1)
        coarse.append(wide)
        fine.append(out)
        cut.append(matrix[out, wide])
    return (coarse[0], coarse[1], coarse[2]), (fine[0], fine[1], fine[2]), cut


def _interpolate(
    values: NDArray[np.float32], matrices: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Apply one matrix per axis."""
    x = torch.from_numpy(np.ascontiguousarray(values))
    for axis, matrix in enumerate(matrices):
        x = along(x, matrix, axis)
    out: NDArray[np.float32] = x.numpy()
    return out


def _structures(
    probabilities: Tensor,
    channels: dict[int, int],
    inside: NDArray[np.float32],
    mask: NDArray[np.bool_],
    matrices: Sequence[NDArray[np.float32]],
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Structure with the largest interpolated probability, and that probability, in the mask.

    All arrays cover the same box, ``mask`` finer. Each compact structure keeps its largest piece
    at 2 mm. Interpolation runs in the box where a structure has any probability.
    """
    winner = probabilities.argmax(0).numpy()
    structures = np.zeros(mask.shape, np.int16)
    best = np.zeros(mask.shape, np.float32)
    support = inside > 0
    for value, channel in channels.items():
        p = probabilities[channel].numpy() * support
        if value not in SCATTERED:
            p = p * ndimage.binary_dilation(largest_component(winner == channel), iterations=2)
        if not (p > 0.01).any():
            continue
        coarse, fine, cut = _box(np.where(p > 0.01, p, 0), matrices)
        finer = _interpolate(p[coarse], cut)
        better = finer > best[fine]
        structures[fine][better] = value
        best[fine][better] = finer[better]
    structures[mask & (structures == 0)] = CSF
    structures[~mask] = 0
    return structures, best


def structures_table(
    structures: NDArray[np.int16],
    best: NDArray[np.float32],
    grid: Grid,
    view: Grid,
    *,
    beyond: NDArray[np.bool_],
) -> list[dict[str, Any]]:
    """Volume, confidence, centroid and cut share of every structure present.

    Parameters
    ----------
    structures, best : (i, j, k) arrays
        Labels and their probabilities, on ``grid``.
    grid, view : Grid
        ``grid`` is ``view``, the whole field of view, or a box of it.
    beyond : (i, j, k) bool array
        Where the brain continues but was not measured (``padding.beyond``), on ``grid``.

    Returns
    -------
    list of dict
        As ``Parcellation.table``.
    """
    names = structure_names()
    indices = np.nonzero(structures)
    labels, size = structures[indices], max(names) + 1
    counts = np.bincount(labels, minlength=size)
    confidence = np.bincount(labels, best[indices], minlength=size)
    moments = [np.bincount(labels, index, minlength=size) for index in indices]
    voxel_mm3 = float(np.prod(grid.spacing_mm))
    cut_mm2 = _cut_mm2(structures, grid, view, beyond, size)
    table = []
    for value, name in names.items():
        if counts[value] == 0:
            continue
        centre = [m[value] / counts[value] for m in moments]
        centroid = (grid.affine @ [*centre, 1.0])[:3]
        table.append(
            {
                "index": value,
                "name": name,
                "volume_mm3": round(float(counts[value]) * voxel_mm3, 1),
                "confidence": round(float(confidence[value] / counts[value]), 4),
                "centroid_mm": [round(float(c), 3) for c in centroid],
                "cut_share": round(
                    float(cut_mm2[value] / (counts[value] * voxel_mm3) ** (2 / 3)), 4
                ),
            }
        )
    return table


def _cut_mm2(
    structures: NDArray[np.int16],
    grid: Grid,
    view: Grid,
    beyond: NDArray[np.bool_],
    size: int,
) -> NDArray[np.float64]:
    """Area of every structure on the border of the measured region, indexed by value."""
    start = np.rint(np.linalg.inv(view.affine) @ grid.affine[:, 3])[:3].astype(int)
    area = np.zeros(size)
    for axis in range(3):
        face_mm2 = float(np.prod(np.delete(grid.spacing_mm, axis)))
        for part in touching(structures, beyond, axis):
            area += np.bincount(part.ravel(), minlength=size)[:size] * face_mm2
        for touches, plane in (
            (start[axis] <= 0, 0),
            (start[axis] + grid.shape[axis] >= view.shape[axis], -1),
        ):
            if touches:
                face = structures.take(plane, axis).ravel()
                area += np.bincount(face, minlength=size)[:size] * face_mm2
    area[0] = 0
    return area
