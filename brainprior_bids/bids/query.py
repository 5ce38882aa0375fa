# SPDX-License-Identifier: Apache-2.0
"""The requested scans, and the metadata in their sidecars.

pybids reads the names and answers the query. It indexes only the images in the ``anat`` folders of
the requested subjects and sessions, so that the time depends on the request, not on the data set.
Sidecars are read here, by the inheritance principle of BIDS, and only for the scans that match:
pybids reads them for every file of its index, which takes most of its time. Nothing is written to
the data set: the index is in memory.
"""

from __future__ import annotations

import json
import logging
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from brainprior_bids.bids.files import decoded, parse_json, readable
from brainprior_bids.bids.names import BIDSName, bare_number
from brainprior_bids.engine.errors import InputError, UsageError
from brainprior_bids.settings import (
    MODALITIES,
    OTHER_MODALITIES,
    SIMILAR_CONTRAST,
    Settings,
)

LOG = logging.getLogger("brainprior")
EXTENSIONS = (".nii", ".nii.gz")
FOREIGN = {"bold", "sbref", "fmap", "roi", "dwi", "asl", "pdt2"}
"""Keys of ``--bids-filter-file`` in fMRIPrep and related programs."""
RESERVED = {
    "return_type", "target", "scope", "regex_search", "absolute_paths", "invalid_filters",
    "filters", "self",
}  # fmt: skip
"""Arguments of pybids that are not entities."""
LARGEST_SIDECAR = 16 * 2**20
"""Largest sidecar in bytes; that of a scan has a few thousand."""
NOT_TEXT = re.compile(r"[\ud800-\udfff]")
"""Bytes of a file's name that are not UTF-8, in Python's representation."""
LARGEST_NUMBER = 2**53
"""From this number on, JSON numbers are not exact and exceed those of a database."""
LONGEST_STEM = 220
"""Longest name in characters; with a longer one, not even its failure could be recorded."""
MAGNITUDE = (None, "mag")
"""Values of ``part-`` of images that show a brain."""
NO_CONFIG = ".brainprior-reads-no-layout-config"
"""Replaces ``layout_config.json``, with which a folder could change how pybids reads it."""
DERIVED = ("space", "res", "desc")
"""Entities of derivatives: outputs replace them, so that two results would have one name."""


class NoScanError(UsageError):
    """No requested scan exists."""


@dataclass(frozen=True)
class Scan:
    """One image of the raw data set.

    Parameters
    ----------
    path : Path
        The image.
    relative : PurePosixPath
        The same, from the data set's root.
    name : BIDSName
        Its parsed name.
    metadata : mapping
        Metadata from every sidecar that applies, by BIDS inheritance.
    problem : str or None
        Why it cannot be processed, if that is known without opening it.
    runs : tuple of Scan
        With ``--fuse``: the scans that are fused, the reference first; empty otherwise.
    warnings : tuple of str
        Corrections that were needed to read its sidecars.
    """

    path: Path
    relative: PurePosixPath
    name: BIDSName
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    runs: tuple[Scan, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """Label without ``sub-``."""
        return str(self.name.get("sub"))

    @property
    def contrast(self) -> str:
        """The contrast for the network: ``T1w``, ``T2w``, ``FLAIR`` or ``unknown``.

        One inversion of an MP2RAGE (``inv-``) is ``unknown``, whatever its suffix.
        """
        suffix = SIMILAR_CONTRAST.get(self.name.suffix, self.name.suffix)
        return suffix if suffix in MODALITIES and self.name.get("inv") is None else "unknown"


def check_dataset(bids_dir: Path) -> dict[str, Any]:
    """The content of ``dataset_description.json``.

    Raises
    ------
    UsageError
        If the folder or the file is missing or unreadable, or brainprior made the data set.
    """
    if not bids_dir.is_dir():
        what = "is not a folder" if bids_dir.exists() else "does not exist"
        raise UsageError(
            f"bids_dir {bids_dir} {what}. Give the root of a BIDS data set "
            "(in a container: check that it is mounted, for example -v /my/data:/data:ro)."
        )
    path = bids_dir / "dataset_description.json"
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file. Replace it by a file of JSON text.")
        text, other = decoded(path.read_bytes())
        description = parse_json(text)
    except FileNotFoundError:
        raise UsageError(
            f"{bids_dir} has no dataset_description.json, so it is not the root of a BIDS data "
            'set. Give the root, or write the file: {"Name": "…", "BIDSVersion": "1.11.1"}.'
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Repair it.") from error
    if not isinstance(description, dict):
        raise UsageError(f"{path} must contain a JSON object, got {type(description).__name__}.")
    if other is not None:
        LOG.warning("%s is %s; BIDS requires UTF-8. Save it as UTF-8.", path, other)
    makers = description.get("GeneratedBy")
    makers = makers if isinstance(makers, list) else []
    if any(isinstance(maker, dict) and maker.get("Name") == "brainprior" for maker in makers):
        raise UsageError(
            f"bids_dir {bids_dir} was written by brainprior: restored images are not measurements "
            "and are not restored again. Give the raw data set."
        )
    return description


def list_subjects(bids_dir: Path) -> list[str]:
    """Labels of the ``sub-`` folders, sorted."""
    return sorted(
        entry.name[4:]
        for entry in bids_dir.iterdir()
        if entry.name.startswith("sub-") and os.path.isdir(entry)
    )


def misnamed_folders(bids_dir: Path) -> dict[str, str]:
    """Folders that seem to be participants or sessions but are misnamed, and what to do.

    Returns
    -------
    path in the data set -> message
        Such as ``SUB-01``, ``sub_02``, ``subject03``, ``sub-04/Ses-1``.
    """
    messages = {}
    every = (bids_dir / f"sub-{label}" for label in list_subjects(bids_dir))
    subjects = [subject for subject in every if _locked(subject) is None]
    for folder, key, word in ((bids_dir, "sub", "ject"), *((s, "ses", "sion") for s in subjects)):
        for entry in sorted(folder.iterdir()):
            start = re.match(rf"{key}(?:{word})?(?:[-_ ](?=.)|(?=\d))", entry.name, re.IGNORECASE)
            if start is None or entry.name.startswith(f"{key}-") or not os.path.isdir(entry):
                continue
            label = re.sub("[^a-zA-Z0-9]", "", entry.name[start.end() :])
            place = readable(entry.relative_to(bids_dir))
            messages[place] = (
                f"{place}: this folder is ignored, as its name does not begin with '{key}-' in "
                f"lower case. Rename it (and its files), for example to {key}-{label}."
            )
    return messages


def locked_folders(
    bids_dir: Path, subjects: Iterable[str], sessions: Sequence[str]
) -> dict[str, str]:
    """Unreadable folders that may contain scans of these subjects and sessions (empty: all).

    Returns
    -------
    path in the data set -> message
    """
    locked: dict[Path, str] = {}
    for subject in subjects:
        own = bids_dir / f"sub-{subject}"
        anats = _anat_folders(own, sessions)
        for folder in sorted({own, *(anat.parent for anat in anats), *anats}):
            reason = _locked(folder)
            if reason is not None and not locked.keys() & set(folder.parents):
                locked[folder] = reason
    places = {folder.relative_to(bids_dir).as_posix(): text for folder, text in locked.items()}
    return {
        place: f"{readable(place)}: this folder cannot be read ({reason}), so no scan in it is "
        "processed. Check its permissions."
        for place, reason in places.items()
    }


def _locked(folder: Path) -> str | None:
    """Why a folder cannot be read; None if it can, or does not exist."""
    try:
        os.stat(os.path.join(folder, "."))  # its files can be reached
        with os.scandir(folder):  # and listed
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror


def requested_subjects(settings: Settings) -> list[str]:
    """Labels of the requested participants, or of all, sorted.

    Raises
    ------
    UsageError
        An unknown label.
    """
    present = list_subjects(settings.bids_dir)
    _require(settings.participant_label, present, "participant", settings.bids_dir)
    return sorted(settings.participant_label or present)


def subjects_without(scans: Iterable[Scan], settings: Settings) -> list[str]:
    """The requested participants without any requested scan in their folders."""
    having = {scan.relative.parts[0] for scan in scans}
    return [label for label in requested_subjects(settings) if f"sub-{label}" not in having]


def find_scans(settings: Settings) -> list[Scan]:
    """Every requested scan, sorted by path. Any error in one file becomes that scan's ``problem``.

    Raises
    ------
    UsageError
        An unknown label, a filter that pybids does not know, or no scan found; the message lists
        the existing labels, or the active filters.
    """
    subjects = requested_subjects(settings)
    sessions = sorted(
        {
            entry.name[4:]
            for subject in subjects
            for entry in (settings.bids_dir / f"sub-{subject}").glob("ses-*")
            if os.path.isdir(entry)
        }
    )
    _require(settings.session_label, sessions, "session", settings.bids_dir)

    entries = _anat_entries(settings.bids_dir, subjects, settings.session_label)
    layout = _index(
        settings.bids_dir,
        settings.participant_label,
        settings.session_label,
        database_dir=settings.bids_database_dir,
    )
    sidecars = Sidecars(settings.bids_dir)
    files: dict[Path, _File] = {}
    for suffix in settings.modalities:
        query, fields = _query(settings, suffix)
        try:
            listed = [Path(file.path) for file in layout.get(**query, invalid_filters="error")]
        except Exception as error:  # any error of pybids and its database about a value
            raise UsageError(
                f"--bids-filter-file: the filter for {suffix} cannot be used: "
                f"{str(error).partition(' If you')[0]}"  # pybids continues with its own arguments
            ) from error
        described = {path: _described(path, suffix, sidecars) for path in listed}
        _require_fields(fields, described.values(), suffix)
        files |= {path: file for path, file in described.items() if file.fits(fields)}
        ends = tuple(f"_{suffix}{end}" for end in EXTENSIONS)
        for path in entries:
            problem = _no_file(path, settings.bids_dir) if path.name.endswith(ends) else None
            if problem is not None:
                files[path] = _File(suffix, problem=problem)
    scans = _scans(settings.bids_dir, files)
    if not scans:
        locked = locked_folders(settings.bids_dir, subjects, settings.session_label)
        raise NoScanError(
            "\n".join(
                [
                    f"No scan in {settings.bids_dir} matches. Filters in force:",
                    _describe(settings),
                    "Widen one of them, or check the file names.",
                    *locked.values(),
                ]
            )
        )
    return scans


@dataclass(frozen=True)
class _File:
    """An image that was found: the suffix of its request, and the metadata of its sidecars."""

    suffix: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str | None = None

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether the metadata match the filter; True if they cannot be read, which is reported
        later.
        """
        if self.problem is not None:
            return True
        return all(_fits(self.metadata.get(key), asked) for key, asked in fields.items())


def _described(path: Path, suffix: str, sidecars: Sidecars) -> _File:
    try:
        metadata, warnings = sidecars.metadata(path)
    except InputError as error:
        stem = readable(path.name).partition(".")[0]
        return _File(suffix, problem=f"{stem}: {error}")
    return _File(suffix, metadata, tuple(warnings))


def _fits(value: Any, asked: Any) -> bool:
    """Whether a sidecar's value is one of those requested; null: absent, "*": present."""
    own = value if isinstance(value, list) else [value]
    for item in asked if isinstance(asked, list) else [asked]:
        if (value is None and item is None) or (item == "*" and value is not None):
            return True
        if item is not None and any(item == one or str(item) == str(one) for one in own):
            return True
    return False


def _require_fields(fields: Mapping[str, Any], files: Iterable[_File], suffix: str) -> None:
    """Refuse a filter with a key that is neither an entity nor in any sidecar."""
    files = list(files)
    keys = {key for file in files for key in file.metadata}
    unknown = sorted(set(fields) - keys)
    if unknown and files and all(file.problem is None for file in files):
        raise UsageError(
            f"--bids-filter-file: the filter for {suffix} cannot be used: '{unknown[0]}' is not a "
            f"recognized entity, and in no sidecar of a {suffix}. Correct or remove it."
        )


def _anat_entries(bids_dir: Path, subjects: Iterable[str], sessions: Sequence[str]) -> list[Path]:
    """The content of the ``anat`` folders of these subjects and sessions (empty: all)."""
    entries: list[Path] = []
    for subject in subjects:
        for anat in _anat_folders(bids_dir / f"sub-{subject}", sessions):
            with suppress(OSError):
                entries += sorted(anat.iterdir())
    return entries


def _anat_folders(folder: Path, sessions: Sequence[str]) -> list[Path]:
    """The ``anat`` folders that a subject and these sessions (empty: all) may have."""
    every = [path / "anat" for path in (folder, *sorted(folder.glob("ses-*")))]
    return [
        anat for anat in every if not sessions or anat.parent.name.removeprefix("ses-") in sessions
    ]


def _no_file(path: Path, bids_dir: Path) -> str | None:
    """Why pybids does not list a file with an image's name; None if it does."""
    stem = readable(path.name).partition(".")[0]
    if NOT_TEXT.search(str(path.relative_to(bids_dir))):
        return (
            f"{stem}: the file's name is not text (UTF-8). "
            "Rename it: letters, digits, '-' and '_'."
        )
    if os.path.isdir(path):
        return f"{stem}: expected an image file, {path} is a folder. Replace or remove it."
    return None


def _scans(bids_dir: Path, files: Mapping[Path, _File]) -> list[Scan]:
    """The files as scans.

    Phase, real and imaginary images do not show a brain: they are left out if their magnitude
    image is among the files, and are scans with a problem otherwise.
    """
    named = {
        path: _named(PurePosixPath(path.relative_to(bids_dir)), files[path])
        for path in sorted(files)
    }
    whole = {
        name.derivative(part=None)
        for name, problem in named.values()
        if problem is None and name.get("part") in MAGNITUDE
    }
    scans: dict[str, Scan] = {}
    for path, (name, problem) in named.items():
        file, relative = files[path], PurePosixPath(path.relative_to(bids_dir))
        if problem is None and name.get("part") not in MAGNITUDE:
            if name.derivative(part=None) in whole:
                continue
            problem = (
                f"{name.stem}: expected a magnitude image, the name says part-{name.get('part')}. "
                "Export the magnitude as well, with part-mag or without part-; or exclude this "
                'file: --bids-filter-file with "part": [null, "mag"].'
            )
        problem = problem or file.problem or _unusable(path, name)
        result = name.derivative()  # entities in the order of BIDS, unique for each set of results
        if result in scans:
            twin = scans[result]
            both = f"two files represent this scan ({twin.relative} and {readable(relative)})"
            if twin.name.stem == name.stem:
                problem = f"{name.stem}: {both}. Remove one of them."
            else:  # the same entities in another order: the first one keeps the name
                problem = f"{name.stem}: {both}. Rename or remove this one."
                name = BIDSName.stand_in(relative, file.suffix)
                result = name.derivative()
        scans[result] = Scan(
            path, PurePosixPath(readable(relative)), name, dict(file.metadata), problem,
            warnings=file.warnings,
        )  # fmt: skip
    return list(scans.values())


def _named(relative: PurePosixPath, file: _File) -> tuple[BIDSName, str | None]:
    """A scan's name; if it or the file's folder cannot be used, a name for the report, and why."""
    stem = readable(relative.name).partition(".")[0]
    problem = file.problem if NOT_TEXT.search(str(relative)) else None
    if problem is None:
        try:
            name = BIDSName.parse(relative)
        except InputError as error:
            problem = str(error)
        else:
            wrong = relative.parent != name.folder / "anat"
            if not wrong and len(name.stem) <= LONGEST_STEM:
                return name, None
            problem = f"{stem}: its name has {len(name.stem)} characters, too long. Shorten it."
            if wrong:
                problem = (
                    f"{stem}: the file is in {readable(relative.parent)}, but its name belongs in "
                    f"{name.folder / 'anat'}. Rename or move it."
                )
    return BIDSName.stand_in(relative, file.suffix), problem


def _unusable(path: Path, name: BIDSName) -> str | None:
    """Why an image cannot be processed, from its name and file type; None if it can."""
    added = [f"{key}-" for key in DERIVED if name.get(key) is not None]
    if added:
        return (
            f"{name.stem}: a raw scan has no {', '.join(added)} in its name. Give raw data; "
            "for another tool's image, use --task refine and --derivatives."
        )
    if os.path.isfile(path):
        return None
    if os.path.exists(path):
        return f"{name.stem}: expected an image file, {path} is not one. Replace or remove it."
    if os.path.islink(path):
        return f"{name.stem}: {_without_content(path)}"
    return (
        f"{name.stem}: the file was removed after --bids-database-dir was created. "
        "Remove that folder and run again."
    )


def _without_content(path: Path) -> str:
    """Advice about a broken link."""
    return (
        f"{path.name} is a link whose target is missing. Fetch it (datalad get, or "
        "git annex get) and run again; if git-annex is not in use, correct the link."
    )


def _index(
    bids_dir: Path,
    subjects: Sequence[str],
    sessions: Sequence[str],
    *,
    database_dir: Path | None = None,
) -> Any:
    """A pybids layout of the images in the ``anat`` folders of these subjects (empty: all).

    With ``database_dir``, the index of the whole data set, metadata included, is stored there or
    read from there.
    """
    # pybids matches files too: the sidecars above an anat folder must pass
    ignore = [
        r"^/(?!sub-)[^/]+(?<!\.json)$",
        r"^/sub-[^/]+/(?:ses-[^/]+/)?(?!ses-|anat(?:/|$))[^/]+(?<!\.json)$",
        NOT_TEXT.pattern,  # its database cannot store them
    ]
    everyone = list_subjects(bids_dir) if database_dir is not None or not subjects else subjects
    # pybids would descend into folders below an anat folder, also through links to anywhere, and
    # fail at a folder that it cannot read
    indexed = () if database_dir is not None else sessions
    closed = [*locked_folders(bids_dir, everyone, indexed)]
    closed += [
        path.relative_to(bids_dir).as_posix()
        for path in _anat_entries(bids_dir, everyone, indexed)
        if os.path.isdir(path)
    ]
    ignore += [rf"^/{re.escape(place)}$" for place in closed]
    if database_dir is not None:
        return _kept_index(bids_dir, ignore, database_dir)
    ignore.append(r"\.json$")
    if subjects:
        ignore.append(rf"^/sub-(?!(?:{_any(subjects)})(?:/|$))")
    if sessions:
        ignore.append(rf"^/sub-[^/]+/ses-(?!(?:{_any(sessions)})(?:/|$))")
    try:
        return _layout(bids_dir, ignore, metadata=False)
    except OSError as error:
        raise UsageError(
            f"{bids_dir} cannot be indexed: {error}. Check its permissions."
        ) from error


def _kept_index(bids_dir: Path, ignore: Sequence[str], database_dir: Path) -> Any:
    """The layout in ``--bids-database-dir``, created if it does not exist."""
    option = f"--bids-database-dir {database_dir}"
    index = database_dir / "layout_index.sqlite"
    database = {"database_path": str(database_dir)}
    try:
        database_dir.mkdir(parents=True, exist_ok=True)
        exists = index.exists()
    except OSError as error:
        raise UsageError(
            f"{option}: the folder cannot be created ({error.strerror}). Choose another."
        ) from error
    try:
        if exists:
            layout = _layout(bids_dir, None, metadata=False, **database)
        else:
            try:
                layout = _layout(bids_dir, ignore, metadata=True, **database)
            except (OSError, ValueError, RecursionError) as error:  # a sidecar of any participant
                for path in database_dir.glob("layout_*"):
                    path.unlink()
                LOG.warning("%s: kept without metadata: %s", option, error)
                ignore = [*ignore, r"\.json$"]
                layout = _layout(bids_dir, ignore, metadata=False, **database)
    except Exception as error:  # any error of pybids and its database
        raise UsageError(
            f"{option} cannot be used for {bids_dir}: {error} Remove that folder; it will be "
            "created again."
        ) from error
    if Path(layout.root).resolve() != bids_dir.resolve():
        raise UsageError(
            f"{option} is the index of {layout.root}, not of {bids_dir}. Use another folder."
        )
    return layout


def _layout(
    bids_dir: Path, ignore: Sequence[str] | None, *, metadata: bool, **arguments: str
) -> Any:
    """pybids' layout; its deprecation warnings are hidden, because users cannot act on them."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    indexer = None
    if ignore is not None:
        indexer = BIDSLayoutIndexer(
            validate=False,
            ignore=[re.compile(patt) for patt in ignore],
            index_metadata=metadata,
            config_filename=NO_CONFIG,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BIDSLayout(str(bids_dir), validate=False, indexer=indexer, **arguments)


class Sidecars:
    """Reads sidecars by the inheritance principle: from the root down, the nearest overrides.

    A JSON file applies to an image below it that has its suffix and all of its entities. Every
    folder is listed once, and every file is read once.
    """

    def __init__(self, bids_dir: Path) -> None:
        self._root = bids_dir
        self._folders: dict[Path, dict[str, list[tuple[Path, dict[str, str]]]]] = {}
        self._contents: dict[Path, dict[str, Any] | InputError] = {}
        self._warnings: dict[Path, str] = {}

    def metadata(self, image: Path) -> tuple[dict[str, Any], list[str]]:
        """The combined metadata of all sidecars of an image, and warnings about their encoding.

        Raises
        ------
        InputError
            If one of them cannot be read or is not a JSON object.
        """
        suffix, entities = _parts_of(image)
        merged: dict[str, Any] = {}
        warnings = []
        for folder in reversed(image.relative_to(self._root).parents):
            for path, needed in self._listed(self._root / folder).get(suffix, ()):
                if needed.items() <= entities.items():
                    merged.update(self._read(path))
                    if path in self._warnings:
                        warnings.append(self._warnings[path])
        return merged, warnings

    def _listed(self, folder: Path) -> dict[str, list[tuple[Path, dict[str, str]]]]:
        """Suffix -> sidecars in a folder, the most general first."""
        if folder not in self._folders:
            listed: dict[str, list[tuple[Path, dict[str, str]]]] = {}
            for path in sorted(folder.glob("*.json")):
                suffix, entities = _parts_of(path)
                listed.setdefault(suffix, []).append((path, entities))
            for sidecars in listed.values():
                sidecars.sort(key=lambda item: len(item[1]))
            self._folders[folder] = listed
        return self._folders[folder]

    def _read(self, path: Path) -> dict[str, Any]:
        if path not in self._contents:
            try:
                self._contents[path], other = _read_sidecar(path)
            except InputError as error:  # the same for every image that it applies to
                self._contents[path] = error
            else:
                if other is not None:
                    self._warnings[path] = f"{path.name} is {other}; BIDS requires UTF-8."
        content = self._contents[path]
        if isinstance(content, InputError):
            raise content
        return content


def _read_sidecar(path: Path) -> tuple[dict[str, Any], str | None]:
    """A sidecar's content, and its encoding if that is not the one BIDS requires."""
    title = f"the sidecar {readable(path)}"
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(_without_content(path))
    if not os.path.isfile(path):
        raise InputError(f"{title} is not a file. Replace or remove it.")
    try:
        if path.stat().st_size > LARGEST_SIDECAR:
            size = path.stat().st_size / 2**20
            raise InputError(
                f"{title} has {size:.0f} MiB, expected less than {LARGEST_SIDECAR / 2**20:.0f}. "
                "Is it a sidecar? Replace or remove it."
            )
        text, other = decoded(path.read_bytes())
        content = parse_json(text)
        if "\\u" in text:
            content = _as_text(content)
    except OSError as error:
        raise InputError(
            f"{title} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    except ValueError as error:
        raise InputError(f"{title} is not JSON ({error}). Repair or remove it.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{title}: expected a JSON object, got {type(content).__name__}. Repair or remove it."
        )
    return content, other


def _as_text(value: Any) -> Any:
    """A JSON value with storable strings: halves of surrogate pairs become U+FFFD."""
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return NOT_TEXT.sub("\ufffd", value) if isinstance(value, str) else value


def _parts_of(path: Path) -> tuple[str, dict[str, str]]:
    """Suffix and entities of a name; ``run-01`` is ``run-1``."""
    *pairs, suffix = path.name.partition(".")[0].split("_")
    entities = dict(pair.partition("-")[::2] for pair in pairs)
    if "run" in entities:
        entities["run"] = bare_number(entities["run"])
    return suffix, entities


def _query(settings: Settings, suffix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of a filter for pybids, by file names, and the part for the sidecars."""
    from bids.layout import Config, Query

    words = {None: Query.NONE, "*": Query.ANY}
    query: dict[str, Any] = {
        "datatype": "anat",
        "suffix": suffix,
        "extension": list(EXTENSIONS),
    }
    if settings.participant_label:
        query["subject"] = list(settings.participant_label)
    if settings.session_label:
        query["session"] = list(settings.session_label)
    if settings.run_id:
        query["run"] = [int(run) for run in settings.run_id]
    entities = set(Config.load("bids").entities)
    fields = {}
    for key, value in settings.bids_filters.get(suffix, {}).items():
        if key not in entities:
            fields[key] = value
        elif isinstance(value, list):
            query[key] = [words.get(item, item) for item in value]
        else:
            query[key] = words.get(value, value)
    return query, fields


def read_filters(path: Path, modalities: Iterable[str]) -> dict[str, Any]:
    """``--bids-filter-file``: ``{"t1w": {"acquisition": "mprage", "session": null}}``.

    Returns
    -------
    suffix -> {pybids entity -> value}; null means "the entity is absent", "*" "it is present",
    alone or in a list. Keys for fMRIPrep and related programs, and those of modalities that were
    not requested, are ignored: one file may serve several programs.

    Raises
    ------
    UsageError
        If the file is missing, is not JSON, or has a key for none of these programs.
    """
    who = f"--bids-filter-file {path}"
    try:
        filters = parse_json(decoded(path.read_bytes())[0])
    except OSError as error:
        raise UsageError(f"{who} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{who} is not valid JSON ({error}).") from error
    return checked_filters(filters, modalities, who)


def checked_filters(filters: Any, modalities: Iterable[str], who: str) -> dict[str, Any]:
    """Filters as ``read_filters`` returns them, from the content of a file; ``who`` is that file.

    Raises
    ------
    UsageError
        The message names the key or value that cannot be used.
    """
    by_key = {suffix.lower(): suffix for suffix in modalities}
    others = {suffix.lower() for suffix in (*MODALITIES, *OTHER_MODALITIES)} - set(by_key)
    if not isinstance(filters, dict) or not all(isinstance(v, dict) for v in filters.values()):
        raise UsageError(
            f"{who}: expected an object of objects, such as "
            '{"t1w": {"acquisition": "mprage"}}.'
        )
    idle = sorted(key for key in filters if key.lower() in others | FOREIGN)
    if idle:
        LOG.info("--bids-filter-file: %s: ignored", ", ".join(idle))
        filters = {key: value for key, value in filters.items() if key not in idle}
    unknown = sorted(key for key in filters if key.lower() not in by_key)
    if unknown:
        raise UsageError(
            f"{who}: unknown key {readable(', '.join(unknown))}; the known keys are "
            f"{', '.join(by_key)} (set by --modalities)."
        )
    for key, query in filters.items():
        for entity, value in query.items():
            _check_filter(f"{who}: {key}: {readable(entity)}", by_key[key.lower()], entity, value)
    return {by_key[key.lower()]: value for key, value in filters.items()}


def _check_filter(who: str, suffix: str, entity: str, value: Any) -> None:
    """Refuse values that pybids would misinterpret or reject."""
    if entity in RESERVED:
        raise UsageError(f"{who} is an argument of pybids, not an entity of BIDS. Remove it.")
    fixed = {"datatype": ("anat",), "suffix": (suffix,), "extension": EXTENSIONS}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict | list):
            raise UsageError(
                f"{who}: expected a value or a list of values, got {type(item).__name__} "
                f"{reprlib.repr(item)} in it."
            )
        number = isinstance(item, int | float)
        if number and not abs(item) < LARGEST_NUMBER:
            raise UsageError(f"{who}: expected a number below 2^53, got {reprlib.repr(item)}.")
        if isinstance(item, str) and NOT_TEXT.search(item):
            raise UsageError(f"{who}: expected text, got {item!r}.")
        if entity in fixed and item not in fixed[entity]:
            raise UsageError(
                f"{who}: only {' or '.join(fixed[entity])} is read here, got "
                f"{reprlib.repr(item)}. Remove it, or use --modalities."
            )


def _require(asked: Sequence[str], present: Sequence[str], what: str, where: Path) -> None:
    missing = [label for label in asked if label not in present]
    if missing:
        shown = ", ".join(present[:30]) + (", …" if len(present) > 30 else "")
        raise UsageError(
            f"No such {what} in {where}: {', '.join(missing)}. "
            + (f"There are {len(present)}: {shown}." if present else f"It has no {what}s.")
        )


def _describe(settings: Settings) -> str:
    lines = [
        f"  participants: {', '.join(settings.participant_label) or 'all'}",
        f"  sessions: {', '.join(settings.session_label) or 'all'}",
        f"  runs: {', '.join(settings.run_id) or 'all'}",
        f"  modalities: {', '.join(settings.modalities)}",
    ]
    if settings.bids_filters:
        lines.append(f"  --bids-filter-file: {json.dumps(settings.bids_filters)}")
    return "\n".join(lines)


def _any(labels: Sequence[str]) -> str:
    return "|".join(re.escape(label) for label in labels)
