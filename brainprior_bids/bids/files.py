# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files, and reading of text in other encodings."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from brainprior_bids.engine.errors import is_full

MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
"""Byte order marks of text files, and the encoding that each announces."""
LISTED = 10
"""Maximum number of file names in one message."""
OWNER = "BRAINPRIOR_OWNER"
"""Environment variable: the run to which the temporary files of a process and its workers
belong."""
TEMPORARY = re.compile(r"\.(?:.*\.)?brainprior-(?:[a-z]+-)?([0-9]+x[0-9a-f]{12})\.[a-z0-9_]{8}")
"""The name of a temporary file or folder; the group is its owner."""


def become_owner() -> str:
    """Make this process the owner of the temporary files that it and its workers write.

    Workers inherit the name with the environment. A step that a scheduler starts without the
    environment has no owner: it is unknown whether its files are still in use, so they are kept.
    """
    if not os.environ.get(OWNER, "").startswith(f"{os.getpid()}x"):
        os.environ[OWNER] = f"{os.getpid()}x{secrets.token_hex(6)}"
    return os.environ[OWNER]


def temporary_folder(what: str, parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder on the file system of ``parent``, removed at the end of the block."""
    return tempfile.TemporaryDirectory(
        prefix=f".brainprior-{what}-{_owner()}.", dir=parent, ignore_cleanup_errors=True
    )


def _owner() -> str:
    return os.environ.get(OWNER, "unowned")


@contextmanager
def reserved(folder: Path, size: int) -> Iterator[None]:
    """Reserve ``size`` bytes and one file for what has to be written after this block.

    Raises
    ------
    OSError
        If there is not enough space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".reserve.brainprior-{_owner()}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(os.urandom(size))  # zeros would take no space on some file systems
            stream.flush()
            os.fsync(stream.fileno())
        yield
    finally:
        Path(name).unlink(missing_ok=True)


def to_json(value: Mapping[str, Any]) -> str:
    """Readable JSON; NumPy numbers and arrays, paths and tuples become plain JSON.

    NaN and infinities become null, because JSON cannot represent them.
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def write_text(path: Path, text: str) -> Path:
    """Write ``text`` to a temporary file next to ``path``, flush it to the disk and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # owner and random part have to fit into a name of 255 bytes, too
    handle, temporary = tempfile.mkstemp(
        prefix=f".{path.name[:180]}.brainprior-{_owner()}.", dir=path.parent
    )
    try:
        # half a surrogate pair (an undecodable file name) is written as \udcff, as in JSON
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text_at_last(path: Path, text: str) -> Path:
    """``write_text``; on a full disk the old file is removed first, because it is outdated."""
    try:
        return write_text(path, text)
    except OSError as error:
        if not is_full(error) or not path.exists():
            raise
    path.unlink()
    return write_text(path, text)


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """``write_text`` of ``to_json``."""
    return write_text(path, to_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    ValueError
        If it is not JSON, or not an object.
    """
    value = parse_json(decoded(path.read_bytes())[0])
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def parse_json(text: str) -> Any:
    """``json.loads``; whole numbers beyond the range of floating-point numbers become infinite.

    Raises
    ------
    ValueError
        The message states the position and the reason; excessive nesting is an error too.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole_number(digits: str) -> int | float:
    if np.isinf(float(digits)):
        return float(digits)
    return int(digits)


def decoded(data: bytes) -> tuple[str, str | None]:
    """Text, and its encoding if that is not UTF-8 without a byte order mark, as BIDS requires."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            with suppress(UnicodeDecodeError):
                return data[len(mark) :].decode(encoding), f"{encoding} with a byte order mark"
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError:
        return data.decode("latin-1"), "not UTF-8 (read as Latin-1)"


def readable(path: Path | PurePath | str) -> str:
    """A path on one line, with control characters and bytes that are not text escaped."""
    text = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def listing(paths: Sequence[Path]) -> str:
    """Names of files for a message; only the first ones if there are many."""
    names = ", ".join(readable(path.name) for path in paths[:LISTED])
    rest = len(paths) - LISTED
    return f"{names} and {rest} more" if rest > 0 else names


def publish(staged: Mapping[Path, Path]) -> None:
    """Rename staged files to their final places, all or none.

    Parameters
    ----------
    staged : temporary file -> final path
        On the same file system. If one rename fails, the earlier ones are undone (a file that was
        replaced is not restored).
    """
    for source in staged:
        with source.open("rb") as stream:
            os.fsync(stream.fileno())
    placed: list[Path] = []
    try:
        for source, target in staged.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
