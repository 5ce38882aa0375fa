# SPDX-License-Identifier: Apache-2.0
"""Data sets for other programs, each with its own root: ``--export fmriprep|raw``.

``fmriprep`` is a derivative data set for ``--derivatives``. fMRIPrep and sMRIPrep query it by
subject (and session) and ignore run, acquisition, reconstruction and resolution, so it contains
one T1w per subject (or session), and nothing else that their queries could match.

``raw`` is a raw data set: every restored head as ``rec-brainprior``, and links to the functional
images and fieldmaps of the original.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nibabel.affines import voxel_sizes

from brainprior_bids.anatomy.nifti import open_image
from brainprior_bids.bids.derivatives import (
    BIDS_VERSION,
    INHERITED,
    bids_uri,
    check_output,
    generated_by,
    write_descriptions,
)
from brainprior_bids.bids.files import decoded, read_json, to_json, write_json, write_text
from brainprior_bids.bids.names import BIDSName, output_names
from brainprior_bids.bids.provenance import checksum, sha256_file
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import InputError
from brainprior_bids.records import ExportRecord
from brainprior_bids.settings import FILLED, MODALITIES, OTHER_MODALITIES

FILTER_FILE = PurePosixPath("code/bids_filter.json")
TISSUE_TABLE = (
    "index\tname\tabbreviation\n1\tgrey matter\tGM\n2\twhite matter\tWM\n3\tfluid\tCSF\n"
)
HEAD = (
    "whole head, 1 mm: the restored brain, and outside it the scan, divided by its bias field, "
    "matched in brightness and interpolated"
)
DESCRIPTIONS = {"preproc": HEAD, "brain": "brain mask; the sidecar's Sources lead to its origin"}
OWN_ORIGIN = ("GeneratedBy", "SidecarGeneratedBy", "Digest")
"""Metadata on the provenance of the scan that do not apply to an image made from it."""


def choose_t1w(scans: Sequence[Scan], *, per: str) -> set[str]:
    """Stems of the T1w of each subject, or of each session, that are exported to fMRIPrep: those
    with the smallest longest voxel edge; if equal, the first by name.
    """
    best: dict[tuple[str, str | None], tuple[float, str]] = {}
    for scan in scans:
        if scan.name.suffix != "T1w" or scan.problem is not None:
            continue
        session = scan.name.get("ses") if per == "session" else None
        rank = (_thickest_mm(scan.path), scan.name.stem)
        key = (scan.subject, session)
        best[key] = min(best.get(key, rank), rank)
    return {stem for _, stem in best.values()}


def _thickest_mm(path: Path) -> float:
    try:
        return round(float(voxel_sizes(open_image(path, path.name).affine).max()), 2)
    except Exception:  # any error of nibabel for a broken header: the scan will fail and report it
        return float("inf")


def fmriprep_names(source: BIDSName) -> dict[str, str]:
    """Role -> path in the ``fmriprep`` root; subject and session of the source stay."""
    entities = tuple((key, value) for key, value in source.entities if key in ("sub", "ses"))
    name = BIDSName(entities, "T1w")
    files = {
        "head": name.derivative(desc="preproc"),
        "mask": name.derivative("mask", desc="brain"),
        "dseg": name.derivative("dseg"),
        "dseg_table": name.derivative("dseg", ".tsv"),
        **{t.lower(): name.derivative("probseg", label=t) for t in ("GM", "WM", "CSF")},
    }
    return {role: str(name.folder / "anat" / file) for role, file in files.items()}


def raw_name(source: BIDSName) -> str:
    """Path in the ``raw`` root: ``rec-brainprior``, followed by the source's own ``rec-``."""
    before = source.get("rec")
    label = "brainprior" + (before[:1].upper() + before[1:] if before else "")
    return str(source.folder / "anat" / source.derivative(rec=label))


def prepare(
    exports: Mapping[str, str],
    *,
    bids_dir: Path,
    output_dir: Path,
    raw: Mapping[str, Any],
) -> None:
    """Create the roots and their descriptions.

    Raises
    ------
    UsageError
        If a root contains another program's data set, or cannot be written.
    """
    maker = generated_by()
    licence = {"License": raw["License"]} if raw.get("License") else {}
    name, makers = raw.get("Name", "an unnamed data set"), raw.get("GeneratedBy")
    for kind, root in exports.items():
        folder = Path(root)
        check_output(folder)
        described: dict[str, Any]
        if kind == "fmriprep":
            described = {
                "Name": f"brainprior: restored T1w of {name}, for fMRIPrep",
                "BIDSVersion": BIDS_VERSION,
                "DatasetType": "derivative",
                **licence,
                "GeneratedBy": [maker],
                "SourceDatasets": [{"URL": bids_dir.as_uri()}],
                "DatasetLinks": {"raw": bids_dir.as_uri(), "brainprior": output_dir.as_uri()},
            }
            write_descriptions(folder, DESCRIPTIONS)
        else:
            inherited = {key: value for key, value in raw.items() if key != "GeneratedBy"}
            described = {
                **inherited,
                "Name": f"{name}, with heads restored by brainprior",
                "BIDSVersion": raw.get("BIDSVersion", BIDS_VERSION),
                "DatasetType": "raw",
                "GeneratedBy": [*(makers if isinstance(makers, list) else []), maker],
                "SourceDatasets": [{"URL": bids_dir.as_uri()}],
            }
        write_json(folder / "dataset_description.json", described)
        write_text(
            folder / "README",
            "Written by brainprior for another program; see docs/fmriprep.md of brainprior.\n"
            "The brains in it are estimates under a prior.\n",
        )


def parents(source: BIDSName, image: str) -> dict[str, str]:
    """Role -> path of the sources of an export, in the output folder. If the image is the
    filled-in scan, the 1 mm brain in the head is not a separate output.
    """
    names = output_names(source, n_samples=1, image=image)
    roles = ("mask", "structures") if image in FILLED else ("restored", "mask", "structures")
    return {role: f"{source.folder}/anat/{names[role]}" for role in roles}


def stage_fmriprep(
    staging: Path,
    scan: Scan,
    images: Mapping[str, Path],
    *,
    export: ExportRecord,
    fingerprint: str,
    made_from: Mapping[str, str],
) -> list[str]:
    """Write a subject's files below ``staging``; returns the relative paths.

    Parameters
    ----------
    images : role -> Path
        ``head, mask, dseg, gm, wm, csf``.
    export : ExportRecord
    fingerprint : str
        Fingerprint of the result.
    made_from : role -> path in the output folder
        See ``parents``.
    """
    names = fmriprep_names(scan.name)
    ours = {role: bids_uri(path, dataset="brainprior") for role, path in made_from.items()}
    source = bids_uri(str(scan.relative), dataset="raw")
    head = bids_uri(names["head"])
    mask = bids_uri(names["mask"])
    tissue = {"Sources": [head, mask, ours["structures"]]}
    sides: dict[str, dict[str, Any]] = {
        "head": {
            **{key: scan.metadata[key] for key in INHERITED if key in scan.metadata},
            "Description": HEAD,
            "SkullStripped": False,
            "Sources": [source, *(ours[role] for role in ("restored", "mask") if role in ours)],
            "OutsideGain": export.gain,
            "FeatherMillimetres": export.feather_mm,
            "Fingerprint": fingerprint,
        },
        "mask": {"Description": "brain mask", "Type": "Brain", "Sources": [ours["mask"]]},
        "dseg": {"Description": "likeliest tissue", **tissue},
        **{
            t.lower(): {"Description": f"probability of {t}", **tissue}
            for t in ("GM", "WM", "CSF")
        },
    }
    for role, image in images.items():
        target = staging / names[role]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, target)
        sides[role] |= {"SpatialReference": source, "Checksum": checksum(sha256_file(target))}
    (staging / names["dseg_table"]).write_text(TISSUE_TABLE, encoding="utf-8")
    staged = [names["dseg_table"], *(names[role] for role in images)]
    for role, content in sides.items():
        path = names[role].removesuffix(".nii.gz") + ".json"
        (staging / path).write_text(to_json(content), encoding="utf-8")
        staged.append(path)
    return staged


def stage_raw(
    staging: Path, scan: Scan, head: Path, *, export: ExportRecord, fingerprint: str
) -> list[str]:
    """Write a scan's restored head and its sidecar below ``staging``; returns relative paths."""
    path = raw_name(scan.name)
    target = staging / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(head, target)
    changed = ("SliceThickness", "SpacingBetweenSlices", "SliceTiming", *OWN_ORIGIN)
    content = {
        **{key: value for key, value in scan.metadata.items() if key not in changed},
        "SliceThickness": 1.0,
        "Description": HEAD,
        "OriginalFile": str(scan.relative),
        "OutsideGain": export.gain,
        "Fingerprint": fingerprint,
        "Checksum": checksum(sha256_file(target)),
    }
    side = path.removesuffix(".nii.gz") + ".json"
    (staging / side).write_text(to_json(content), encoding="utf-8")
    return [path, side]


def fmriprep_files(source: BIDSName) -> list[str]:
    """All paths of ``fmriprep_names``, sidecars included."""
    paths = list(fmriprep_names(source).values())
    images = [path for path in paths if path.endswith(".nii.gz")]
    return [*paths, *(path.removesuffix(".nii.gz") + ".json" for path in images)]


def remove_others(root: Path, subject: str, kept: Iterable[str], *, per: str) -> list[str]:
    """Remove files of earlier exports that a query for this subject would match as well.

    Per subject, these are all of the subject's files except ``kept``; per session, those in the
    same folder. Returns the removed paths.
    """
    kept = set(kept)
    folder = (root / next(iter(kept))).parent if per == "session" else root / f"sub-{subject}"
    removed = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_file() and relative not in kept and not path.name.startswith("."):
            path.unlink()
            removed.append(relative)
    return removed


def is_delivered(exports: Mapping[str, str], scan: Scan, fingerprint: str) -> bool:
    """Whether all roots contain the scan's files, and those of this result (by fingerprint)."""
    for kind, root in exports.items():
        paths = fmriprep_files(scan.name) if kind == "fmriprep" else [raw_name(scan.name)]
        if not all((Path(root) / path).is_file() for path in paths):
            return False
        side = Path(root) / (paths[0].removesuffix(".nii.gz") + ".json")
        try:
            recorded = read_json(side).get("Fingerprint")
        except (OSError, ValueError):
            return False
        if recorded != fingerprint:
            return False
    return True


def link_rest(
    root: Path, bids_dir: Path, scans: Sequence[Scan], *, sessions: Sequence[str] = ()
) -> tuple[int, dict[str, str]]:
    """Fill the ``raw`` root with links to all that is not ``anat`` and to what it inherits.

    Links are absolute, so the original data must remain (or be mounted) at the same path. The
    original's ``anat`` images are not linked, because fMRIPrep uses every ``T1w``. Sessions
    without a restored scan are linked too (a head of the first session, functional images of
    all); if ``sessions`` are requested, only these.

    Returns
    -------
    links : int
        Number of files linked.
    problems : subject -> message
        For participants whose links could not be created; the key "" is for the files that all
        participants share. The links of the others are created.
    """
    links, problems = 0, {}
    usable = [scan for scan in scans if scan.problem is None]
    for subject in ("", *sorted({scan.subject for scan in usable})):
        folders = {scan.name.folder for scan in usable if scan.subject == subject}
        try:
            for path in _rest(bids_dir, subject, folders, sessions):
                _link(root / path.relative_to(bids_dir), path)
                links += 1
        except InputError as error:
            problems[subject] = str(error)
        except OSError as error:
            problems[subject] = (
                f"--export raw: {error.filename2 or error.filename} cannot be linked "
                f"({error.strerror}). Remove what is in the way, or give another folder."
            )
    return links, problems


def describe_raw(root: Path, bids_dir: Path) -> None:
    """Write ``participants.tsv`` and the filter file of a ``raw`` root for what is in it."""
    _write_participants(root, bids_dir)
    write_json(root / FILTER_FILE, _filters(root))


def _rest(
    bids_dir: Path, subject: str, folders: set[PurePosixPath], sessions: Sequence[str]
) -> Iterator[Path]:
    """The files to link for one subject with scans in ``folders``, or (subject "") for all."""
    if not subject:
        yield from _inherited(bids_dir)
        return
    for path in (bids_dir / f"sub-{subject}").glob("ses-*"):
        if path.is_dir() and (not sessions or path.name[4:] in sessions):
            folders = {*folders, PurePosixPath(path.relative_to(bids_dir))}
    for folder in sorted({*folders, PurePosixPath(f"sub-{subject}")}):
        yield from _inherited(bids_dir / folder)
    for folder in sorted(folders):
        for datatype in sorted(path for path in (bids_dir / folder).iterdir() if path.is_dir()):
            if datatype.name == "anat" or datatype.name.startswith("ses-"):
                continue
            for path in sorted(datatype.rglob("*")):
                if path.is_file() or path.is_symlink():
                    yield path


def _inherited(folder: Path) -> list[Path]:
    """Files that apply to images below a folder; none of restored heads, which need no others."""
    heads = (*MODALITIES, *OTHER_MODALITIES)
    listed = ("participants.tsv", "dataset_description.json")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".tsv", ".bval", ".bvec")
        and path.is_file()
        and not path.name.startswith(".")
        and path.name not in listed
        and path.stem.rpartition("_")[2] not in (*heads, "scans", "sessions")
    ]


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        if os.readlink(link) == str(target):
            return
    elif link.exists():
        raise InputError(f"--export raw: {link} is in the way. Remove it and run again.")
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    partial.symlink_to(target)
    partial.replace(link)  # another process may be creating the same link


def _write_participants(root: Path, bids_dir: Path) -> None:
    """Write ``participants.tsv`` with the rows of the subjects that are present."""
    table = bids_dir / "participants.tsv"
    if not table.is_file():
        return
    text, _ = decoded(table.read_bytes())
    lines = text.splitlines()
    header, *rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)) or [[]]
    if "participant_id" not in header:
        return
    column = header.index("participant_id")
    present = [row for row in rows if len(row) > column and (root / row[column]).is_dir()]
    stream_out = io.StringIO()
    for row in (header, *present):
        stream_out.write("\t".join(row) + "\n")
    write_text(root / "participants.tsv", stream_out.getvalue())


def _filters(root: Path) -> dict[str, Any]:
    """A filter for ``--bids-filter-file`` that selects only the restored heads."""
    labels: dict[str, set[str]] = {}
    for path in root.glob("sub-*/**/anat/*_rec-brainprior*.nii.gz"):
        name = BIDSName.parse(path.name)
        labels.setdefault(name.suffix.lower(), set()).add(str(name.get("rec")))
    filters = {}
    for key, reconstructions in sorted(labels.items()):
        values = sorted(reconstructions)
        filters[key] = {
            "datatype": "anat",
            "reconstruction": values[0] if len(values) == 1 else values,
        }
    return filters
