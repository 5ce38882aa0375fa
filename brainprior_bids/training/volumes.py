# SPDX-License-Identifier: Apache-2.0
"""Volumes of brains and their structures, as measured by the embedded network.

Every brain is labelled like a scan, and the natural logarithms of the volumes are averaged over
the participants. Only measurements by one network are compared, so its bias cancels in a T1w. In a
T2w or FLAIR, for which no such set was measured, it does not cancel fully.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from brainprior_bids.anatomy.conform import conform
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.engine import weights
from brainprior_bids.engine.grids import Grid

BRAIN = "Brain"
"""The whole mask's name among the structures."""


def reference(tables: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Name -> ``n`` participants, mean and SD of the logarithm of the volume in mm3."""
    volumes: dict[str, list[float]] = {}
    for table in tables:
        for row in table:
            volumes.setdefault(row["name"], []).append(row["volume_mm3"])
        volumes.setdefault(BRAIN, []).append(sum(row["volume_mm3"] for row in table))
    return {
        name: {
            "n": len(found),
            "log_mean": round(float(np.log(found).mean()), 4),
            "log_sd": round(float(np.log(found).std(ddof=1)), 4),
        }
        for name, found in volumes.items()
    }


def main() -> None:
    """Label all brains, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON to write")
    parser.add_argument("brains", type=Path, nargs="+", help="NIfTI files")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = weights.FOLDER / "parcellation.safetensors"
    network = weights.load_parcellation(path, device="cpu")
    tables = []
    for brain in args.brains:
        image: nib.Nifti1Image = conform(brain, metadata={}).image
        grid = Grid(image.shape, image.affine).one_millimetre()
        tables.append(parcellate(image, network=network, restored_grid=grid).table)
        print(brain.name, flush=True)
    facts = {
        "method": " ".join((__doc__ or "").split()),
        "source": "54 participants of OpenNeuro ds002748 (CC0), T1w at 3 T, skull-stripped, 1 mm",
        "network_sha256": weights.sha256_file(path),
        "volumes": reference(tables),
    }
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
