# SPDX-License-Identifier: Apache-2.0
"""Conversion of one option's text to a value, with an error that states what is expected."""

from __future__ import annotations

import argparse
import re
import reprlib
from pathlib import Path

from brainprior_bids.anatomy.templates import is_surface
from brainprior_bids.settings import (
    EXPORTS,
    MODALITIES,
    OTHER_MODALITIES,
    SPACES,
    is_template,
)

UNITS_GB = {"K": 1 / 2**20, "M": 1 / 2**10, "G": 1.0, "T": 2.0**10}


def derivative_root(text: str) -> tuple[str, str]:
    """``NAME=PATH`` or ``PATH`` -> name and absolute path of a derivative data set."""
    name, equals, rest = text.partition("=")
    path = Path(rest if equals else text).absolute()
    if not (path / "dataset_description.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{path} is not a BIDS data set: it has no dataset_description.json. Give its root"
        )
    name = name if equals else re.sub(r"[^a-zA-Z0-9]", "", path.name)
    if not re.fullmatch(r"[a-zA-Z0-9]+", name) or name == "raw":
        raise argparse.ArgumentTypeError(
            f"{name!r} cannot name a data set: expected letters and digits, and not 'raw'"
        )
    return name, str(path)


def export_kind(text: str) -> tuple[str, str]:
    """``fmriprep`` or ``raw``, and the folder behind ``=``, or nothing."""
    kind, _, folder = text.partition("=")
    if kind not in EXPORTS:
        raise argparse.ArgumentTypeError(
            f"expected {' or '.join(EXPORTS)}, with or without =DIR, got {text!r}"
        )
    return kind, folder


def space_name(text: str) -> str:
    """The label of a space: ``NAME``, or ``NAME+3`` for ``NAME:cohort-3``; ``T2w`` … is ``anat``.

    ``:res-1`` is dropped. Whether there is such a template is looked up later.
    """
    name, *modifiers = text.split(":")
    cohorts = [m.removeprefix("cohort-") for m in modifiers if m.startswith("cohort-")]
    others = {m for m in modifiers if not m.startswith("cohort-")} - {"res-1", "res-01"}
    own = [suffix for suffix in (*MODALITIES, *OTHER_MODALITIES) if suffix not in SPACES]
    space = "anat" if name in own else name
    if others and not is_surface(name):  # which is refused for that reason
        raise argparse.ArgumentTypeError(
            f"{text!r}: only the modifiers res-1 (the results have 1 mm) and cohort-N are "
            f"accepted, got {', '.join(map(reprlib.repr, sorted(others)))}. Leave the modifier "
            "out; for other voxel sizes, run fMRIPrep on the result"
        )
    if len(cohorts) > 1 or (cohorts and not is_template(space)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: one cohort of a template was expected. Give each cohort as a space of its "
            "own: MNIPediatricAsym:cohort-3 MNIPediatricAsym:cohort-4"
        )
    label = "+".join([space, *cohorts])
    if not re.fullmatch(r"[a-zA-Z0-9]+([+][a-zA-Z0-9]+)?", label):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no space: expected anat, T1w, MNI305, or a template of TemplateFlow "
            "such as MNI152NLin2009cAsym or MNIPediatricAsym:cohort-3"
        )
    return label


def effective_resolution(text: str) -> str:
    """``auto``, ``off``, or three voxel sizes in mm, separated by commas; 0 keeps an axis."""
    if text in ("auto", "off"):
        return text
    try:
        sizes = [float(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or not all(0 <= size <= 20 for size in sizes) or not any(sizes):
        raise argparse.ArgumentTypeError(
            "expected auto, off, or the measured voxel size in mm along the left-right, "
            "back-front and bottom-top axes (0: as it is), such as 0,0,5, got "
            f"{reprlib.repr(text)}"
        )
    return ",".join(f"{size:g}" for size in sizes)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text:.40}")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^63 - 1, got {reprlib.repr(text)}"
        )
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def distance(text: str) -> float:
    """A finite number of at least 0, in mm."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a distance of at least 0 mm, got {text}")
    return value


def _number(text: str) -> float:
    """The number in a text; NaN, which is outside every range, if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def memory_gb(text: str) -> float:
    """``8G``, ``8000M``, ``8000`` (MB, as in fMRIPrep) -> GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if match is None or not 0 < float(match[1]) < float("inf"):
        raise argparse.ArgumentTypeError(
            f"expected a size such as 8G, 8000M or 8000 (MB), got {reprlib.repr(text)}"
        )
    return float(match[1]) * UNITS_GB[match[2] or "M"]


def device_name(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; whether it exists is checked later."""
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (
        kind == "cuda" and colon and re.fullmatch("[0-9]{1,4}", index)
    ):
        return text
    raise argparse.ArgumentTypeError(
        f"expected auto, cpu, cuda or cuda:N, got {reprlib.repr(text)}"
    )
