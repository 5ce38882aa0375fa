# SPDX-License-Identifier: Apache-2.0
"""Names and colours of the structures, in FreeSurfer's numbering, and their MNI305 centres."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STRUCTURES: dict[int, tuple[str, tuple[int, int, int]]] = {
    2: ("left cerebral white matter", (245, 245, 245)),
    3: ("left cerebral cortex", (205, 62, 78)),
    4: ("left lateral ventricle", (120, 18, 134)),
    5: ("left inferior lateral ventricle", (196, 58, 250)),
    7: ("left cerebellar white matter", (220, 248, 164)),
    8: ("left cerebellar cortex", (230, 148, 34)),
    10: ("left thalamus", (0, 148, 14)),
    11: ("left caudate", (122, 186, 220)),
    12: ("left putamen", (236, 13, 176)),
    13: ("left pallidum", (12, 48, 255)),
    14: ("third ventricle", (204, 182, 142)),
    15: ("fourth ventricle", (42, 204, 164)),
    16: ("brain stem", (119, 159, 176)),
    17: ("left hippocampus", (220, 216, 20)),
    18: ("left amygdala", (103, 255, 255)),
    24: ("cerebrospinal fluid", (90, 90, 110)),
    26: ("left accumbens", (255, 165, 0)),
    28: ("left ventral diencephalon", (165, 42, 42)),
}
"""FreeSurfer's colour table, a little lighter where it is too dark for a black ground."""

_RIGHT_OF = {
    41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18,
    58: 26, 60: 28,
}  # fmt: skip


def is_right(value: int) -> bool:
    """Whether a label belongs to the right half of the brain."""
    return value in _RIGHT_OF


def name(value: int) -> str:
    """The structure's name; ``label 77`` for one that is not in the table."""
    if value in _RIGHT_OF:
        return "right " + _STRUCTURES[_RIGHT_OF[value]][0].removeprefix("left ")
    return _STRUCTURES[value][0] if value in _STRUCTURES else f"label {value}"


def colour(value: int) -> tuple[int, int, int]:
    """RGB, 0 to 255; the right side's is the left side's, darker."""
    if value in _RIGHT_OF:
        red, green, blue = _STRUCTURES[_RIGHT_OF[value]][1]
        return int(red * 0.65), int(green * 0.65), int(blue * 0.65)
    return _STRUCTURES[value][1] if value in _STRUCTURES else (160, 160, 160)


def expected_centroids() -> dict[int, NDArray[np.float64]]:
    """FreeSurfer value -> (3,) mean centre in MNI305 mm."""
    source = files("brainprior_bids") / "data" / "mni305_centroids.json"
    if not source.is_file():
        return {}
    table = json.loads(source.read_text(encoding="utf-8"))["structures"]
    return {int(row["index"]): np.asarray(row["mean"], float) for row in table}


def centroid_pairs(
    table: Sequence[Mapping[str, Any]], to_mni305: NDArray[np.float64]
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """For each structure found in a scan: its name, where MNI305 has it, where it came to lie.

    Parameters
    ----------
    table : rows with ``index`` and ``centroid_mm``
        As the parcellation wrote it; scanner RAS mm.
    to_mni305 : (4, 4) array
        Scanner RAS mm to MNI305 RAS mm.
    """
    expected = expected_centroids()
    pairs = []
    for row in table:
        value, centre = int(row["index"]), row.get("centroid_mm")
        if value in expected and centre is not None:
            found = (to_mni305 @ np.append(np.asarray(centre, float), 1.0))[:3]
            pairs.append((name(value), expected[value], found))
    return pairs
