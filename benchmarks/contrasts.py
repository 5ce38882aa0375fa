# SPDX-License-Identifier: Apache-2.0
"""How well a session's contrasts are aligned: distances between landmarks in T1w and T2w.

``python benchmarks/contrasts.py HEADS --subjects 01 02 …``

HEADS is a BIDS data set with a T1w and a T2w per participant. The landmarks are the centroids of
the structures that the embedded network segments in each scan separately, if its confidence is at
least 0.6 and the field of view does not cut them. The T2w is registered to the T1w by
``anatomy.contrasts.align_contrast``, as after a run, but the images are the scans themselves,
interpolated linearly to 1 mm, not the restored ones. Prints, according to the headers and after
the registration, the median distance of the landmarks, which contains the error of each centroid,
and the length of their mean displacement, in which such errors average out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.contrasts import RestoredContrast, align_contrast
from brainprior_bids.anatomy.prepare import prepare
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.weights import load_parcellation

LOWEST_CONFIDENCE, LARGEST_CUT = 0.6, 0.05
Landmarks = dict[str, NDArray[np.float64]]


def contrast(path: Path) -> tuple[RestoredContrast, Landmarks]:
    """A scan with mask and structures on its 1 mm grid, and its landmarks in scanner RAS mm."""
    ready = prepare(path, network=load_parcellation(), unbias=False, align=False)
    grid = ready.grid.one_millimetre()
    values = resample(ready.values, ready.grid, grid, order=1)
    images = (nib.Nifti1Image(data, np.array(grid.affine)) for data in (
        values, ready.brain.mask, ready.brain.structures
    ))  # fmt: skip
    landmarks = {
        row["name"]: np.array(row["centroid_mm"])
        for row in ready.brain.table
        if row["confidence"] >= LOWEST_CONFIDENCE and row["cut_share"] <= LARGEST_CUT
    }
    return RestoredContrast(path.name.partition(".")[0], *images), landmarks


def apart(one: Landmarks, other: Landmarks, matrix: NDArray[np.float64]) -> str:
    """Distances between the landmarks that both have, as text."""
    names = sorted(one.keys() & other.keys())
    moved = np.array([(matrix @ np.append(other[name], 1.0))[:3] for name in names])
    shifts = moved - np.array([one[name] for name in names])
    median = np.median(np.linalg.norm(shifts, axis=1))
    return f"{len(names)} landmarks, {median:.2f}, mean {np.linalg.norm(shifts.mean(0)):.2f} mm"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Landmarks after the contrasts' registration.")
    parser.add_argument("heads", type=Path)
    parser.add_argument("--subjects", nargs="+", required=True)
    args = parser.parse_args()
    for subject in args.subjects:
        folder = args.heads / f"sub-{subject}" / "anat"
        t1w, landmarks_t1w = contrast(folder / f"sub-{subject}_T1w.nii.gz")
        t2w, landmarks_t2w = contrast(folder / f"sub-{subject}_T2w.nii.gz")
        start = time.process_time()
        line = f"sub-{subject}: by the headers {apart(landmarks_t1w, landmarks_t2w, np.eye(4))}"
        try:
            motion = align_contrast(t1w, t2w)
            line += f"; registered {apart(landmarks_t1w, landmarks_t2w, motion.to_reference)}"
            line += f"; {100 * motion.alike:.0f} % alike, {100 * motion.shared:.0f} % shared"
        except InputError as error:
            line += f"; {error}"
        print(f"{line}; {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
