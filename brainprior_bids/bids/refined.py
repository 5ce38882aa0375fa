# SPDX-License-Identifier: Apache-2.0
"""Another tool's image of a scan (``--task refine``), and the name of its result.

An image belongs to a scan if it is in the same ``sub-XX/[ses-YY/]anat`` of a derivative data set,
has no entity that contradicts the scan's (``desc-``, ``rec-`` and the like are the tool's), and is
in the scan's space: no ``space-``, ``orig`` or the scan's suffix. The tool may have produced
another contrast; SynthSR always returns a T1w. Such an image is used if no other raw scan could be
its source, and its result is named after it: ``sub-01_FLAIR`` and ``sub-01_desc-SynthSR_T1w`` give
``sub-01_desc-refined_T1w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from brainprior_bids.bids.files import listing
from brainprior_bids.bids.names import BIDSName, same_value
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import InputError
from brainprior_bids.settings import MODALITIES, OTHER_MODALITIES, Settings

ADDED = ("space", "res", "desc", "label", "atlas", "seg")
"""Entities that a derivative adds to its source's."""
IMAGES = (*MODALITIES, *OTHER_MODALITIES)


@dataclass(frozen=True)
class Given:
    """A file from another data set that is used for a scan.

    Parameters
    ----------
    path : Path
    uri : str
        ``bids:<data set>:<path>``.
    """

    path: Path
    uri: str


def find_refined(scan: Scan, settings: Settings) -> Given:
    """The one image of the scan, in the first data set that has any; its own contrast first.

    Raises
    ------
    InputError
        If there is none or more than one, or if it has another contrast than the scan with which
        it is combined.
    """
    raw = BIDSName.parse(scan.relative.name)
    for dataset, root in settings.derivatives.items():
        folder = Path(root) / raw.folder / "anat"
        every = {
            suffix: [
                path
                for end in (".nii", ".nii.gz")
                for path in sorted(folder.glob(f"*_{suffix}{end}"))
                if _shows(raw, path.name)
            ]
            for suffix in IMAGES
        }
        fits = every[raw.suffix]
        if not fits:
            fits = [
                path for paths in every.values() for path in paths if not _has_own(path.name, scan)
            ]
        if len(fits) > 1:
            raise InputError(
                f"{raw.stem}: --task refine expected one image in the data set {dataset}, found "
                f"{listing(fits)}. Leave one."
            )
        if not fits:
            continue
        (path,) = fits
        suffix = BIDSName.parse(path.name).suffix
        if suffix != raw.suffix and settings.uses_scan:
            raise InputError(
                f"{raw.stem}: {path.name} is a {suffix}; together with the scan only an image of "
                "the scan's own contrast can be used. Use --task refine alone."
            )
        return Given(path, f"bids:{dataset}:{PurePosixPath(path.relative_to(root))}")
    raise InputError(
        f"{raw.stem}: no image to refine; no data set of --derivatives "
        f"({', '.join(settings.derivatives)}) has {raw.folder}/anat/*_{raw.suffix}.nii.gz for it, "
        "and there is no image of another contrast that can belong to this scan only. If an image "
        f"can belong to two scans, name the source with space-{raw.suffix}."
    )


def name_after_images(scans: Sequence[Scan], settings: Settings) -> list[Scan]:
    """Name scans after their image if it has another contrast.

    Two scans that could be the source of one image, and would have the same name, get a
    ``problem``.
    """
    named = []
    for scan in scans:
        try:
            refined = None if scan.problem else find_refined(scan, settings)
        except InputError:  # reported when the scan is processed
            refined = None
        if refined is not None:
            suffix = BIDSName.parse(refined.path.name).suffix
            name = BIDSName(scan.name.entities, suffix, scan.name.extension)
            scan = replace(scan, name=name)
        named.append(scan)
    rivals: dict[str, list[str]] = {}
    for scan in named:
        rivals.setdefault(scan.name.stem, []).append(scan.relative.name)
    for index, (scan, own) in enumerate(zip(scans, named, strict=True)):
        others = rivals[own.name.stem]
        if len(others) > 1 and scan.problem is None:
            problem = (
                f"{scan.name.stem}: its image to refine, a {own.name.suffix}, could have been "
                f"made from any of {', '.join(others)}. Specify the source in its name "
                f"(space-{scan.name.suffix}), or exclude the others with --modalities."
            )
            named[index] = replace(scan, problem=problem)
    return named


def _shows(source: BIDSName, file_name: str) -> bool:
    """Whether the file is an image of the scan, in the scan's own space."""
    try:
        name = BIDSName.parse(file_name)
    except InputError:
        return False
    if name.get("space") not in (None, "orig", source.suffix):
        return False
    return all(
        key in ADDED or key == "rec" or same_value(source.get(key), value)
        for key, value in name.entities
    )


def _has_own(file_name: str, scan: Scan) -> bool:
    """Whether another scan could be the source of the image, or has the name of its result."""
    image, raw = BIDSName.parse(file_name), BIDSName.parse(scan.relative.name)
    wanted = BIDSName(raw.entities, image.suffix).stem
    for path in Path(scan.path).parent.glob(f"*_{image.suffix}.nii*"):
        try:
            other = BIDSName.parse(path.name)
        except InputError:
            continue
        if other.stem == wanted or (image.get("space") != raw.suffix and _shows(other, file_name)):
            return True
    return False
