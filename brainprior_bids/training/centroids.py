# SPDX-License-Identifier: Apache-2.0
"""Derive the centroids of structures in MNI305: ``python -m brainprior_bids.training.centroids``.

A T1w-like head (published mean intensities, no randomness) is made from every label map and
registered at 4 mm to the average of 305 heads by an affine (antspyx, mutual information): first a
few as whole heads; then all, starting from the fit of their centroids to the median centroids so
far, inside a region around the brain (the average of the mapped masks). Every map's centroids are
mapped too, and averaged over the maps and both sides: left and right become exact mirror images
about x = 0, the template's own symmetry plane. The extent of every map's brain mask, in directions
spread over the sphere, is averaged in the same way (anatomy/hull.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ants
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.affine import fit_affine
from brainprior_bids.anatomy.hull import directions, supports, surface
from brainprior_bids.anatomy.parcellation import mirrored, structure_names
from brainprior_bids.anatomy.rescue import to_ants, transform_matrix, write_transform
from brainprior_bids.engine.grids import Grid
from brainprior_bids.training.synthesis import (
    CSF,
    MERGED_INTO,
    brain_mask,
    load_labels,
    mean_t1_head,
)

COARSE = np.diag([2.0, 2.0, 2.0, 1.0])
"""Every second voxel: the registrations run at 4 mm, blurred like the template."""


def label_table(labels: NDArray[np.integer], affine: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The true structures of a label map, as ``Parcellation.table`` with confidence 1."""
    merging = np.arange(int(labels.max()) + 1)
    for value, target in MERGED_INTO.items():
        if value < len(merging):
            merging[value] = target
    indices = np.nonzero((labels > 0) & (labels < 500))
    structures = merging[labels[indices]]
    counts = np.bincount(structures)
    moments = [np.bincount(structures, index) for index in indices]
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    table = []
    for index, name in structure_names().items():
        if index != CSF and index < len(counts) and counts[index]:
            centre = [m[index] / counts[index] for m in moments]
            table.append(
                {
                    "index": index,
                    "name": name,
                    "volume_mm3": float(counts[index]) * voxel_mm3,
                    "confidence": 1.0,
                    "centroid_mm": (affine[:3, :3] @ centre + affine[:3, 3]).tolist(),
                }
            )
    return table


def register(
    fixed: ants.ANTsImage, moving: ants.ANTsImage, *, seed: int = 1, **options: Any
) -> NDArray[np.float64]:
    """(4, 4) moving RAS mm to fixed RAS mm, affine, mutual information."""
    result = ants.registration(
        fixed=fixed,
        moving=moving,
        type_of_transform="Affine",
        aff_iterations=(80, 40),
        aff_shrink_factors=(2, 1),
        aff_smoothing_sigmas=(1, 0),
        aff_random_sampling_rate=0.5,
        random_seed=seed,
        **options,
    )
    return transform_matrix(result["fwdtransforms"][0])


def mapped_mask(
    mask: NDArray[np.bool_],
    affine: NDArray[np.float64],
    matrix: NDArray[np.float64],
    template: nib.Nifti1Image,
) -> NDArray[np.float64]:
    """(i, j, k) a mask resampled linearly to the template's voxels, 0 to 1."""
    back = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ template.affine
    mapped: NDArray[np.float64] = ndimage.affine_transform(
        mask.astype(float), back[:3, :3], back[:3, 3], template.shape, order=1
    )
    return mapped


def _place(table: list[dict[str, Any]], matrix: NDArray[np.float64]) -> list[float]:
    """Mapped position of the left thalamus, for the log."""
    row = next(row for row in table if row["name"] == "Left-Thalamus")
    position: list[float] = np.round((matrix @ [*row["centroid_mm"], 1.0])[:3], 1).tolist()
    return position


def average(
    tables: list[list[dict[str, Any]]],
    matrices: list[Any],
    *,
    centre: Callable[..., Any] = np.mean,
) -> dict[str, Any]:
    """Name -> index, centroid, SD over maps (mm) and mean volume, symmetrised about x = 0."""
    names = structure_names()
    points_of: dict[int, list[tuple[NDArray[np.float64], float]]] = {index: [] for index in names}
    for table, matrix in zip(tables, matrices, strict=True):
        for row in table:
            point = (matrix @ [*row["centroid_mm"], 1.0])[:3]
            points_of[row["index"]].append((point, row["volume_mm3"]))
            points_of[mirrored(row["index"])].append((point * [-1, 1, 1], row["volume_mm3"]))
    structures = {}
    for index, entries in points_of.items():
        if not entries:
            continue
        points = np.array([point for point, _ in entries])
        structures[names[index]] = {
            "index": index,
            "centroid_mm": centre(points, axis=0).round(3).tolist(),
            "sd_mm": points.std(0, ddof=1).round(3).tolist(),
            "volume_mm3": round(float(np.mean([volume for _, volume in entries])), 1),
        }
    return structures


def average_hull(surfaces: list[Any], matrices: list[Any]) -> dict[str, Any]:
    """Directions, and the mean extent of the mapped surfaces in each, symmetrised."""
    towards = directions()
    heights = np.array(
        [
            supports(points, m, towards)[0]
            for (points, _), m in zip(surfaces, matrices, strict=True)
        ]
    )
    mirrored_heights = np.roll(heights, len(towards) // 2, axis=1)  # left's partner is right
    both = np.concatenate([heights, mirrored_heights])
    return {
        "directions": towards.round(6).tolist(),
        "height_mm": both.mean(0).round(3).tolist(),
        "sd_mm": both.std(0, ddof=1).round(3).tolist(),
    }


def corner_error(
    estimate: NDArray[np.float64], true: NDArray[np.float64], table: list[dict[str, Any]]
) -> float:
    """Mean distance in MNI305 of the eight corners of the brain's box, mm."""
    centre = np.mean([row["centroid_mm"] for row in table], axis=0)
    corners = centre + (np.array(list(np.ndindex(2, 2, 2))) * 2 - 1) * [65.0, 80.0, 60.0]
    points = np.c_[corners, np.ones(8)]
    return float(np.linalg.norm((points @ (estimate - true).T)[:, :3], axis=1).mean())


def main() -> None:
    """Register, average, report the leave-one-out error, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, help="folder of training_seg_NN.nii.gz")
    parser.add_argument("template", type=Path, help="avg305T1.nii")
    parser.add_argument("output", type=Path, help="JSON to write")
    parser.add_argument("--maps", type=int, nargs="+", default=list(range(1, 15)))
    parser.add_argument("--held-out", type=int, nargs="+", default=[15, 16, 17])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 7, 8, 9, 10])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    template = nib.as_closest_canonical(nib.load(args.template))
    target = template.get_fdata()
    smooth = ndimage.gaussian_filter(target / target.max() * 100, 0.8)
    fixed = to_ants(smooth[::2, ::2, ::2], template.affine @ COARSE)
    numbers = [*args.maps, *args.held_out]
    n = len(args.maps)
    heads, tables, matrices, masks, surfaces = [], [], [], [], []
    for number in numbers:
        labels, affine = load_labels(args.labels / f"training_seg_{number:02d}.nii.gz")
        coarse, coarse_affine = labels[::2, ::2, ::2], affine @ COARSE
        mask = brain_mask(coarse, radius=3.5)
        head = mean_t1_head(coarse)
        head[:, :, : max(int(np.nonzero(mask)[2].min()) - 3, 0)] = 0  # the template has no neck
        head = ndimage.gaussian_filter(head, 1.25)[::2, ::2, ::2]
        heads.append(to_ants(head, coarse_affine @ COARSE))
        masks.append((mask, coarse_affine))
        surfaces.append(surface(mask, Grid(mask.shape, coarse_affine)))
        tables.append(label_table(labels, affine))
        if number in args.seeds:
            matrices.append(register(fixed, heads[-1]))
            print(f"map {number}: {_place(tables[-1], matrices[-1])}", flush=True)
    seeds = [tables[numbers.index(number)] for number in numbers if number in args.seeds]
    shape = {"structures": average(seeds, matrices, centre=np.median)}
    initial = Path(f"{args.output}.start.mat")
    for _ in range(args.rounds):
        starts = [fit_affine(table, shape).matrix for table in tables]
        mapped = [
            mapped_mask(*mask, start, template)
            for mask, start in zip(masks[:n], starts[:n], strict=True)
        ]
        region = ndimage.binary_dilation(np.mean(mapped, axis=0) > 0.5, iterations=3)
        fixed_mask = to_ants(region[::2, ::2, ::2].astype(float), template.affine @ COARSE)
        matrices = []
        for number, moving, start, table in zip(numbers, heads, starts, tables, strict=True):
            write_transform(initial, start)
            matrices.append(
                register(fixed, moving, initial_transform=str(initial), mask=fixed_mask)
            )
            print(
                f"map {number}: {_place(table, start)} -> {_place(table, matrices[-1])}",
                flush=True,
            )
        shape = {"structures": average(tables[:n], matrices[:n], centre=np.median)}
        np.save(args.output.with_suffix(".npy"), np.array(matrices))
    initial.unlink()
    structures = average(tables[:n], matrices[:n])
    errors, residuals = [], []
    for i in range(len(numbers)):
        keep = [j for j in range(n) if j != i]
        others = {
            "structures": average([tables[j] for j in keep], [matrices[j] for j in keep]),
            "hull": average_hull([surfaces[j] for j in keep], [matrices[j] for j in keep]),
        }
        fit = fit_affine(tables[i], others, surface=surfaces[i])
        errors.append(corner_error(fit.matrix, matrices[i], tables[i]))
        residuals.append(fit.median_residual_mm)
        print(f"map {numbers[i]}: corner error {errors[-1]:.2f} mm, residual {residuals[-1]:.2f}")
    facts = {
        "space": "MNI305 (RAS, mm)",
        "method": " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "sources": "14 label maps of SynthSeg (Apache-2.0); avg305T1 of SPM12 as target",
        "n": n,
        "leave_one_out": {
            "median_corner_error_mm": round(float(np.median(errors[:n])), 2),
            "largest_corner_error_mm": round(float(np.max(errors[:n])), 2),
            "median_residual_mm": round(float(np.median(residuals[:n])), 2),
            "held_out_corner_errors_mm": np.round(errors[n:], 2).tolist(),
        },
        "structures": structures,
        "hull": average_hull(surfaces[:n], matrices[:n]),
    }
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts["leave_one_out"]), "held out:", np.round(errors[n:], 2).tolist())


if __name__ == "__main__":
    main()
