# SPDX-License-Identifier: Apache-2.0
"""Masks and labels of a scan in other derivative data sets (``--derivatives``).

A file belongs to a scan if it is in the same ``sub-XX/[ses-YY/]anat``, has no entity that
contradicts the scan's, and is in the scan's space: for a T1w no ``space-`` or ``space-T1w``, for
another contrast ``space-<suffix>`` (the convention of fMRIPrep and of brainprior). The data sets
are searched in the order of the command line; within a data set, the file that shares most
entities with the scan is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from brainprior_bids.bids.files import listing
from brainprior_bids.bids.lesions import by_pattern, find_lesion, find_lesions_of_runs
from brainprior_bids.bids.names import BIDSName, same_value
from brainprior_bids.bids.query import Scan
from brainprior_bids.bids.refined import ADDED, Given, find_refined
from brainprior_bids.engine.errors import InputError
from brainprior_bids.settings import Settings

PREFERRED = {"mask": ("brain",), "dseg": ("aseg", "aparcaseg", "synthseg", "structures")}
"""``desc-`` (or ``seg-``) of each kind, best first. A ``dseg`` without either is last, because
that of fMRIPrep is a map of three tissues."""
OPTIONS = {"mask": "--skull-strip mask", "dseg": "--parcellation derivatives"}


def find_given(scan: Scan, settings: Settings) -> list[dict[str, Given]]:
    """Additional files of each run of a scan, the reference first: role -> file.

    The roles are ``mask`` and ``dseg`` (anatomy), ``lesion``, and for the reference only
    ``refined`` (another tool's image, in its space) and ``trust`` (a map of its SD). A scan that
    is not fused is its own reference.

    Raises
    ------
    InputError
        If a required file is missing or ambiguous; for fused runs, if none has a lesion mask, or
        the one whose lesion is to be filled has none.
    """
    runs = scan.runs or (scan,)
    every = [_anatomy(run, settings) for run in runs]
    if settings.refines:
        every[0] = _refined(runs[0], settings) | every[0]
    if settings.inpaints:
        for given, path in zip(every, _lesions(runs, settings), strict=True):
            if path is not None:
                given["lesion"] = _as_given(path, settings)
    return every


def _lesions(runs: Sequence[Scan], settings: Settings) -> Sequence[Path | None]:
    """The lesion mask of every run; None for a fused run that has none."""
    if len(runs) == 1:
        return [find_lesion(runs[0], settings)]
    masks = find_lesions_of_runs(runs, settings)
    if settings.fills_scan and masks[0] is None:
        raise InputError(
            f"{runs[0].name.stem}: it is the reference of the fused runs (thinnest slices), whose "
            "lesion --task inpaint fills, and has no lesion mask. Draw one on it, choose the runs "
            "with --run-id, or use --task restore inpaint."
        )
    return masks


def _refined(scan: Scan, settings: Settings) -> dict[str, Given]:
    """Another tool's image, and the map of its error if there is one."""
    files = {"refined": find_refined(scan, settings)}
    if settings.trust is not None and settings.trust_sd is None:
        files["trust"] = _as_given(_find_trust(scan, settings), settings)
    return files


def _anatomy(scan: Scan, settings: Settings) -> dict[str, Given]:
    """Mask and labels, if they are requested from other data sets."""
    files = {}
    requested = {
        "mask": settings.skull_strip == "mask",
        "dseg": settings.parcellation == "derivatives",
    }
    for suffix, wanted in requested.items():
        if wanted:
            files[suffix] = _find(scan, suffix, settings.derivatives)
    return files


def _as_given(path: Path, settings: Settings) -> Given:
    """The file with its name in its data set."""
    for dataset, root in {**settings.derivatives, "raw": settings.bids_dir}.items():
        if path.is_relative_to(root):
            return Given(path, f"bids:{dataset}:{PurePosixPath(path.relative_to(root))}")
    return Given(path, path.name)


def _find_trust(scan: Scan, settings: Settings) -> Path:
    matches, pattern = by_pattern(str(settings.trust), scan, settings)
    if len(matches) != 1:
        raise InputError(
            f"{scan.name.stem}: --trust {pattern} names {len(matches)} files; one is needed. "
            "Make it more specific, or correct the path."
        )
    return matches[0]


def _find(scan: Scan, suffix: str, derivatives: Mapping[str, str]) -> Given:
    for dataset, root in derivatives.items():
        ranked: dict[tuple[int, int], list[Path]] = {}
        folder = Path(root) / scan.name.folder / "anat"
        for path in sorted([*folder.glob(f"*_{suffix}.nii"), *folder.glob(f"*_{suffix}.nii.gz")]):
            rank = _rank(scan.name, path.name, suffix)
            if rank is not None:
                ranked.setdefault(rank, []).append(path)
        if not ranked:
            continue
        best = ranked[min(ranked)]
        if len(best) > 1:
            raise InputError(
                f"{scan.name.stem}: {OPTIONS[suffix]} expected one file in the data set "
                f"{dataset}, found {listing(best)}. Leave one."
            )
        relative = PurePosixPath(best[0].relative_to(root))
        return Given(best[0], f"bids:{dataset}:{relative}")
    space = "" if scan.name.suffix == "T1w" else f"space-{scan.name.suffix}_"
    example = f"{scan.name.folder}/anat/*_{space}desc-{PREFERRED[suffix][0]}_{suffix}.nii.gz"
    raise InputError(
        f"{scan.name.stem}: {OPTIONS[suffix]}, but no data set of --derivatives "
        f"({', '.join(derivatives)}) has {example} for it. Add it, or leave the scan out."
    )


def _rank(source: BIDSName, file_name: str, suffix: str) -> tuple[int, int] | None:
    """How well a file matches a scan, lower is better; None for another scan or kind of file."""
    try:
        name = BIDSName.parse(file_name)
    except InputError:
        return None
    spaces = (None, "T1w") if source.suffix == "T1w" else (source.suffix,)
    if name.get("space") not in spaces:
        return None
    shared = 0
    for key, value in name.entities:
        if key in ADDED:
            continue
        if not same_value(source.get(key), value):
            return None
        shared += 1
    kind = name.get("desc") or name.get("seg")
    known = PREFERRED[suffix]
    if suffix == "mask" and (
        kind not in (None, *known) or name.get("label") not in (None, "brain")
    ):
        return None  # a mask of a lesion, a tissue or a head
    place = known.index(kind) if kind in known else len(known) + (kind is None)
    return -shared, place
