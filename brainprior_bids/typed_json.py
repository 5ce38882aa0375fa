# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses to and from JSON: strict about types, lenient about missing and other keys.

A field may be text, a whole number, a number, a bool, a ``StrEnum``, another ``Record``, a tuple,
a mapping from text, ``Any``, or one of several of these. A missing key reads as the field's
default, else as None, an empty tuple, mapping or record; it is an error only if none of these is
possible. Keys without a field are ignored.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import StrEnum
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from brainprior_bids.engine.errors import RecordError

OMIT: Mapping[str, bool] = {"omit": True}
"""``field(metadata=OMIT)``: the field is not written if it has its default."""
SCALARS: dict[type, tuple[type, str]] = {
    str: (str, "text"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
}
"""Type of a field -> types that it accepts (including NumPy's), and their name."""


class _Mismatch(Exception):
    """A value of the wrong type, and its key, to which outer keys are added."""

    def __init__(self, problem: str, key: str = "") -> None:
        super().__init__(problem)
        self.problem, self.key = problem, key

    def inside(self, name: str) -> _Mismatch:
        """The same error, with the key of the enclosing object or list."""
        glue = "." if self.key and not self.key.startswith("[") else ""
        return _Mismatch(self.problem, f"{name}{glue}{self.key}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON object whose keys are the fields."""

    @classmethod
    def from_json(cls, value: Any, *, source: str | None = None) -> Self:
        """The record of a JSON object.

        Parameters
        ----------
        value : Any
            As ``json.loads`` returns it; NumPy numbers and arrays are accepted.
        source : str, optional
            Name of the file, for messages.

        Raises
        ------
        RecordError
            If it is not an object, or a value has the wrong type; the message names file and key.
        """
        try:
            record: Self = _decode_record(cls, value)
        except _Mismatch as mismatch:
            key = f" {mismatch.key}" if mismatch.key else ""
            raise RecordError(
                f"{source or cls.__name__}:{key} must be {mismatch.problem}. Another version "
                "wrote it, or it was edited: run the scan again."
            ) from None
        return record

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The record in a file.

        Raises
        ------
        OSError
            If the file cannot be read.
        RecordError
            If it is not JSON, and as ``from_json``.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path}: not JSON ({error}). Run the scan again.") from error
        return cls.from_json(value, source=str(path))

    @classmethod
    def empty(cls) -> Self:
        """An empty record."""
        return cls.from_json({})

    def to_json(self) -> dict[str, Any]:
        """A mapping that ``from_json`` reads back."""
        values = ((item, getattr(self, item.name)) for item in fields(self))
        return {
            item.name: _encode(value)
            for item, value in values
            if not (item.metadata.get("omit") and value == _default(item))
        }

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``values``, with forms of older versions converted to the current one."""
        return values


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, value: Any) -> Any:
    """``value`` converted to a field's type.

    Raises
    ------
    _Mismatch
        If it has another type.
    """
    if type(value) is kind or kind is Any:
        return value
    if hasattr(value, "tolist"):  # NumPy
        value = value.tolist()
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), value)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value)
    if origin is Mapping:
        return _decode_mapping(get_args(kind)[1], value)
    if issubclass(kind, Record):
        return _decode_record(kind, value)
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise _Mismatch(f"one of {', '.join(kind)}, got {_shown(value)}")
        return kind(value)
    accepted, name = SCALARS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise _Mismatch(f"{name}, got {_shown(value)}")
    return kind(value)


def _decode_union(kinds: tuple[Any, ...], value: Any) -> Any:
    """The first of several types that fits; the error is the first one's."""
    if value is None and types.NoneType in kinds:
        return None
    first, *others = (kind for kind in kinds if kind is not types.NoneType)
    try:
        return _decode(first, value)
    except _Mismatch as mismatch:
        for kind in others:
            try:
                return _decode(kind, value)
            except _Mismatch:
                continue
        raise mismatch


def _decode_tuple(kinds: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _Mismatch(f"a list, got {_shown(value)}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _Mismatch(f"a list of {len(kinds)}, got {len(value)}")
    items = []
    for index, (kind, item) in enumerate(zip(kinds, value, strict=True)):
        try:
            items.append(_decode(kind, item))
        except _Mismatch as mismatch:
            raise mismatch.inside(f"[{index}]") from None
    return tuple(items)


def _decode_mapping(kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _Mismatch(f"an object, got {_shown(value)}")
    items = {}
    for name, item in value.items():
        try:
            items[str(name)] = _decode(kind, item)
        except _Mismatch as mismatch:
            raise mismatch.inside(str(name)) from None
    return items


def _decode_record(cls: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _Mismatch(f"an object, got {_shown(value)}")
    values = cls._upgraded(dict(value))
    decoded = {}
    for name, kind, has_default in _plan(cls):
        try:
            if name in values:
                decoded[name] = _decode(kind, values[name])
            elif not has_default:
                decoded[name] = _not_recorded(kind)
        except _Mismatch as mismatch:
            raise mismatch.inside(name) from None
    return cls(**decoded)


@cache
def _plan(cls: Any) -> list[tuple[str, Any, bool]]:
    """Name and type of each field, and whether it has a default."""
    kinds = get_type_hints(cls)
    return [
        (
            item.name,
            kinds[item.name],
            item.default is not MISSING or item.default_factory is not MISSING,
        )
        for item in fields(cls)
    ]


def _not_recorded(kind: Any) -> Any:
    """The value of a field whose key is missing."""
    if kind is Any or types.NoneType in get_args(kind):
        return None
    origin = get_origin(kind)
    if origin is tuple and get_args(kind)[-1] is Ellipsis:
        return ()
    if origin is Mapping:
        return {}
    if isinstance(kind, type) and issubclass(kind, Record):
        return _decode_record(kind, {})
    raise _Mismatch("there, but is missing")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
