# SPDX-License-Identifier: Apache-2.0
"""Pages that show a result in three linked planes, made with nilearn's viewer.

A second image is overlaid on the result, with a slider for its opacity. Each page is a single
file; it needs JavaScript, but no other file and no network connection. The frame of the page, with
its headings and explanations, is ours (``viewer.html.j2``).
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path

import jinja2
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
    name : str
        For the label of the slider.
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
    name: str
    shown: tuple[float, float]
    colours: str
    opacity: float = 1.0
    scale: bool = False


@dataclass(frozen=True)
class Page:
    """The words of a page.

    Parameters
    ----------
    title : str
        What the planes show.
    note : str
        Explanation of the layer and its units.
    scan : str
        Name of the scan's section in the report.
    report : str
        Address of that section, from the page.
    """

    title: str
    note: str
    scan: str
    report: str


def write_viewer(
    path: Path, result: Volume, window: tuple[float, float], layer: Layer, box: Box, page: Page
) -> Path:
    """Write a page.

    Parameters
    ----------
    window : (float, float)
        Grey window of the result, in its units.
    box : Box
        The part of the volume that is shown.
    page : Page
    """
    low, high = layer.shown
    view = plotting.view_img(
        _clipped(layer.image, (0, high), box),
        bg_img=_clipped(result, window, box),
        title=None,  # in the canvas it would be cut at the upper edge
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
    planes = _labelled(_body(view.get_standalone()), layer, page.title)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("brainprior_bids") / "data" / "reports")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("viewer.html.j2")
    return write_text(path, template.render(page=page, planes=planes))


def _body(page: str) -> str:
    """The content of nilearn's page; its head has an icon on a server."""
    return page[page.index("<body>") + len("<body>") : page.rindex("</body>")]


def _labelled(body: str, layer: Layer, title: str) -> str:
    """nilearn's planes with a description, and its slider with a label and its initial value."""
    percent = round(100 * layer.opacity)
    label = rf'<label for="\1">Opacity of the {layer.name}, %</label>'
    alt = html.escape(f"{title}: sagittal, coronal and axial plane; click to move them.")
    edits = (
        (r'<p>Opacity</p>(?=.*?id="(opacity-\w+)")', label),
        (r'value="100"(?=\s+class="slider")', f'value="{percent}"'),
        (r'(<span id="demo-\w+">)(?=</span>)', rf"\g<1>{percent}"),
        (r"<canvas ", f'<canvas role="img" aria-label="{alt}" '),
    )
    for pattern, text in edits:
        body, count = re.subn(pattern, text, body, count=1, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"write_viewer: nilearn's page has no {pattern}.")
    return body


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
