# SPDX-License-Identifier: Apache-2.0
"""The lesion mask of a scan, by its usual names.

In this order: ``--lesion-mask PATTERN``; ``label-lesion_mask`` in every ``--derivatives`` set;
``label-lesion_roi`` in the raw ``anat`` folder (fMRIPrep's convention). A mask belongs to a scan
of the same participant and session whose other entities do not contradict it. Without ``space-``
it is drawn on the T1w; ``space-<suffix>`` names another scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.bids import patterns
from brainprior_bids.bids.files import listing
from brainprior_bids.bids.names import BIDSName, same_value
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import InputError
from brainprior_bids.settings import Settings

OWN = ("label", "desc", "space", "res", "den")
"""Entities of a mask that do not come from its scan."""


class NoLesionError(InputError):
    """A scan has no lesion mask."""


def find_lesion(scan: Scan, settings: Settings) -> Path:
    """The one mask that belongs to a scan.

    Raises
    ------
    NoLesionError
        If there is none (the message lists the searched paths, and other sessions that have one).
    InputError
        If there is more than one.
    """
    name = scan.name
    if settings.lesion_mask is not None:
        matches, pattern = by_pattern(settings.lesion_mask, scan, settings)
        return _one(matches, scan, f"--lesion-mask {pattern}", "")
    places = [(Path(path), "mask") for path in settings.derivatives.values()]
    places.append((settings.bids_dir, "roi"))
    searched, others = [], []
    for root, suffix in places:
        searched.append(f"{root / name.folder / 'anat'}/*label-lesion*_{suffix}.nii[.gz]")
        every = _candidates(root.glob(f"sub-{scan.subject}/**/anat/*_{suffix}.nii*"))
        matches = [path for path, mask in every if _belongs(mask, name)]
        if matches:
            return _one(matches, scan, "", "")
        others += [path for path, mask in every if mask.get("ses") != name.get("ses")]
    hint = "".join(f" {path.name} is of another session." for path in others)
    hint += " The name of a mask on a scan other than the T1w has space-<suffix>, as in space-T2w."
    return _one([], scan, ", ".join(searched), hint)


def find_lesions_of_runs(runs: Sequence[Scan], settings: Settings) -> list[Path | None]:
    """The mask of every run that has one; a run without a mask is used everywhere.

    A mask that matches several runs by its name belongs to those that have its grid, or to the
    first of them by name if none has (a later step reports the problem).

    Raises
    ------
    InputError
        If no run has one, or a run has more than one.
    """
    masks: list[Path | None] = []
    missing = ""
    for run in runs:
        try:
            masks.append(find_lesion(run, settings))
        except NoLesionError as error:
            masks.append(None)
            missing = missing or str(error)
    if not any(masks):
        raise InputError(f"{missing} None of the runs that are fused has one.")
    for path in {path for path in masks if path is not None and masks.count(path) > 1}:
        named = [index for index, mask in enumerate(masks) if mask == path]
        fitting = [index for index in named if _same_grid(path, runs[index].path)]
        for index in set(named) - set(fitting or named[:1]):
            masks[index] = None
    return masks


def _same_grid(one: Path, other: Path) -> bool:
    """Whether two images have the same grid by their headers, up to the order of the axes."""
    try:
        images = [nib.as_closest_canonical(open_image(path, path.name)) for path in (one, other)]
    except Exception:  # any error of nibabel: the step that opens the image reports it
        return False
    a, b = images
    return a.shape[:3] == b.shape[:3] and bool(np.allclose(a.affine, b.affine, atol=0.05))


def by_pattern(pattern: str, scan: Scan, settings: Settings) -> tuple[list[Path], str]:
    """The files that match a pattern with ``{subject}`` …, and the pattern filled in."""
    name = scan.name
    values = {
        "subject": scan.subject,
        "session": name.get("ses") or "",
        "suffix": name.suffix,
        "stem": name.stem,
    }
    pattern = patterns.fill(pattern, values)
    root, text = patterns.place(pattern, settings.bids_dir)
    return sorted(root.glob(text)), pattern


def _candidates(paths: Iterable[Path]) -> list[tuple[Path, BIDSName]]:
    candidates = []
    for path in sorted(paths):
        try:
            name = BIDSName.parse(path.name)
        except InputError:
            continue
        if name.get("label") == "lesion" and name.extension in (".nii", ".nii.gz"):
            candidates.append((path, name))
    return candidates


def _belongs(mask: BIDSName, scan: BIDSName) -> bool:
    if mask.get("ses") != scan.get("ses"):
        return False
    if mask.get("space") not in ({None, "orig", "T1w"} if scan.suffix == "T1w" else {scan.suffix}):
        return False
    return all(same_value(scan.get(key), value) for key, value in mask.entities if key not in OWN)


def _one(matches: list[Path], scan: Scan, searched: str, hint: str) -> Path:
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(
            f"{scan.name.stem}: {len(matches)} lesion masks match it ({listing(matches)}); one is "
            "needed. Remove the others, or choose one with --lesion-mask."
        )
    raise NoLesionError(f"{scan.name.stem}: no lesion mask; looked for {searched}.{hint}")
