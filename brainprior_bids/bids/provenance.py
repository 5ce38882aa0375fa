# SPDX-License-Identifier: Apache-2.0
"""Provenance of a result: hashes, settings, software, and the parameters that were used.

Files and fields are named as in the draft of BIDS-Prov (BEP028; docs/decisions/provenance.md
states which version): ``prov/prov-<label>_<record>.json`` with the records ``act`` (activities),
``io`` (files and their SHA-256), ``soft`` (software) and ``env`` (machine and packages), and
``prov/provenance.tsv``, which describes every label. A run writes ``soft`` and ``env`` once; each
finished scan writes its own ``act`` and ``io``, and the sidecar of every image names the activity
that wrote the image. ``data/schemas/<record>.schema.json`` specifies every field.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from brainprior_bids import __version__
from brainprior_bids.bids.derivatives import bids_uri, container
from brainprior_bids.bids.files import read_json, to_json, write_json, write_text_at_last
from brainprior_bids.bids.fingerprint import code_version
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.query import Scan
from brainprior_bids.records import NodeRecord, StepRecords, TemplateRecord, WeightsRecord
from brainprior_bids.settings import TASKS, Settings

if TYPE_CHECKING:
    from brainprior_bids.anatomy.contrasts import ContrastMotion

PACKAGES = (
    "torch", "numpy", "scipy", "nibabel", "nipype", "pybids", "SimpleITK", "torch-interpol",
    "safetensors", "matplotlib", "antspyx", "niworkflows", "nireports", "nilearn",
)  # fmt: skip
"""Packages whose version can change a result."""

SHA256 = "spdx:checksumAlgorithm_sha256"
"""Name of the algorithm in the records."""

FILES_RECORDS = ("io", "ent")
"""Names of the records that list files: the present one, and that of earlier versions."""


def new_run_uuid() -> str:
    """Time and a random part: unique, and sorted by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}_{uuid.uuid4()}"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def label(*parts: str) -> str:
    """A BIDS label: letters and digits only."""
    return "".join(re.sub(r"[^a-zA-Z0-9]", "", part) for part in parts)


def activity_id(kind: str, fingerprint: str) -> str:
    """Identifier of an activity: ``restore`` or ``align``, and the hash of its inputs.

    It does not depend on the run, because sidecars contain it: the same command with the same
    data writes the same sidecars.
    """
    return f"bids::prov#{kind}-{fingerprint[:12]}"


def checksum(digest: str) -> list[dict[str, str]]:
    """A SHA-256 as the records and sidecars contain it."""
    return [{"ChecksumAlgorithm": SHA256, "ChecksumValue": digest}]


def file_provenance(activity: str, digest: str) -> dict[str, Any]:
    """The provenance in the sidecar of a file."""
    return {"GeneratedBy": [activity], "Checksum": checksum(digest)}


def recorded_sha256(content: Mapping[str, Any]) -> str | None:
    """The SHA-256 in a sidecar or in the entry of a file; None if it has none.

    The earlier forms are ``Digest: {sha256: ...}`` in records and ``SHA256`` in sidecars.
    """
    for entry in content.get("Checksum", ()):
        if entry["ChecksumAlgorithm"] == SHA256:
            return str(entry["ChecksumValue"])
    before = content.get("Digest", {}).get("sha256") or content.get("SHA256")
    return None if before is None else str(before)


def write_run(settings: Settings) -> list[Path]:
    """Write the run's software and environment records, and its settings."""
    run = label(settings.run_uuid)
    software = {
        "Software": [
            {
                "Id": f"bids::prov#software-{run}",
                "Label": "brainprior",
                "Version": __version__,
                "CodeVersion": code_version(),
            }
        ]
    }
    environment = {
        "Environments": [
            {
                "Id": f"bids::prov#environment-{run}",
                "Label": "machine",
                "OperatingSystem": platform.platform(),
                "Dependencies": {
                    "python": platform.python_version(),
                    **{name: _version(name) for name in PACKAGES},
                },
                "Architecture": platform.machine(),
                "Processors": os.cpu_count(),
                "Threads": settings.omp_nthreads,
                "Device": settings.device,
                "Container": container(),
                **gpu_facts(settings.device),
            }
        ]
    }
    return [
        write_json(run_path(settings), software),
        write_json(run_path(settings).with_name(f"prov-{run}_env.json"), environment),
    ]


def run_path(settings: Settings) -> Path:
    """Path of the run's software record."""
    return settings.output_dir / "prov" / f"prov-{label(settings.run_uuid)}_soft.json"


def gpu_facts(device: str) -> dict[str, Any]:
    """Name, driver and CUDA of the GPU that a run uses; nothing on the CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        match = re.search(r"Kernel Module\D*([\d.]+)", text)
        driver = match[1] if match else "unknown"
    except OSError:  # not visible in this container
        driver = "unknown"
    return {
        "GPU": torch.cuda.get_device_name(device),
        "Driver": driver,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


@dataclass(frozen=True)
class Verified:
    """The result of ``brainprior verify``.

    Attributes
    ----------
    changes : address -> ``changed`` or ``missing``
        Outputs by their path from the output folder, other files by their ``bids:`` address.
    outputs, inputs : int
        Files whose hash was recomputed, or that are missing.
    out_of_reach : tuple of str
        Inputs in data sets that are not where ``DatasetLinks`` says.
    """

    changes: dict[str, str]
    outputs: int
    inputs: int
    out_of_reach: tuple[str, ...]


def verify_records(output_dir: Path) -> Verified:
    """Compare outputs, and reachable inputs, with their recorded SHA-256.

    If a scan was processed more than once, its newest record is used.
    """
    outputs: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for entry in _recorded_files(output_dir):
        digest = str(recorded_sha256(entry))
        if "GeneratedBy" in entry:
            outputs[entry["AtLocation"]] = digest
        elif re.match(BIDS_ADDRESS, entry["Id"]):
            inputs[entry["Id"]] = digest
    files = {path: (output_dir / path, digest) for path, digest in sorted(outputs.items())}
    roots = _linked(output_dir)
    away = []
    for address, digest in sorted(inputs.items()):
        name, path = re.match(BIDS_ADDRESS, address).groups()  # type: ignore[union-attr]
        if name in roots:
            files[address] = (roots[name] / path, digest)
        else:
            away.append(address)
    changes = {}
    for address, (file, digest) in files.items():
        if not file.is_file():
            changes[address] = "missing"
        elif sha256_file(file) != digest:
            changes[address] = "changed"
    return Verified(changes, len(outputs), len(inputs) - len(away), tuple(away))


def _recorded_files(output_dir: Path) -> Iterator[dict[str, Any]]:
    """The entries of all files in all records, older records first."""
    folder = output_dir / "prov"
    paths = [path for record in FILES_RECORDS for path in folder.glob(f"prov-*_{record}.json")]
    for path in sorted(paths):  # names begin with the time
        content = read_json(path)
        # "Entities" was the name in earlier versions
        yield from content.get("Files", content.get("Entities", ()))


def verify_export(root: Path) -> Verified:
    """As ``verify_records``, for a data set of ``--export``: its sidecars have the hashes."""
    changes = {}
    outputs = 0
    for side in sorted(root.glob("sub-*/**/*.json")):
        digest = None if side.is_symlink() else recorded_sha256(read_json(side))
        if digest is None:  # a link is a file of the raw data
            continue
        outputs += 1
        image = side.with_suffix(".txt" if side.stem.endswith("_xfm") else ".nii.gz")
        address = image.relative_to(root).as_posix()
        if not image.is_file():
            changes[address] = "missing"
        elif sha256_file(image) != digest:
            changes[address] = "changed"
    return Verified(changes, outputs, 0, ())


BIDS_ADDRESS = r"bids:([a-zA-Z0-9]+):(.+)"
"""A file in another data set: its name among the ``DatasetLinks``, its path."""


def _linked(output_dir: Path) -> dict[str, Path]:
    """Name -> root of the linked data sets that exist."""
    description = output_dir / "dataset_description.json"
    links = read_json(description).get("DatasetLinks", {}) if description.is_file() else {}
    roots = {
        name: Path(unquote(urlsplit(link).path))
        for name, link in links.items()
        if link.startswith("file://")
    }
    return {name: root for name, root in roots.items() if root.is_dir()}


def scan_records(
    scan: Scan,
    *,
    run_uuid: str,
    activity: str,
    command: list[str],
    settings: Mapping[str, Any],
    seed: int,
    input_sha256: str,
    outputs: Iterable[tuple[str, str, str]],
    steps: StepRecords,
    nodes: Sequence[NodeRecord],
    warnings: Sequence[str],
) -> dict[str, str]:
    """File name -> text of one scan's records of the activity and of its files.

    Parameters
    ----------
    activity : str
        Identifier of the activity.
    outputs : (label, path from the output folder, SHA-256)
    steps : StepRecords
        The records of the nodes.
    nodes : sequence of NodeRecord
        Time and memory of every node.
    """
    run = label(run_uuid)
    name = label(result_name(scan.name, TASKS[settings["task"]]))
    source = bids_uri(str(scan.relative), dataset="raw")
    given, networks = steps.every_file, steps.networks
    unit = steps.restore.unit
    starts = sorted(node.started for node in nodes if node.started is not None)
    act = {
        "Activities": [
            {
                "Id": activity,
                "Label": f"restore {scan.name.stem}",
                "Command": shlex.join(command),
                "AssociatedWith": [f"bids::prov#software-{run}"],
                "Used": [
                    source,
                    *(file.uri for file in given.values()),
                    *(_weights_id(kind, card) for kind, card in networks.items()),
                    *(_template_id(template) for template in steps.templates),
                    f"bids::prov#environment-{run}",
                ],
                **({"StartedAtTime": starts[0]} if starts else {}),
                "EndedAtTime": datetime.now(UTC).isoformat(timespec="seconds"),
                "RunUUID": run_uuid,
                "Arguments": command,
                "Settings": dict(settings),
                "RandomSeed": settings.get("random_seed"),
                "ScanSeed": seed,
                # the engine's unit and back: no offset
                "IntensityMap": {"Scale": 1 / unit, "InverseScale": unit} if unit else None,
                "Conform": steps.conform.to_json(),
                "Parcellation": steps.parcellation.to_json(),
                "Bias": None if steps.bias is None else steps.bias.to_json(),
                "Affine": steps.affine.to_json(),
                "Lesion": None if steps.lesion is None else steps.lesion.to_json(),
                "Restore": steps.restore.to_json(),
                "Templates": [template.to_json() for template in steps.templates],
                "Nodes": [node.to_json() for node in nodes],
                "Warnings": list(warnings),
            }
        ]
    }
    files = [
        *_scan_inputs(scan, input_sha256, steps),
        *(_output(role, path, activity, digest) for role, path, digest in outputs),
    ]
    return {
        f"prov-{run}{name}_act.json": to_json(act),
        f"prov-{run}{name}_io.json": to_json({"Files": files}),
    }


def contrast_records(
    title: str,
    settings: Settings,
    *,
    activity: str,
    began: datetime,
    inputs: Mapping[str, str],
    outputs: Iterable[tuple[str, str]],
    motion: ContrastMotion,
) -> dict[str, str]:
    """File name -> text of the records of one contrast's alignment and of its files.

    Parameters
    ----------
    title : str
        Name of the contrast's result.
    activity : str
        Identifier of the activity.
    began : datetime
        When it began.
    inputs : path from the output folder -> SHA-256
    outputs : (path from the output folder, SHA-256)
    """
    run = label(settings.run_uuid)
    name = f"{label(title)}Contrast"
    act = {
        "Activities": [
            {
                "Id": activity,
                "Label": f"align {title}",
                "Command": shlex.join(settings.command),
                "AssociatedWith": [f"bids::prov#software-{run}"],
                "Used": [bids_uri(path) for path in inputs],
                "StartedAtTime": began.isoformat(timespec="seconds"),
                "EndedAtTime": datetime.now(UTC).isoformat(timespec="seconds"),
                "RunUUID": settings.run_uuid,
                "ToReference": motion.to_reference.tolist(),
                "Shared": motion.shared,
                "Alike": motion.alike,
            }
        ]
    }
    files = [_output(PurePosixPath(path).name, path, activity, digest) for path, digest in outputs]
    return {
        f"prov-{run}{name}_act.json": to_json(act),
        f"prov-{run}{name}_io.json": to_json({"Files": files}),
    }


def write_provenance_table(output_dir: Path) -> None:
    """Write ``prov/provenance.tsv``, which describes every label of the records.

    It is derived from the existing records, so that several processes may share an output folder;
    records do not change, so the rows of an earlier table are kept.
    """
    folder = output_dir / "prov"
    table = folder / "provenance.tsv"
    names = sorted({path.name.partition("_")[0] for path in folder.glob("prov-*_*.json")})
    if not names:
        return
    earlier = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    descriptions = {line.partition("\t")[0]: line.partition("\t")[2] for line in earlier}
    rows = [f"{name}\t{descriptions.get(name) or _meaning(folder, name)}" for name in names]
    write_text_at_last(table, "\n".join(["provenance_id\tdescription", *rows]) + "\n")


def _meaning(folder: Path, name: str) -> str:
    """Description of a label, from its records."""
    activities, software = folder / f"{name}_act.json", folder / f"{name}_soft.json"
    try:
        if software.is_file():
            version_of = read_json(software)["Software"][0]["Version"]
            return f"software and environment of a run of brainprior {version_of}"
        return str(read_json(activities)["Activities"][0]["Label"])
    except (OSError, ValueError, LookupError):  # removed meanwhile, or not written by brainprior
        return "n/a"


def _scan_inputs(scan: Scan, input_sha256: str, steps: StepRecords) -> list[dict[str, Any]]:
    """The entries of the input files of a scan's result, the scan first."""
    files: list[dict[str, Any]] = [
        {
            "Id": bids_uri(str(scan.relative), dataset="raw"),
            "Label": scan.relative.name,
            "AtLocation": str(scan.relative),
            "Checksum": checksum(input_sha256),
        }
    ]
    for role, file in steps.every_file.items():
        files.append({"Id": file.uri, "Label": role, "Checksum": checksum(str(file.sha256))})
    for kind, card in steps.networks.items():
        files.append(
            {
                "Id": _weights_id(kind, card),
                "Label": f"weights: {card.name}",
                "License": card.licence,
                "TrainingData": card.training_data,
                "Checksum": checksum(str(card.sha256)),
            }
        )
    for template in steps.templates:
        files.append(
            {
                "Id": _template_id(template),
                "Label": f"template: {template.address}",
                "Checksum": checksum(str(template.image_sha256)),
            }
        )
    return files


def _output(label: str, path: str, activity: str, digest: str) -> dict[str, Any]:
    """The entry of a file that an activity wrote."""
    return {
        "Id": bids_uri(path),
        "Label": label,
        "AtLocation": path,
        **file_provenance(activity, digest),
    }


def _weights_id(kind: str, card: WeightsRecord) -> str:
    return f"bids::prov#entity-weights-{kind}-{str(card.sha256)[:12]}"


def _template_id(template: TemplateRecord) -> str:
    return f"bids::prov#entity-template-{template.space}-{str(template.image_sha256)[:12]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
