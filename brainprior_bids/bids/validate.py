# SPDX-License-Identifier: Apache-2.0
"""The BIDS validator, applied to the requested part only.

The validator reads a whole data set. Therefore it runs on a folder of links: to the files of the
root (whose metadata are inherited) and to the ``anat`` folders of the requested subjects. Errors
elsewhere in the data set do not affect this run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from brainprior_bids.bids.query import Scan


@dataclass(frozen=True)
class Issue:
    """One finding of the validator."""

    code: str
    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} {self.location} {self.message}".rstrip()


def find_validator() -> str | None:
    """The command ``bids-validator-deno``, next to this Python or on the path; None if absent."""
    neighbour = Path(sys.executable).with_name("bids-validator-deno")
    return str(neighbour) if neighbour.exists() else shutil.which("bids-validator-deno")


def validate(root: Path, *, command: str) -> list[Issue]:
    """Errors (not warnings) that the validator finds in ``root``.

    Raises
    ------
    RuntimeError
        If the validator itself fails.
    """
    result = subprocess.run(
        [command, "--format", "json", "--ignoreWarnings", str(root)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        issues = json.loads(result.stdout)["issues"]["issues"]
    except (ValueError, KeyError):
        raise RuntimeError(
            f"bids-validator-deno gave no result: {result.stderr.strip()[-500:]}"
        ) from None
    return [
        Issue(
            " ".join(filter(None, (item["code"], item.get("subCode")))),
            item.get("location", ""),
            " ".join(item.get("issueMessage", "").split()),
        )
        for item in issues
        if item.get("severity") == "error"
    ]


def validate_scans(
    bids_dir: Path, scans: Iterable[Scan], *, command: str, scratch: Path
) -> list[Issue]:
    """``validate`` on the root's files and the ``anat`` folders of ``scans``.

    Sidecars above those folders may belong to images that are not linked (functional ones, those
    of other participants): that their images are missing is not an error.
    """
    folders = sorted({scan.relative.parent for scan in scans})
    with tempfile.TemporaryDirectory(prefix="validate-", dir=scratch) as name:
        view = Path(name)
        for entry in bids_dir.iterdir():
            # participants.tsv lists participants that are not linked, and other tables and
            # gradients at the root belong to images that are not
            other = entry.suffix in (".tsv", ".bval", ".bvec") or entry.name.startswith(
                (".", "participants.")
            )
            if entry.is_file() and (not other or entry.name == ".bidsignore"):
                (view / entry.name).symlink_to(entry)
        for folder in folders:
            if not (bids_dir / folder).is_dir():  # a name that is not text
                continue
            target = view / folder
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(bids_dir / folder)
            # sidecars between the root and the scan take part in inheritance
            for parent in (p for p in folder.parents if p.name):
                for sidecar in (bids_dir / parent).glob("*.json"):
                    link = view / parent / sidecar.name
                    if not link.exists():
                        link.symlink_to(sidecar)
        inside = tuple(f"/{folder}/" for folder in folders)
        return [
            issue
            for issue in validate(view, command=command)
            if issue.code != "SIDECAR_WITHOUT_DATAFILE" or issue.location.startswith(inside)
        ]
