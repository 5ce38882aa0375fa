# SPDX-License-Identifier: Apache-2.0
"""Pages on which a result is looked at in three linked planes: nilearn's viewer.

Over the result lies a second image, with a slider for its opacity. Each page is one file that
needs no other and no network, but JavaScript.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn import plotting

from brainprior_bids.bids.files import write_text
from brainprior_bids.reports.volumes import Box, Volume


@dataclass(frozen=True, eq=False)
class Layer:
    """The image that lies over the result, on the result's grid.

    Parameters
    ----------
    image : Volume
    shown : (float, float)
        Values below the first are transparent, and above the second shown as that.
    colours : str
        matplotlib's name of a colour map, from 0 to the end of ``shown``.
    opacity : float
        To begin with, 0 to 1.
    scale : bool
        Whether there is a colour bar.
    """

    image: Volume
    shown: tuple[float, float]
    colours: str
    opacity: float = 1.0
    scale: bool = False


def write_viewer(
    path: Path,
    result: Volume,
    window: tuple[float, float],
    layer: Layer,
    box: Box,
    title: tuple[str, str],
) -> Path:
    """Write a page.

    Parameters
    ----------
    window : (float, float)
        Grey window of the result.
    box : Box
        The part that is shown.
    title : (str, str)
        What is shown, above the planes (there is room for 20 letters), and the scan, in the
        browser's title.
    """
    low, high = layer.shown
    view = plotting.view_img(
        _clipped(layer.image, (0, high), box),
        bg_img=_clipped(result, window, box),
        title=title[0],
        cmap=layer.colours,
        vmin=0,
        vmax=high,
        threshold=low,
        opacity=layer.opacity,
        colorbar=layer.scale,
        symmetric_cmap=False,
        black_bg=True,
        dim=0,
        resampling_interpolation="nearest",
    )
    # its icon is on a server
    page = re.sub(r"<link[^>]*favicon[^>]*>", "", view.get_standalone())
    name = f"<title>{html.escape(' · '.join(title))}</title>"
    write_text(path, re.sub(r"<title>.*?</title>", lambda _: name, page, count=1, flags=re.S))
    return path


def _clipped(volume: Volume, limits: tuple[float, float], box: Box) -> nib.Nifti1Image:
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in box]
    part = volume.data[tuple(slice(*ends) for ends in box)]
    return nib.Nifti1Image(np.clip(part, *limits), affine)
