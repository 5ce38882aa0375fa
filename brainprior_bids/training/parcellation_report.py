# SPDX-License-Identifier: Apache-2.0
"""The values of the parcellation's model card.

``python -m brainprior_bids.training.parcellation_report LABELS OUT.json``.

Whole heads are drawn at 1 mm from the label maps of the test set, undeformed, in three contrasts,
noise SD 0.02 of the bright tissue; the thick-slice ones are means of five 1 mm slices stored as
such. They go through ``parcellate`` as a scan would, and the result is compared with the map
itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from brainprior_bids.anatomy.parcellation import CSF, parcellate, structure_names
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.parcellation_network import ParcellationNetwork
from brainprior_bids.engine.weights import load_parcellation
from brainprior_bids.training.parcellation import prepare_heads
from brainprior_bids.training.synthesis import CLASSES, HeadMap, HeadSettings, HeadSynthesiser

SHAPE = (180, 230, 200)
"""Voxels of 1 mm: the whole head and some neck."""


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Dice overlap of two masks."""
    return float(2 * (a & b).sum() / max(int(a.sum()) + int(b.sum()), 1))


def measure(
    head: HeadMap, contrast: str, slice_mm: int, network: ParcellationNetwork, seed: int
) -> dict[str, Any]:
    """One synthetic scan through ``parcellate``: Dice, centroid distances (mm), seconds."""
    synthesiser = HeadSynthesiser([head], SHAPE, voxel_mm=1.0)
    settings = HeadSettings(contrast, 1.0, deform=False, damage=False, noise_sd=0.02)
    image, target = synthesiser.draw(torch.Generator().manual_seed(seed), settings)
    truth = np.array(CLASSES)[target.numpy()]
    data = image[0].numpy()
    data = data.reshape(*SHAPE[:2], -1, slice_mm).mean(-1)
    affine = np.diag([1.0, 1.0, slice_mm, 1.0])
    affine[2, 3] = (slice_mm - 1) / 2
    scan = nib.Nifti1Image(data, affine)
    started = time.monotonic()
    parcellation = parcellate(
        scan, network=network, restored_grid=Grid(data.shape, affine).one_millimetre()
    )
    seconds = time.monotonic() - started
    table = {row["index"]: row for row in parcellation.table}
    result: dict[str, Any] = {"seconds": seconds, "dice": {}, "centroid_mm": {}}
    inside = np.isin(truth, list(structure_names()))
    result["mask"] = dice(parcellation.mask > 0, inside)
    for index, name in structure_names().items():
        true = truth == index
        if not true.any():
            continue
        result["dice"][name] = dice(parcellation.structures == index, true)
        if index in table and index != CSF:
            centre = np.argwhere(true).mean(0)
            away = np.array(table[index]["centroid_mm"]) - centre
            result["centroid_mm"][name] = float(np.linalg.norm(away))
    return result


def main() -> None:
    """Measure, print tables in Markdown, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, help="folder of training_seg_NN.nii.gz")
    parser.add_argument("output", type=Path, help="JSON to write")
    parser.add_argument("--maps", type=int, nargs="+", default=[18, 19, 20])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = load_parcellation(args.weights)
    heads = prepare_heads(args.labels, args.maps)
    conditions = [(c, mm) for c in ("T1w", "T2w", "FLAIR") for mm in (1, 5)]
    results: dict[str, list[dict[str, Any]]] = {}
    for contrast, mm in conditions:
        key = f"{contrast} {mm} mm"
        results[key] = [
            measure(head, contrast, mm, network, seed) for seed, head in enumerate(heads)
        ]
        means = [np.mean(list(r["dice"].values())) for r in results[key]]
        masks = [r["mask"] for r in results[key]]
        centroids = [np.median(list(r["centroid_mm"].values())) for r in results[key]]
        seconds = [r["seconds"] for r in results[key]]
        print(
            f"| {key} | {np.mean(masks):.3f} ({np.min(masks):.3f}) | {np.mean(means):.3f} | "
            f"{np.mean(centroids):.2f} | {np.mean(seconds):.1f} |",
            flush=True,
        )
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n| structure | " + " | ".join(results) + " |")
    for name in structure_names().values():
        row = [np.mean([r["dice"].get(name, np.nan) for r in runs]) for runs in results.values()]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")


if __name__ == "__main__":
    main()
