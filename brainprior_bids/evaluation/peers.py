# SPDX-License-Identifier: Apache-2.0
"""Run another program on a scan: its command template, its image, its time and memory.

A template is split into words as a shell would, and then the placeholders in each word are
replaced, so that a path with spaces remains one word. No shell is involved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib

from brainprior_bids.anatomy.spaces import check_placed
from brainprior_bids.engine.errors import BrainpriorError, InputError, UsageError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.scans import Volume
from brainprior_bids.evaluation.usage import Usage, Watch

PLACEHOLDERS = {
    "scan": "the degraded scan, a NIfTI file",
    "folder": "an empty folder for what the program writes",
    "output": "the image that the program writes, a .nii.gz in that folder",
    "thickness": "stated slice thickness in mm",
    "spacing": "distance of the slices in mm",
}
NOTE = "finished.json"
"""In the folder of a program that finished; without it, the program runs again."""
LAST_LINES = 8
"""Lines of a failed program's output in the message."""


@dataclass(frozen=True)
class Peer:
    """Another program.

    Attributes
    ----------
    name : str
        Letters, digits and ``. _ + -``.
    command : str
        Template of its command, with ``PLACEHOLDERS`` in braces.
    """

    name: str
    command: str

    @property
    def missing_program(self) -> str | None:
        """The program, if it cannot be found or executed."""
        program = shlex.split(self.command)[0]
        return None if shutil.which(program) else program

    @property
    def names_output(self) -> bool:
        """Whether the template has ``{output}``."""
        return "output" in _placeholders(self.command)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The command with the values of its placeholders."""

        def value(match: re.Match[str]) -> str:
            return str(values[match.group(1)])

        return [_PLACEHOLDER.sub(value, word) for word in shlex.split(self.command)]


_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def _placeholders(command: str) -> list[str]:
    return _PLACEHOLDER.findall(command)


def parse_peers(texts: Sequence[str], reserved: Sequence[str] = ()) -> list[Peer]:
    """The programs of ``--peer NAME=COMMAND``.

    Raises
    ------
    UsageError
        If one is not ``NAME=COMMAND``, its template has no ``{scan}``, an unknown placeholder or
        an unmatched quote, or a name is given twice or is one of ``reserved``.
    """
    peers: list[Peer] = []
    for text in texts:
        peer = _parse(text)
        if peer.name in (*reserved, *(other.name for other in peers)):
            raise UsageError(f"--peer: {peer.name} is the name of another method. Choose another.")
        peers.append(peer)
    return peers


def _parse(text: str) -> Peer:
    name, _, command = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", name) or not command.strip():
        raise UsageError(
            f"--peer: expected NAME=COMMAND, with a name of letters, digits and . _ + -, got "
            f"{text!r}."
        )
    try:
        shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--peer {name}: {error} in {command!r}. Check the quotes.") from error
    names = _placeholders(command)
    unknown = [f"{{{key}}}" for key in names if key not in PLACEHOLDERS]
    if unknown or "scan" not in names:
        known = ", ".join(f"{{{key}}} ({meaning})" for key, meaning in PLACEHOLDERS.items())
        reason = f"does not know {unknown[0]}" if unknown else "needs {scan}"
        raise UsageError(f"--peer {name}: the command {reason}. Placeholders: {known}.")
    return Peer(name, command)


def run_peer(
    peer: Peer, scan: Path, folder: Path, *, thickness_mm: float, spacing_mm: float, limit_s: float
) -> tuple[Path, Usage]:
    """Run the program, unless it finished in this folder before.

    Parameters
    ----------
    scan : Path
        The degraded scan.
    folder : Path
        For its image (in ``output``), its messages (``log.txt``) and a note when it finished.
    thickness_mm, spacing_mm : float
        For the template.
    limit_s : float
        The program and its children are killed after this time.

    Returns
    -------
    Path, Usage
        The image.

    Raises
    ------
    BrainpriorError
        If it fails, exceeds the limit, or does not write exactly one image; the message has the
        last lines of its output.
    """
    note, output = folder / NOTE, folder / "output"
    named = output / "output.nii.gz" if peer.names_output else None
    if not note.is_file():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        values = {
            "scan": scan.absolute(),
            "folder": output.absolute(),
            "output": named and named.absolute(),
            "thickness": f"{thickness_mm:g}",
            "spacing": f"{spacing_mm:g}",
        }
        usage = _run(peer.name, peer.words(values), folder / "log.txt", limit_s)
        _one_image(peer.name, output, named, folder / "log.txt")
        note.write_text(json.dumps(asdict(usage)), encoding="utf-8")
    usage = Usage(**json.loads(note.read_text(encoding="utf-8")))
    return _one_image(peer.name, output, named, folder / "log.txt"), usage


def _run(name: str, words: Sequence[str], log: Path, limit_s: float) -> Usage:
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BrainpriorError(f"{name} could not be started: {error}") from error
        with Watch(process.pid) as watch:
            try:
                process.wait(timeout=limit_s)
                reason = f"exited with status {process.returncode}" if process.returncode else ""
            except subprocess.TimeoutExpired:
                reason = f"was stopped after {limit_s / 60:g} minutes (--peer-timeout)"
            finally:
                _end(process)
    if reason:
        raise BrainpriorError(f"{name} {reason}:{_tail(log)}")
    return watch.usage


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and its children, if any are left, also after an interrupt."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _one_image(name: str, output: Path, named: Path | None, log: Path) -> Path:
    paths = [named] if named else sorted([*output.rglob("*.nii"), *output.rglob("*.nii.gz")])
    paths = [path for path in paths if path.is_file()]
    if len(paths) != 1:
        listed = ", ".join(path.name for path in paths) or "none"
        raise BrainpriorError(
            f"{name} ended without an error, but one image is expected in its folder, found: "
            f"{listed}.{_tail(log)}"
        )
    return paths[0]


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return "".join(f"\n    {line[-200:]}" for line in lines)


def read_peer_image(path: Path, who: str) -> Volume:
    """The image that a program wrote, as float32.

    Raises
    ------
    InputError
        If it cannot be read, or is not one 3-D image.
    GeometryError
        If its header does not state its position.
    """
    try:
        image = nib.squeeze_image(nib.load(path))
        data = image.get_fdata(dtype="float32")
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{who}: {path.name} cannot be read: {error}") from error
    if data.ndim != 3:
        raise InputError(f"{who}: expected one 3-D image, got shape {data.shape}.")
    check_placed(image, f"{who}, {path.name}")
    return Volume(data, Grid(data.shape, image.affine))
