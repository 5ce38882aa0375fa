# SPDX-License-Identifier: Apache-2.0
"""Files put in place whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def to_json(value: Mapping[str, Any]) -> str:
    """Readable JSON; NumPy numbers and arrays, paths and tuples become plain JSON.

    NaN and infinities become null: JSON has no word for them.
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
    """Write ``text`` beside ``path``, flush it to the disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


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
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def publish(staged: Mapping[Path, Path]) -> None:
    """Rename staged files to their final places, all or none.

    Parameters
    ----------
    staged : temporary file -> final path
        On the same file system. Where one rename fails, those done before it are taken back
        (a file that was replaced is not restored).
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
