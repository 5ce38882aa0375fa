# SPDX-License-Identifier: Apache-2.0
"""Names and colours of the structures, in FreeSurfer's numbering, and their MNI305 centres."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainprior_bids.anatomy.affine import mni305_centroids
from brainprior_bids.records import StructureRecord

RGB = tuple[int, int, int]
UNKNOWN: RGB = (160, 160, 160)
DARKER = 0.65
"""Brightness of right-sided colours relative to the left (FreeSurfer uses the same colours)."""


@cache
def _structures() -> dict[int, tuple[str, RGB]]:
    """FreeSurfer value -> name and colour, from ``data/structures.tsv``."""
    text = (files("brainprior_bids") / "data" / "structures.tsv").read_text(encoding="utf-8")
    return {
        int(row["index"]): (row["name"], (int(row["red"]), int(row["green"]), int(row["blue"])))
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
    }


def name(value: int) -> str:
    """FreeSurfer's name; ``label 77`` for a value that is not in the table."""
    return _structures()[value][0] if value in _structures() else f"label {value}"


def is_right(value: int) -> bool:
    """Whether a label belongs to the right half of the brain."""
    return name(value).startswith("Right-")


def colour(value: int) -> RGB:
    """RGB, 0 to 255; a right-sided structure has a darker shade of the left one's colour."""
    if value not in _structures():
        return UNKNOWN
    red, green, blue = _structures()[value][1]
    share = DARKER if is_right(value) else 1.0
    return int(red * share), int(green * share), int(blue * share)


@cache
def outlines() -> list[dict[str, Any]]:
    """Sections of MNI305 with the outline of the average brain.

    Returns
    -------
    list of dict
        ``axis`` perpendicular to the section, its position ``mm`` along this axis, and ``lines``,
        each a list of points (mm along the two other axes); from
        ``data/reports/mni305_outline.json``.
    """
    source = files("brainprior_bids") / "data" / "reports" / "mni305_outline.json"
    return list(json.loads(source.read_text(encoding="utf-8"))["sections"])


def centroid_pairs(
    table: Sequence[StructureRecord], to_mni305: NDArray[np.float64]
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Name, MNI305 centroid and mapped centroid of each structure of a scan.

    Parameters
    ----------
    table : sequence of StructureRecord
    to_mni305 : (4, 4) array
        Scanner RAS mm to MNI305 RAS mm.
    """
    expected = mni305_centroids()["structures"]
    pairs = []
    for row in table:
        known = expected.get(row.name)
        if known is not None and row.centroid_mm is not None:
            mapped = (to_mni305 @ np.append(np.asarray(row.centroid_mm, float), 1.0))[:3]
            pairs.append((row.name, np.asarray(known["centroid_mm"], float), mapped))
    return pairs
