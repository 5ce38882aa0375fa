# SPDX-License-Identifier: Apache-2.0
"""Pages on which a result is looked at in three linked planes: nilearn's viewer.

Over the result lies a second image, with a slider for its opacity: the input, or the uncertainty.
Each page is one file that needs no other and no network, but JavaScript.
"""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn import plotting
from nilearn.plotting.html_stat_map import StatMapView

from brainprior_bids.bids.files import write_text
from brainprior_bids.reports.volumes import Box, Volume

UNCERTAIN = (2.0, 20.0)
"""Uncertainty that is coloured, per cent of the upper end of the grey window."""


def write_before_after(
    path: Path, before: Volume, after: Volume, window: tuple[float, float], box: Box, title: str
) -> Path:
    """The input over the result; at opacity 0 the result alone.

    Parameters
    ----------
    before, after : Volume
        On one grid and in one unit.
    window : (float, float)
        Grey window of both.
    box : Box
        The part that is shown.
    """
    layer = _cropped(before.like(np.clip(before.data, *window)), box)
    view = plotting.view_img(
        layer,
        bg_img=_background(after, window, box),
        title=title,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        threshold=1e-3 * window[1],
        colorbar=False,
        symmetric_cmap=False,
        black_bg=True,
        dim=0,
        resampling_interpolation="nearest",
    )
    return _write(view, path)


def write_uncertain(
    path: Path, sd: Volume, image: Volume, window: tuple[float, float], box: Box, title: str
) -> Path:
    """The uncertainty over the result, in per cent of the window's upper end.

    Parameters
    ----------
    sd, image : Volume
        On one grid and in one unit.
    """
    low, high = UNCERTAIN
    view = plotting.view_img(
        _cropped(sd.like(np.clip(sd.data * (100 / window[1]), 0, high)), box),
        bg_img=_background(image, window, box),
        title=title,
        cmap="inferno",
        vmin=0,
        vmax=high,
        threshold=low,
        opacity=0.5,
        symmetric_cmap=False,
        black_bg=True,
        dim=0,
        resampling_interpolation="nearest",
    )
    return _write(view, path)


def _write(view: StatMapView, path: Path) -> Path:
    """The page without its icon, which is on a server."""
    write_text(path, re.sub(r"<link[^>]*favicon[^>]*>", "", view.get_standalone()))
    return path


def _background(image: Volume, window: tuple[float, float], box: Box) -> nib.Nifti1Image:
    return _cropped(image.like(np.clip(image.data, *window)), box)


def _cropped(volume: Volume, box: Box) -> nib.Nifti1Image:
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in box]
    return nib.Nifti1Image(volume.data[tuple(slice(*part) for part in box)], affine)
