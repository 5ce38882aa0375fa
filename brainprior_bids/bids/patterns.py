# SPDX-License-Identifier: Apache-2.0
"""Patterns of paths with ``{subject}`` and the like: names only, no attributes, no widths.

``str.format`` would look up attributes of its arguments, and pad them to any width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Formatter

NAMES = ("subject", "session", "suffix", "stem")


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern with the values of ``NAMES`` in place; ``{{`` is a brace.

    Raises
    ------
    ValueError
        The message names the part that is not such a name.
    """
    parts = []
    for literal, name, width, conversion in Formatter().parse(pattern):
        parts.append(literal)
        if name is None:
            continue
        if name not in NAMES or width or conversion:
            whole = f"{name}{f'!{conversion}' if conversion else ''}{f':{width}' if width else ''}"
            raise ValueError(f"{{{whole:.40}}} is not known")
        parts.append(values[name])
    return "".join(parts)


def place(pattern: str, otherwise: Path) -> tuple[Path, str]:
    """Folder and pattern of a search; without a leading slash, relative to ``otherwise``."""
    return (Path("/"), pattern.lstrip("/")) if pattern[:1] == "/" else (otherwise, pattern)


def check(pattern: str) -> None:
    """Try a pattern.

    Raises
    ------
    ValueError
        The message states why it cannot be used.
    """
    root, text = place(fill(pattern, dict.fromkeys(NAMES, "x")), Path("/nonexistent"))
    try:
        next(root.joinpath("nonexistent").glob(text), None)
    except (ValueError, NotImplementedError, IndexError, OSError) as error:
        raise ValueError(f"it is not a valid path pattern ({error})") from error
