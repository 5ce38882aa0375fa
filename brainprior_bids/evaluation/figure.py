# SPDX-License-Identifier: Apache-2.0
"""Images side by side in three planes, for the README and the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Column:
    """One image of the figure, on the grid that all columns share.

    Attributes
    ----------
    title : str
    data : (i, j, k) array
        RAS axes.
    top : float
        Intensity shown as white (or the colour map's end).
    colours : str
        matplotlib's colour map.
    """

    title: str
    data: NDArray[np.float32]
    top: float
    colours: str = "gray"


def draw(
    path: Path,
    columns: Sequence[Column],
    *,
    inside: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    caption: str,
    planes: Sequence[int] = (0, 1, 2),
    dpi: int = 90,
) -> Path:
    """Draw every column in planes through the brain.

    Parameters
    ----------
    path : Path
        PNG.
    columns : sequence of Column
    inside : (i, j, k) bool array
        The brain. The picture is cropped around it, and the planes go through its middle (the
        sagittal one is off the midline).
    spacing_mm : (3,)
        Voxel size.
    caption : str
        A line below the images, with the source of the scan.
    planes : sequence of 0, 1, 2
        Sagittal, coronal, axial; one row each.
    dpi : int
        Dots per inch.
    """
    ends = [(int(w.min()), int(w.max()) + 1) for w in np.nonzero(inside)]
    margin = [max(1, round(6 / s)) for s in spacing_mm]
    box = tuple(
        slice(max(a - m, 0), min(b + m, n))
        for (a, b), m, n in zip(ends, margin, inside.shape, strict=True)
    )
    share = {0: 0.40, 1: 0.45, 2: 0.55}
    at = {plane: round(a + share[plane] * (b - a)) for plane, (a, b) in enumerate(ends)}

    width_mm = {0: 1, 1: 0, 2: 0}
    height_mm = {0: 2, 1: 2, 2: 1}
    size = [(s.stop - s.start) * mm for s, mm in zip(box, spacing_mm, strict=True)]
    heights = [size[height_mm[plane]] / size[width_mm[plane]] for plane in planes]
    column_width = 2.2
    height = column_width * sum(heights) + 0.5
    figure = Figure(figsize=(column_width * len(columns), height), facecolor="black", dpi=dpi)
    axes = figure.subplots(
        len(planes),
        len(columns),
        squeeze=False,
        gridspec_kw={
            "height_ratios": heights,
            "left": 0.003,
            "right": 0.997,
            "top": 1 - 0.27 / height,
            "bottom": 0.22 / height,
            "wspace": 0.015,
            "hspace": 0.015,
        },
    )
    for row, plane in enumerate(planes):
        for panel, column in zip(axes[row], columns, strict=True):
            view = np.take(column.data, at[plane], axis=plane)
            kept = [box[axis] for axis in range(3) if axis != plane]
            aspect = spacing_mm[height_mm[plane]] / spacing_mm[width_mm[plane]]
            panel.imshow(
                view[kept[0], kept[1]].T,
                origin="lower",
                cmap=column.colours,
                vmin=0,
                vmax=column.top,
                aspect=aspect,
                interpolation="nearest",
            )
            panel.set_axis_off()
            if row == 0:
                panel.set_title(column.title, color="white", fontsize=9, pad=4)
    figure.text(0.5, 0.03 / height, caption, color="0.75", fontsize=7, ha="center", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="black", metadata={"Software": None})
    return path
