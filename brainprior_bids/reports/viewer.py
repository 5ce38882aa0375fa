# SPDX-License-Identifier: Apache-2.0
"""Pages that show a result in three linked planes, made with nilearn's viewer.

A second image is overlaid on the result, with a slider for its opacity. Each page is a single
file; it needs JavaScript, but no other file and no network connection.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nilearn import plotting

from brainprior_bids.bids.files import write_text
from brainprior_bids.reports.volumes import Box, Volume


@dataclass(frozen=True, eq=False)
class Layer:
    """The image overlaid on the result, on the result's grid.

    Parameters
    ----------
    image : Volume
    shown : (float, float)
        Values below the first are transparent, values above the second are clipped to it.
    colours : str
        matplotlib's name of a colour map, from 0 to the end of ``shown``.
    opacity : float
        Initial opacity, 0 to 1.
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
        Grey window of the result, in its units.
    box : Box
        The part of the volume that is shown.
    title : (str, str)
        Content, written above the planes (at most about 20 characters), and the scan; both are
        in the browser's title.
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
    # the icon of nilearn's page is on a server
    page = re.sub(r"<link[^>]*favicon[^>]*>", "", view.get_standalone())
    name = f"<title>{html.escape(' · '.join(title))}</title>"
    write_text(path, re.sub(r"<title>.*?</title>", lambda _: name, page, count=1, flags=re.S))
    return path


def _clipped(volume: Volume, limits: tuple[float, float], box: Box) -> nib.Nifti1Image:
    """The part in ``box``, clipped, on cubic voxels along the scanner's axes.

    nilearn would bring a tilted image to such voxels too, in two steps and much more slowly.
    """
    ends = [(start - 0.5, stop - 0.5) for start, stop in box]
    corners = apply_affine(volume.affine, list(product(*ends)))
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = round(float(volume.spacing_mm.min()), 3)
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = low + size / 2
    shape = np.ceil((high - low) / size - 0.01).astype(int)
    aligned = volume.regrid(Volume(np.zeros(shape, np.float32), affine), order=1, extend=False)
    return nib.Nifti1Image(np.clip(aligned.data, *limits), affine)
