# SPDX-License-Identifier: Apache-2.0
"""Which scans were asked for, and what their sidecars say.

pybids reads the names and answers the query; it is shown only the images in the ``anat`` folders
of the requested subjects and sessions, so a large data set costs what was asked of it. Sidecars
are read here, by the inheritance principle of BIDS, for the scans that were found: pybids does
it for every file of its index, which takes most of its time. Nothing is written to the data set:
the index lives in memory.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from brainprior_bids.bids.files import read_json
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.engine.errors import InputError, UsageError
from brainprior_bids.settings import MODALITIES, OTHER_MODALITIES, Settings

LOG = logging.getLogger("brainprior")
EXTENSIONS = (".nii", ".nii.gz")
FOREIGN = {"bold", "sbref", "fmap", "roi", "dwi", "asl"}
"""Keys of ``--bids-filter-file`` that fMRIPrep and its kin know."""
DERIVED = ("space", "res", "desc")
"""Entities of derivatives: ours replace them, so that two results would have one name."""


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
        Its name taken apart.
    metadata : mapping
        Of every sidecar that applies, by BIDS inheritance.
    problem : str or None
        Why it cannot be processed, where that is known without opening it.
    runs : tuple of Scan
        With ``--fuse``: the scans that are fused, the reference first; empty otherwise.
    """

    path: Path
    relative: PurePosixPath
    name: BIDSName
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    runs: tuple[Scan, ...] = ()

    @property
    def subject(self) -> str:
        """Label without ``sub-``."""
        return str(self.name.get("sub"))

    @property
    def contrast(self) -> str:
        """What the network is told: ``T1w``, ``T2w``, ``FLAIR`` or ``unknown``."""
        return self.name.suffix if self.name.suffix in ("T1w", "T2w", "FLAIR") else "unknown"


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
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{bids_dir} has no dataset_description.json, so it is not the root of a BIDS data "
            'set. Give the root, or write the file: {"Name": "…", "BIDSVersion": "1.10.0"}.'
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}). Check its permissions."
        ) from (error)
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Repair it.") from error
    if not isinstance(description, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(description).__name__}.")
    makers = description.get("GeneratedBy")
    makers = makers if isinstance(makers, list) else []
    if any(isinstance(maker, dict) and maker.get("Name") == "brainprior" for maker in makers):
        raise UsageError(
            f"bids_dir {bids_dir} was made by brainprior: what it restored is no measurement, and "
            "is not restored again. Give the raw data set."
        )
    return description


def list_subjects(bids_dir: Path) -> list[str]:
    """Labels of the ``sub-`` folders, sorted."""
    return sorted(
        entry.name[4:]
        for entry in bids_dir.iterdir()
        if entry.name.startswith("sub-") and entry.is_dir()
    )


def find_scans(settings: Settings) -> list[Scan]:
    """Every scan that was asked for, sorted by path.

    Raises
    ------
    UsageError
        An unknown label, a filter that pybids does not know, a sidecar that is not JSON, or
        nothing found; the message prints what is there, or the filters in force.
    """
    present = list_subjects(settings.bids_dir)
    _require(settings.participant_label, present, "participant", settings.bids_dir)
    subjects = sorted(settings.participant_label or present)
    sessions = sorted(
        {
            entry.name[4:]
            for subject in subjects
            for entry in (settings.bids_dir / f"sub-{subject}").glob("ses-*")
            if entry.is_dir()
        }
    )
    _require(settings.session_label, sessions, "session", settings.bids_dir)

    layout = _index(
        settings.bids_dir,
        settings.participant_label,
        settings.session_label,
        database_dir=settings.bids_database_dir,
        metadata=_asks_metadata(settings),
    )
    sidecars = Sidecars(settings.bids_dir)
    found: dict[Path, Mapping[str, Any]] = {}
    for suffix in settings.modalities:
        query = _query(settings, suffix)
        try:
            files = layout.get(**query, invalid_filters="error")
        except ValueError as error:
            raise UsageError(
                f"--bids-filter-file: the filter for {suffix} cannot be used: "
                f"{str(error).partition(' If you')[0]}"  # pybids goes on to its own arguments
            ) from error
        for file in files:
            found[Path(file.path)] = sidecars.metadata(Path(file.path))
    scans = _scans(settings.bids_dir, found)
    if not scans:
        raise UsageError(
            f"No scan in {settings.bids_dir} matches. Filters in force:\n{_describe(settings)}\n"
            "Widen one of them, or check the file names."
        )
    return scans


def _scans(bids_dir: Path, found: Mapping[Path, Mapping[str, Any]]) -> list[Scan]:
    scans: dict[str, Scan] = {}
    for path in sorted(found):
        relative = PurePosixPath(path.relative_to(bids_dir))
        problem = None
        try:
            name = BIDSName.parse(relative)
        except InputError as error:
            name, problem = BIDSName.repaired(relative), str(error)
        if name.get("part") not in (None, "mag"):  # phase, real, imaginary: no brain picture
            continue
        if not path.exists() and not path.is_symlink():
            problem = (
                f"{name.stem}: the file is gone since --bids-database-dir was made. "
                "Remove that folder and run again."
            )
        elif not path.exists():
            problem = (
                f"{name.stem}: the file is a link whose content is not here. "
                "Fetch it (datalad get, or git annex get) and run again."
            )
        added = [f"{key}-" for key in DERIVED if name.get(key) is not None]
        if added:
            problem = (
                f"{name.stem}: a raw scan has no {', '.join(added)} in its name. Give raw data; "
                "another tool's image goes with --task refine and --derivatives."
            )
        if name.stem in scans:
            twin = scans[name.stem]
            problem = (
                f"{name.stem}: two files are this scan ({twin.relative} and {relative}). "
                "Remove one of them."
            )
        scans[name.stem] = Scan(path, relative, name, dict(found[path]), problem)
    return list(scans.values())


def _index(
    bids_dir: Path,
    subjects: Sequence[str],
    sessions: Sequence[str],
    *,
    database_dir: Path | None = None,
    metadata: bool = False,
) -> Any:
    """A pybids layout of the images in the ``anat`` folders of these subjects (empty: all).

    With ``metadata`` a query may use the sidecars' fields. With ``database_dir`` the index of the
    whole data set, metadata included, is kept there, or read from there.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # pybids matches files too: the sidecars above an anat folder have to pass
    ignore = [
        r"^/(?!sub-)[^/]+(?<!\.json)$",
        r"^/sub-[^/]+/(?:ses-[^/]+/)?(?!ses-|anat(?:/|$))[^/]+(?<!\.json)$",
    ]
    if database_dir is not None:
        subjects, sessions, metadata = (), (), True
    if not metadata:
        ignore.append(r"\.json$")
    if subjects:
        ignore.append(rf"^/sub-(?!(?:{_any(subjects)})(?:/|$))")
    if sessions:
        ignore.append(rf"^/sub-[^/]+/ses-(?!(?:{_any(sessions)})(?:/|$))")
    indexer = BIDSLayoutIndexer(
        validate=False, ignore=[re.compile(patt) for patt in ignore], index_metadata=metadata
    )
    arguments: dict[str, Any] = {"validate": False}
    if database_dir is not None and (database_dir / "layout_index.sqlite").exists():
        arguments["database_path"] = str(database_dir)
    elif database_dir is not None:
        database_dir.mkdir(parents=True, exist_ok=True)
        arguments.update(database_path=str(database_dir), indexer=indexer)
    else:
        arguments["indexer"] = indexer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pybids' own deprecations; nothing a user can act on
        try:
            layout = BIDSLayout(str(bids_dir), **arguments)
        except OSError as error:  # pybids wraps a JSON decoding error so, naming the file
            raise UsageError(
                f"{bids_dir} cannot be indexed: {error} Repair or remove the file."
            ) from error
        except ValueError as error:
            raise UsageError(
                f"--bids-database-dir {database_dir} cannot be used for {bids_dir}: {error} "
                "Remove that folder, and it is made anew."
            ) from error
    if Path(layout.root).resolve() != bids_dir.resolve():
        raise UsageError(
            f"--bids-database-dir {database_dir} is the index of {layout.root}, not of "
            f"{bids_dir}. Use another folder."
        )
    return layout


class Sidecars:
    """Reads sidecars by the inheritance principle: from the root down, the nearest wins.

    A JSON file applies to an image below it that has its suffix and all of its entities. Every
    folder is listed once, and every file is read once.
    """

    def __init__(self, bids_dir: Path) -> None:
        self._root = bids_dir
        self._folders: dict[Path, dict[str, list[tuple[Path, dict[str, str]]]]] = {}
        self._contents: dict[Path, dict[str, Any]] = {}

    def metadata(self, image: Path) -> dict[str, Any]:
        """What all sidecars of an image say together.

        Raises
        ------
        UsageError
            If one of them cannot be read or does not hold a JSON object.
        """
        suffix, entities = _taken_apart(image)
        merged: dict[str, Any] = {}
        for folder in reversed(image.relative_to(self._root).parents):
            for path, needed in self._listed(self._root / folder).get(suffix, ()):
                if needed.items() <= entities.items():
                    merged.update(self._read(path))
        return merged

    def _listed(self, folder: Path) -> dict[str, list[tuple[Path, dict[str, str]]]]:
        """Suffix -> sidecars in a folder, the most general first."""
        if folder not in self._folders:
            listed: dict[str, list[tuple[Path, dict[str, str]]]] = {}
            for path in sorted(folder.glob("*.json")):
                suffix, entities = _taken_apart(path)
                listed.setdefault(suffix, []).append((path, entities))
            for sidecars in listed.values():
                sidecars.sort(key=lambda item: len(item[1]))
            self._folders[folder] = listed
        return self._folders[folder]

    def _read(self, path: Path) -> dict[str, Any]:
        if path not in self._contents:
            try:
                self._contents[path] = read_json(path)
            except OSError as error:
                raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
            except ValueError as error:
                raise UsageError(
                    f"{path} is not a sidecar ({error}). Repair or remove the file."
                ) from error
        return self._contents[path]


def _taken_apart(path: Path) -> tuple[str, dict[str, str]]:
    """Suffix and entities of a name; ``run-01`` is ``run-1``."""
    *pairs, suffix = path.name.partition(".")[0].split("_")
    entities = dict(pair.partition("-")[::2] for pair in pairs)
    if entities.get("run", "").isdigit():
        entities["run"] = str(int(entities["run"]))
    return suffix, entities


def _asks_metadata(settings: Settings) -> bool:
    """Whether a filter names something that does not stand in a file's name."""
    from bids.layout import Config

    asked = {key for query in settings.bids_filters.values() for key in query}
    return not asked <= set(Config.load("bids").entities)


def _query(settings: Settings, suffix: str) -> dict[str, Any]:
    from bids.layout import Query

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
    for entity, value in settings.bids_filters.get(suffix, {}).items():
        if isinstance(value, list):
            query[entity] = [words.get(item, item) for item in value]
        else:
            query[entity] = words.get(value, value)
    return query


def read_filters(path: Path, modalities: Iterable[str]) -> dict[str, Any]:
    """``--bids-filter-file``: ``{"t1w": {"acquisition": "mprage", "session": null}}``.

    Returns
    -------
    suffix -> {pybids entity -> value}; null means "the entity is absent", "*" "it is present",
    alone or in a list. Keys that fMRIPrep knows and this does not, and those of modalities that
    were not asked for, are passed over: one file may serve several programs.

    Raises
    ------
    UsageError
        If the file is missing, is not JSON, or has a key that none of them knows.
    """
    try:
        filters = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--bids-filter-file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"--bids-filter-file {path} is not valid JSON ({error}).") from error
    by_key = {suffix.lower(): suffix for suffix in modalities}
    others = {suffix.lower() for suffix in (*MODALITIES, *OTHER_MODALITIES)} - set(by_key)
    if not isinstance(filters, dict) or not all(isinstance(v, dict) for v in filters.values()):
        raise UsageError(
            f"--bids-filter-file {path}: expected an object of objects, such as "
            '{"t1w": {"acquisition": "mprage"}}.'
        )
    idle = sorted(key for key in filters if key.lower() in others | FOREIGN)
    if idle:
        LOG.info("--bids-filter-file: %s: of no use here", ", ".join(idle))
        filters = {key: value for key, value in filters.items() if key not in idle}
    unknown = sorted(key for key in filters if key.lower() not in by_key)
    if unknown:
        raise UsageError(
            f"--bids-filter-file {path}: unknown key {', '.join(unknown)}; "
            f"known are {', '.join(by_key)} (set by --modalities)."
        )
    return {by_key[key.lower()]: value for key, value in filters.items()}


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
