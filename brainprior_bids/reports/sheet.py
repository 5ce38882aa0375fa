# SPDX-License-Identifier: Apache-2.0
"""Sheets of brain sections as light SVG files.

Each section is embedded as an 8-bit PNG at its own resolution (one pixel per voxel) and scaled by
the viewer, so that a picture takes only kilobytes and text, contours and marks stay sharp. Lengths
are in sheet units; a sheet is ``WIDTH`` units wide and as high as its rows.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import escape

import contourpy
import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from brainprior_bids.bids.files import write_text
from brainprior_bids.reports.volumes import EDGES, Section

WIDTH = 1200.0
GAP = 6.0
INK = "#e6e6e6"
FAINT = "#9aa0a6"
PANEL = "#000000"
GROUND = "#111417"
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"

XML = '<?xml version="1.0" encoding="utf-8"?>'
"""Written on the same line as ``<svg``: nireports rewrites files with a line that begins so."""

FLICKER = """<style>
@keyframes flicker { 0%, 45% { opacity: 1 } 50%, 95% { opacity: 0 } 100% { opacity: 1 } }
.before { opacity: 0 }
svg:hover .before, svg:focus .before { animation: flicker 2s linear infinite }
@media (prefers-reduced-motion) {
svg:hover .before, svg:focus .before { animation: none; opacity: 1 }
}
#input:target .before { animation: none; opacity: 1 }
#result:target .before { animation: none; opacity: 0 }
svg:focus { outline: 4px solid #ffb74d; outline-offset: -4px }
</style>"""
"""The "before" state alternates with the other under the pointer and with keyboard focus; it is
fixed where the picture is opened as ``#input`` or ``#result``."""


@dataclass(frozen=True)
class Picture:
    """A section in grey or colour.

    Parameters
    ----------
    section : Section
        What is drawn.
    limits : (low, high)
        Values drawn as the first and the last colour.
    colours : str
        Name of a matplotlib colour map.
    smooth : bool
        Whether the viewer may interpolate between pixels.
    before : bool
        Whether the picture belongs to the "before" state of a flicker.
    inside : Section, optional
        The picture is transparent where this section is at most 0.5.
    """

    section: Section
    limits: tuple[float, float]
    colours: str = "gray"
    smooth: bool = True
    before: bool = False
    inside: Section | None = None

    def png(self) -> bytes:
        """8-bit PNG, grey or with a palette."""
        low, high = self.limits
        scaled = (self.section.image - low) / max(high - low, 1e-12)
        if self.inside is not None:
            levels = 1 + np.round(np.clip(scaled, 0, 1) * 254).astype(np.uint8)
            levels[self.inside.image <= 0.5] = 0
            ramp = np.concatenate([[0.0], np.linspace(0, 1, 255)])
            return _paletted(levels, _colour_table(self.colours, ramp), clear=True)
        levels = np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
        if self.colours == "gray":
            return _png(Image.fromarray(np.ascontiguousarray(levels), "L"))
        return _paletted(levels, _colour_table(self.colours), clear=False)


@dataclass(frozen=True)
class Labels:
    """A section of small non-negative integers, drawn half transparent over the layers below.

    Parameters
    ----------
    section : Section
        Rows of ``table``; 0 is transparent.
    table : (n, 3) uint8 array
        RGB of each value, n <= 256.
    opacity : float
        0 to 1.
    """

    section: Section
    table: NDArray[np.uint8]
    opacity: float = 0.42

    def png(self) -> bytes:
        """8-bit PNG with a palette whose first entry is transparent."""
        return _paletted(self.section.image.astype(np.uint8), self.table, clear=True)


@dataclass(frozen=True)
class Contour:
    """The line where a section crosses ``level``."""

    section: Section
    level: float = 0.5
    colour: str = "#00d5ff"
    width: float = 1.6


@dataclass(frozen=True)
class Mark:
    """A mark at a point of the panel, in mm from its left and upper edge.

    Parameters
    ----------
    shape : {"ring", "cross", "line"}
        A line runs from (x, y) to (x2, y2).
    hint : str
        Tooltip of a ring or a cross.
    """

    x: float
    y: float
    shape: str
    colour: str
    x2: float = 0.0
    y2: float = 0.0
    hint: str = ""


@dataclass(frozen=True)
class Outline:
    """A closed or open line through points of the panel.

    Parameters
    ----------
    points : (n, 2) array
        x and y, mm from the left and upper edge.
    """

    points: NDArray[np.float64]
    colour: str


@dataclass(frozen=True)
class Panel:
    """The layers of one frame, from back to front; all sections have the same extent."""

    layers: Sequence[Picture | Labels | Contour | Outline | Mark]
    rulers: Sequence[tuple[float, float, float]] = ()
    """(x, y, mm): labelled ticks; y < 0 is a vertical line at x, x < 0 a horizontal one at y."""

    @property
    def section(self) -> Section:
        """The section that gives the frame its extent."""
        first = self.layers[0]
        if isinstance(first, (Mark, Outline)):
            raise TypeError("Panel: the first layer must have a section.")
        return first.section


@dataclass
class Sheet:
    """An SVG under construction, filled from the top.

    Parameters
    ----------
    footer : str
        Small text below the last row.
    """

    footer: str = ""
    _body: list[str] = field(default_factory=list)
    _words: list[str] = field(default_factory=list)
    _y: float = GAP
    _flickers: bool = False

    def title(self, text: str, note: str = "", before: str = "") -> None:
        """A line of text above the next row; ``before`` replaces it in the "before" state.

        Text and note are also the picture's description for screen readers.
        """
        height = 26.0
        self._words.append(f"{text} ({note})" if note else text)
        self._rect(0, self._y, WIDTH, height, GROUND)
        self._text(10, self._y + 18, text, 15, bold=True)
        if note:
            self._text(WIDTH - 10, self._y + 18, note, 13, anchor="end", colour=FAINT)
        if before:
            self._flickers = True
            self._body.append('<g class="before">')
            self._rect(0, self._y, WIDTH * 0.6, height, GROUND)
            self._text(10, self._y + 18, before, 15, bold=True, colour="#ffb74d")
            self._body.append("</g>")
        self._y += height

    def row(self, panels: Sequence[Panel], scale_to: float | None = None) -> None:
        """Frames side by side at one common scale, filling the width of the sheet.

        Parameters
        ----------
        scale_to : float, optional
            Largest scale, in sheet units per mm; by default the row fills the width.
        """
        room = WIDTH - GAP * (len(panels) + 1)
        scale = room / sum(panel.section.width_mm for panel in panels)
        if scale_to is not None:
            scale = min(scale, scale_to)
        height = max(panel.section.height_mm for panel in panels) * scale
        spare = room - scale * sum(panel.section.width_mm for panel in panels)
        x = GAP
        for panel in panels:
            frame = panel.section.width_mm * scale + spare / len(panels)
            self._rect(x, self._y, frame, height, PANEL)
            inset = spare / len(panels) / 2
            top = (height - panel.section.height_mm * scale) / 2
            self._panel(panel, x + inset, self._y + top, scale)
            self._edges(panel, x, self._y, frame, height)
            x += frame + GAP
        self._y += height + GAP

    def bar(
        self,
        colours: str,
        limits: tuple[float, float],
        text: str,
        ticks: Sequence[tuple[float, str]] = (),
    ) -> None:
        """A colour bar with a handful of labelled values.

        Parameters
        ----------
        ticks : sequence of (value, label), optional
            Default: round values. Ticks beyond ``limits`` are left out.
        """
        low, high = limits
        left, right, height = WIDTH * 0.3, WIDTH * 0.7, 12.0
        ramp = np.arange(256, dtype=np.uint8)[None]
        self._image(
            _paletted(ramp, _colour_table(colours), clear=False),
            (left, self._y + 4, right - left, height),
            stretch=True,
        )
        self._text(left - 14, self._y + 15, text, 13, anchor="end")
        if not ticks:
            values = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            ticks = [(float(value), f"{value:.6g}") for value in values]
        for value, label in ticks:
            if not low - 1e-9 <= value <= high + 1e-9:
                continue
            x = left + (right - left) * (value - low) / max(high - low, 1e-12)
            self._line(x, self._y + 4 + height, x, self._y + 8 + height, INK)
            self._text(x, self._y + 22 + height, label, 12, "middle")
        self._y += height + 32

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Coloured squares with names, on as many lines as needed."""
        x = 10.0
        for colour, name in entries:
            wide = 22 + 7.2 * len(name) + 14
            if x + wide > WIDTH - 10:
                x = 10.0
                self._y += 20
            self._rect(x, self._y + 4, 12, 12, colour)
            self._text(x + 18, self._y + 15, name, 12.5)
            x += wide
        self._y += 26

    def save(self, path: Path) -> Path:
        """Write the SVG atomically."""
        if self.footer:
            self._text(10, self._y + 14, self.footer, 12, colour=FAINT)
            self._y += 22
        style, focus, begin, end = "", "", "", ""
        if self._flickers:
            style, focus = FLICKER, ' tabindex="0"'
            begin, end = '<g id="input"><g id="result">\n', "\n</g></g>"
        text = (
            f'{XML}<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH:g} {self._y:.1f}" preserveAspectRatio="xMidYMid meet" '
            f'font-family="{FONT}"{focus}>\n{description(". ".join(self._words))}\n{style}'
            f'<rect width="{WIDTH:g}" height="{self._y:.1f}" fill="{GROUND}"/>\n'
            + begin
            + "\n".join(self._body)
            + f"{end}\n</svg>\n"
        )
        return write_text(path, text)

    def _panel(self, panel: Panel, x: float, y: float, scale: float) -> None:
        for layer in panel.layers:
            if isinstance(layer, Mark):
                self._mark(layer, x, y, scale)
                continue
            if isinstance(layer, Outline):
                self._path([layer.points * scale + (x, y)], layer.colour, 1.2)
                continue
            wide = layer.section.width_mm * scale
            high = layer.section.height_mm * scale
            if isinstance(layer, Contour):
                self._contour(layer, x, y, scale)
            elif isinstance(layer, Labels):
                self._image(layer.png(), (x, y, wide, high), opacity=layer.opacity, smooth=False)
            else:
                self._flickers |= layer.before
                self._image(
                    layer.png(), (x, y, wide, high), smooth=layer.smooth, before=layer.before
                )
        for at_x, at_y, value in panel.rulers:
            wide, high = panel.section.width_mm * scale, panel.section.height_mm * scale
            style = f'stroke="{FAINT}" stroke-width="0.6" stroke-opacity="0.55"'
            if at_y < 0:
                at = x + at_x * scale
                self._body.append(
                    f'<line x1="{at:.1f}" y1="{y:.1f}" x2="{at:.1f}" y2="{y + high:.1f}" {style}/>'
                )
                self._text(at + 2, y + high - 4, f"{value:g}", 10, colour=FAINT)
            else:
                at = y + at_y * scale
                self._body.append(
                    f'<line x1="{x:.1f}" y1="{at:.1f}" x2="{x + wide:.1f}" y2="{at:.1f}" {style}/>'
                )
                self._text(x + wide - 3, at - 2, f"{value:g}", 10, "end", colour=FAINT)

    def _edges(self, panel: Panel, x: float, y: float, wide: float, high: float) -> None:
        """Plane, coordinate and the letters of the four edges, over the frame."""
        left, right, low, up = EDGES[panel.section.axis]
        inset = 18 if panel.rulers else 0  # leaves room for the rulers' numbers
        self._text(x + 8, y + 18, panel.section.label, 12.5, halo=True)
        for letter, at_x, at_y in (
            (left, x + 12, y + high / 2 + 5),
            (right, x + wide - 12 - inset, y + high / 2 + 5),
            (low, x + wide / 2, y + high - 7 - inset),
            (up, x + wide * (0.72 if wide < 320 else 0.5), y + 18),
        ):
            size = 16.0 if letter in "LR" else 12.5
            self._text(at_x, at_y, letter, size, "middle", bold=letter in "LR", halo=True)

    def _contour(self, layer: Contour, x: float, y: float, scale: float) -> None:
        padded = np.pad(layer.section.image, 1)  # closes lines at the border
        rows, columns = (size * scale for size in layer.section.pixel_mm)
        lines = contourpy.contour_generator(z=padded).lines(layer.level)
        points = [(np.asarray(line) - 0.5) * (columns, rows) + (x, y) for line in lines]
        self._path(points, layer.colour, layer.width)

    def _path(self, lines: Sequence[NDArray[np.float64]], colour: str, width: float) -> None:
        path = "".join(
            "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points) for points in lines
        )
        if path:
            self._body.append(
                f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
                'stroke-linejoin="round"/>'
            )

    def _mark(self, mark: Mark, x: float, y: float, scale: float) -> None:
        px, py = x + mark.x * scale, y + mark.y * scale
        hint = f"<title>{escape(mark.hint)}</title>" if mark.hint else ""
        style = f'fill="none" stroke="{mark.colour}" stroke-width="1.6"'
        if mark.shape == "ring":
            self._body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" {style}>{hint}</circle>')
        elif mark.shape == "cross":
            d = f"M{px - 4:.1f} {py - 4:.1f}l8 8m0 -8l-8 8"
            self._body.append(f'<path d="{d}" {style}>{hint}</path>')
        else:
            ex, ey = x + mark.x2 * scale, y + mark.y2 * scale
            self._body.append(f'<path d="M{px:.1f} {py:.1f}L{ex:.1f} {ey:.1f}" {style}/>')

    def _image(
        self,
        png: bytes,
        frame: tuple[float, float, float, float],
        *,
        opacity: float = 1.0,
        smooth: bool = True,
        before: bool = False,
        stretch: bool = False,
    ) -> None:
        x, y, wide, high = frame
        attributes = 'class="before" ' if before else ""
        if opacity < 1:
            attributes += f'opacity="{opacity:g}" '
        if not smooth and not stretch:
            attributes += 'style="image-rendering:pixelated" '
        self._body.append(
            f'<image {attributes}x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" '
            'preserveAspectRatio="none" '
            f'href="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
        )

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        anchor: str = "start",
        *,
        colour: str = INK,
        bold: bool = False,
        halo: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        if halo:  # a dark rim keeps the text readable on a bright picture
            weight += ' stroke="#000" stroke-width="3" paint-order="stroke"'
        self._body.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight} xml:space="preserve">{escape(text)}</text>'
        )

    def _rect(self, x: float, y: float, wide: float, high: float, colour: str) -> None:
        self._body.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" '
            f'fill="{colour}"/>'
        )

    def _line(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        self._body.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )


def description(text: str) -> str:
    """The element with a picture's description; the report uses it as the alternative text."""
    return f"<desc>{escape(text)}</desc>"


def _colour_table(colours: str, at: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
    """(256, 3) RGB of a matplotlib colour map."""
    positions = np.linspace(0, 1, 256) if at is None else at
    return (colormaps[colours](positions)[:, :3] * 255).round().astype(np.uint8)


def _png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _paletted(levels: NDArray[np.uint8], table: NDArray[np.uint8], *, clear: bool) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(levels), "P")
    image.putpalette(np.ascontiguousarray(table).tobytes())
    stream = BytesIO()
    if clear:
        image.save(stream, "PNG", optimize=True, transparency=0)
    else:
        image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
