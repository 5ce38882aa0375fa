# SPDX-License-Identifier: Apache-2.0
"""``--fuse runs``: which scans are runs of one contrast, and the name of their result.

Scans are fused if their names differ only in ``run-`` and ``acq-``. The result's name has neither:
``sub-01_run-1_T1w`` and ``sub-01_run-2_T1w`` become ``sub-01_desc-restored_T1w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nibabel.affines import voxel_sizes

from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.query import Scan

DROPPED = ("run", "acq")


def fuse_runs(scans: Sequence[Scan]) -> list[Scan]:
    """Combine every group of runs into one scan; other scans are unchanged.

    The order is that of the first scan of each group. A fused scan has its runs, the reference
    first, in ``runs``. The reference is the run with the thinnest slices, the first one if equal;
    path and metadata are those of the reference. The scan has a problem if one of its runs has.
    """
    groups: dict[str, list[Scan]] = {}
    for scan in scans:
        usable = scan.name.stem == scan.path.name.partition(".")[0]
        # a file whose name or folder cannot be used belongs to no group, and fails alone
        key = fused_name(scan.name).stem if usable else scan.name.stem
        groups.setdefault(key, []).append(scan)
    return [_fused(group) if len(group) > 1 else group[0] for group in groups.values()]


def fused_name(name: BIDSName) -> BIDSName:
    """The name without run and acquisition."""
    entities = tuple((key, value) for key, value in name.entities if key not in DROPPED)
    return BIDSName(entities, name.suffix, name.extension)


def _fused(group: list[Scan]) -> Scan:
    broken = [scan.problem for scan in group if scan.problem]
    runs = group if broken else sorted(group, key=lambda scan: _spacing(scan.path))
    name = fused_name(runs[0].name)
    problem = f"{name.stem}: cannot be fused. {' '.join(broken)}" if broken else None
    warnings = dict.fromkeys(text for run in runs for text in run.warnings)
    return replace(runs[0], name=name, problem=problem, runs=tuple(runs), warnings=tuple(warnings))


def _spacing(path: Path) -> float:
    """Largest voxel size, in steps of 0.1 mm; infinite for a header that cannot be read."""
    try:
        return round(float(voxel_sizes(open_image(path, path.name).affine).max()), 1)
    except Exception:  # any error of nibabel: the node that opens the image reports it
        return float("inf")
