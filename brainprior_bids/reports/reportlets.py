# SPDX-License-Identifier: Apache-2.0
"""The pictures of one restored scan, from the files of its nodes.

Every picture states its plane and coordinate, the participant's left and right, and its units.
The captions of the report (``data/reports/subject.yml``) explain what to look for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainprior_bids.anatomy.tissue_metrics import FEWEST, Values, tissue_metrics, tissue_values
from brainprior_bids.bids.files import write_text
from brainprior_bids.bids.names import BIDSName, result_name
from brainprior_bids.records import (
    AffineRecord,
    BiasRecord,
    ConformRecord,
    ParcellationRecord,
    RestoreRecord,
    TissuesRecord,
)
from brainprior_bids.reports import atlas
from brainprior_bids.reports.sheet import (
    FAINT,
    GROUND,
    INK,
    XML,
    Contour,
    Labels,
    Mark,
    Outline,
    Panel,
    Picture,
    Sheet,
    description,
)
from brainprior_bids.reports.viewer import Layer, Page, write_viewer
from brainprior_bids.reports.volumes import (
    PLANES,
    Box,
    Section,
    Volume,
    bounding_box,
    load_volume,
    section,
    spread,
)
from brainprior_bids.typed_json import Record

R = TypeVar("R", bound=Record)
DISPLAY = "Neurological display: the left of the picture is the participant's left."
MARGIN_MM = 12.0
MASK_COLOUR = "#00d5ff"
LESION_COLOUR = "#ff8a65"
EXPECTED = "#69f0ae"
FOUND = "#ffd54f"
TISSUE_LOOKS = {
    "csf": ("fluid", "#4fc3f7", "dotted"),
    "gm": ("cortex", "#ffb74d", "dashed"),
    "wm": ("white matter", "#e6e6e6", "solid"),
}
"""Tissue -> name, colour and line."""
UNCERTAIN_PERCENT = (2.0, 20.0)
"""Posterior SD that the viewer colours, per cent of the upper end of the grey window."""
FACTORS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Ticks of the bias field's colour bar, with their inverses."""


@dataclass(frozen=True)
class ScanImages:
    """The images of one scan, read when first needed.

    Parameters
    ----------
    files : Mapping of role to path
        ``scan``, ``mask_scan``, ``log_bias`` and ``residual`` on the scan's grid; ``mask``,
        ``structures``, ``restored`` and ``uncertainty`` on the restored 1 mm grid;
        ``filled`` (the scan inpainted) and ``hidden`` (the lesion mask) on the scan's grid;
        ``restored_mni305``; the JSON files ``conform``, ``structures_table``, ``affine``,
        ``gains`` and ``restore``. Pictures that need an absent role are not drawn.
    image : str
        ``desc-`` of the result.
    """

    files: Mapping[str, Path]
    image: str = "restored"

    def __contains__(self, role: str) -> bool:
        return role in self.files

    def load(self, role: str) -> Volume:
        """The image of a role."""
        return load_volume(Path(self.files[role]))

    def record(self, role: str, kind: type[R]) -> R:
        """The record of a role; an empty one if the role is absent."""
        return kind.read(self.files[role]) if role in self.files else kind.empty()

    @cached_property
    def scan(self) -> Volume:
        """The input on its own grid, scanner units."""
        return self.load("scan")

    @cached_property
    def restored(self) -> Volume:
        """Posterior mean on the 1 mm grid, scanner units."""
        return self.load("restored")

    @cached_property
    def mask(self) -> Volume:
        """Brain mask on the 1 mm grid, 0 or 1."""
        return self.load("mask")

    @cached_property
    def result(self) -> Volume:
        """The image of the task on the 1 mm grid: the restored image, or the filled-in scan."""
        if "filled" in self.files:
            return self.load("filled").regrid(self.restored, order=1)
        return self.restored

    @cached_property
    def lesion(self) -> Volume | None:
        """The lesion mask at the 1 mm grid's voxels."""
        if "hidden" not in self.files:
            return None
        return self.load("hidden").regrid(self.restored, order=0)

    @cached_property
    def mask_scan(self) -> Volume:
        """Share of brain in each voxel of the scan's grid, 0 to 1."""
        if "mask_scan" in self.files:
            return self.load("mask_scan")
        return self.mask.regrid(self.scan, order=1)

    @cached_property
    def box(self) -> Box:
        """The part of the 1 mm grid that is drawn."""
        return bounding_box(self.mask, MARGIN_MM)

    @cached_property
    def slice_axis(self) -> int:
        """The axis across the slices: from ``conform``, else that of the largest voxel size."""
        axis = self.record("conform", ConformRecord).acquisition.slice_axis
        return axis if axis in (0, 1, 2) else int(np.argmax(self.scan.spacing_mm))

    @cached_property
    def window(self) -> tuple[float, float]:
        """Grey window, the same for the input and the restored image, scanner units.

        From 0 to the larger of the two 99.5th percentiles inside the mask.
        """
        high = [np.percentile(self.restored.data[self.mask.data > 0.5], 99.5)]
        inside = self.mask_scan.data > 0.5
        if inside.any():
            high.append(np.percentile(self.scan.data[inside], 99.5))
        return 0.0, float(max(high))

    @cached_property
    def unbiased(self) -> Volume:
        """The input divided by its bias field, if one was estimated."""
        if "log_bias" not in self.files:
            return self.scan
        return self.scan.like(self.scan.data * np.exp(-self.load("log_bias").data))

    @cached_property
    def by_tissue(self) -> dict[str, dict[str, Values]]:
        """``input``, ``restored`` -> tissue -> values, each image on its own voxels.

        A voxel has the label at its centre; voxels under a lesion mask are left out.
        """
        labels, values = self.load("structures"), {}
        for name, image in (("input", self.unbiased), ("restored", self.restored)):
            use = np.ones(image.data.shape, bool)
            if self.lesion is not None:
                use = self.lesion.regrid(image, order=0).data <= 0.5
            values[name] = tissue_values(image.data, labels.regrid(image, order=0).data, use)
        return values

    @property
    def footer(self) -> str:
        """How to read the orientation of pictures in the scan's own frame."""
        tilt = self.scan.tilt_degrees
        if tilt < 0.5:
            return f"{DISPLAY} Coordinates: scanner mm, RAS."
        return (
            f"{DISPLAY} Scan axes, tilted by up to {tilt:.0f}° from the scanner's; coordinates: "
            "scanner mm, RAS, at the centre of each section."
        )

    def sections(self, volume: Volume, counts: tuple[int, int, int]) -> list[Section]:
        """Sections of a 1 mm volume through the mask, ``counts`` along i, j and k."""
        return [
            section(volume, axis, index, self.box)
            for axis in range(3)
            for index in spread(self.mask, axis, counts[axis])
        ]


def make_reportlets(
    files: Mapping[str, Path], out_dir: Path, *, prefix: str, suffix: str
) -> list[Path]:
    """Draw every picture whose roles are in ``files``.

    Parameters
    ----------
    files : Mapping of role to path
        See ``ScanImages``; ``scan``, ``mask`` and ``restored`` are required.
    out_dir : Path
        Folder of the pictures; created if missing.
    prefix : str
        Entities of the scan, ``sub-01_ses-2``.
    suffix : str
        ``T1w``, ``T2w``, ``FLAIR`` ...

    Returns
    -------
    list of Path
        ``<prefix>[_space-MNI305]_desc-<what>_<suffix>.svg``, in the order of the report.

    Raises
    ------
    KeyError
        If a required role is absent.
    """
    for role in ("scan", "mask", "restored"):
        if role not in files:
            raise KeyError(f"make_reportlets: '{role}' is required, got {sorted(files)}.")
    images = ScanImages({role: Path(path) for role, path in files.items() if path is not None})
    paths = []
    for what, (needs, draw) in REPORTLETS.items():
        if what == "tissues" and "filled" in images:
            continue  # outside the lesion mask the result is the scan
        if what == "gains" and not images.record("gains", BiasRecord).gains:
            continue  # no slice gains were estimated, as for a 3-D scan
        if all(role in images for role in needs):
            space = "_space-MNI305" if what == "mni305" else ""
            path = Path(out_dir) / f"{prefix}{space}_desc-{what}_{suffix}.svg"
            paths.append(draw(images, path))
    return paths


def make_viewers(
    files: Mapping[str, Path],
    out_dir: Path,
    *,
    prefix: str,
    suffix: str,
    image: str = "restored",
) -> list[Path]:
    """Write the pages with three linked planes.

    Parameters
    ----------
    files, out_dir, prefix, suffix
        Those of ``make_reportlets``.
    image : str
        ``desc-`` of the result, to whose section in the report the pages lead.

    Returns
    -------
    list of Path
        ``<prefix>_desc-<what>_<suffix>.html``.
    """
    images, paths = ScanImages(files, image), []
    for what, (needs, write) in VIEWERS.items():
        if all(role in images for role in needs):
            paths.append(write(images, Path(out_dir) / f"{prefix}_desc-{what}_{suffix}.html"))
    return paths


def tissues_record(files: Mapping[str, Path]) -> TissuesRecord | None:
    """Signal and contrast by tissue, before and after.

    Parameters
    ----------
    files : Mapping of role to path
        See ``ScanImages``; ``scan``, ``mask``, ``restored`` and ``structures`` are required.

    Returns
    -------
    None for an inpainted scan (``filled``): outside the lesion mask it is unchanged.
    """
    if "filled" in files:
        return None
    values = ScanImages(files).by_tissue
    return TissuesRecord(**{name: tissue_metrics(image) for name, image in values.items()})


def draw_flicker(images: ScanImages, path: Path) -> Path:
    """Input and result at the same location; hovering switches between them.

    With a lesion mask the sections go through its middle, and its border is drawn.
    """
    sheet = Sheet(images.footer)
    n_samples = images.record("restore", RestoreRecord).n_samples
    result = "Scan, filled under the lesion mask" if "filled" in images else "Restored"
    lesion = images.lesion
    sheet.title(
        f"{result} (mean of {n_samples} samples)" if (n_samples or 1) > 1 else result,
        note="Hover over the picture, or focus it, to switch between input and result"
        + ("; orange: the lesion mask" if lesion is not None else ""),
        before="Input, interpolated linearly to the same grid",
    )
    before, after = images.scan.regrid(images.restored, order=1), images.result
    before = _dim_outside(before, images.mask)
    if "filled" in images:
        after = _dim_outside(after, images.mask)
    panels = []
    for axis in range(3):
        index = spread(images.mask if lesion is None else lesion, axis, 1)[0]
        new, old = (section(volume, axis, index, images.box) for volume in (after, before))
        layers: list[Picture | Contour] = [
            Picture(new, images.window),
            Picture(old, images.window, before=True),
        ]
        if lesion is not None:
            border = section(lesion, axis, index, images.box)
            layers.append(Contour(border, colour=LESION_COLOUR))
        panels.append(Panel(layers))
    sheet.row(panels)
    sheet.bar("gray", images.window, "scanner units")
    return sheet.save(path)


def draw_slices(images: ScanImages, path: Path) -> Path:
    """Sections across the slices: the input as measured, next to the restored image."""
    sheet = Sheet(images.footer)
    measured = images.scan.regrid(images.restored, order=0)
    thick = images.scan.spacing_mm[images.slice_axis]
    sheet.title(
        "First column: input as measured; second column: restored",
        note=f"{PLANES[images.slice_axis]} slices every {thick:.3g} mm, voxels not interpolated",
    )
    for axis in (axis for axis in range(3) if axis != images.slice_axis):
        # the sagittal section is off the midline, through a hemisphere
        index = spread(images.mask, axis, 2)[0] if axis == 0 else spread(images.mask, axis, 1)[0]
        sheet.row(
            [
                Panel(
                    [
                        Picture(
                            section(measured, axis, index, images.box), images.window, smooth=False
                        )
                    ]
                ),
                Panel([Picture(section(images.restored, axis, index, images.box), images.window)]),
            ]
        )
    return sheet.save(path)


def draw_uncertainty(images: ScanImages, path: Path) -> Path:
    """Standard deviation of the posterior, in scanner units and in % of the signal."""
    sd = images.load("uncertainty")
    inside = images.mask.data > 0.5
    if images.lesion is not None and "filled" in images:  # elsewhere the scan was kept
        sd = sd.regrid(images.restored, order=1)
        inside = images.lesion.data > 0.5
    where = "under the lesion mask" if "filled" in images else "inside the mask"
    floor = 0.1 * images.window[1]
    relative = sd.like(np.where(inside, 100 * sd.data / np.maximum(images.result.data, floor), 0))
    restore = images.record("restore", RestoreRecord)
    of = f" of {restore.n_samples} samples" if restore.n_samples else ""
    if restore.uncertainty_from == "prior":
        of = ", predicted by the prior"
    sheet = Sheet(images.footer)
    for volume, title, unit in (
        (sd.like(np.where(inside, sd.data, 0)), f"Standard deviation{of}", "scanner units"),
        (relative, "The same in % of the restored value", "%"),
    ):
        median, high = np.percentile(volume.data[inside], (50, 95))
        limits = (0.0, _round_up(float(np.percentile(volume.data[inside], 99.5))))
        sheet.title(title, note=f"{where}: median {median:.3g}, 95 % below {high:.3g} {unit}")
        sheet.row(
            [
                Panel([Picture(cut, limits, "inferno")])
                for cut in images.sections(volume, (1, 1, 1))
            ]
        )
        sheet.bar("inferno", limits, unit)
    return sheet.save(path)


def draw_mask(images: ScanImages, path: Path) -> Path:
    """Contours of brain and lesion mask on the input, in the input's own voxels."""
    box = bounding_box(images.mask_scan, 2 * MARGIN_MM)
    sheet = Sheet(images.footer)
    limits = (0.0, float(np.percentile(images.scan.data[images.mask_scan.data > 0], 99.5)))
    hidden = images.load("hidden") if "hidden" in images else None

    def panel(axis: int, index: int) -> Panel:
        layers: list[Picture | Contour] = [
            Picture(section(images.scan, axis, index, box), limits),
            Contour(section(images.mask_scan, axis, index, box), colour=MASK_COLOUR),
        ]
        if hidden is not None:
            layers.append(Contour(section(hidden, axis, index, box), colour=LESION_COLOUR))
        return Panel(layers)

    axes = [images.slice_axis, *(a for a in range(3) if a != images.slice_axis)]
    acquired = spread(images.mask_scan, axes[0], 8)
    sheet.title(
        "Brain mask on the input, slices as acquired", note="contour: half of the voxel is brain"
    )
    sheet.row([panel(axes[0], index) for index in acquired[:4]])
    sheet.row([panel(axes[0], index) for index in acquired[4:]])
    sheet.title("Across the slices")
    sheet.row(
        [panel(axis, index) for axis in axes[1:] for index in spread(images.mask_scan, axis, 2)]
    )
    if hidden is not None:
        sheet.title(
            "Through the lesion mask (orange)", note="measurements inside it were not used"
        )
        sheet.row([panel(axis, index) for axis in axes for index in spread(hidden, axis, 1)])
    return sheet.save(path)


def draw_structures(images: ScanImages, path: Path) -> Path:
    """The labelled structures over the restored image."""
    labels = images.load("structures")
    values = np.unique(labels.data).astype(int)
    values = values[values > 0]
    rows = labels.like(np.searchsorted(values, labels.data) + 1)
    rows.data[labels.data < 0.5] = 0
    table = np.array([(0, 0, 0), *(atlas.colour(v) for v in values)], np.uint8)
    sheet = Sheet(images.footer)
    sheet.title("Structures over the restored image", note="right-sided structures are darker")
    off_midline = spread(images.mask, 0, 2)[0]
    places = [(2, index) for index in spread(images.mask, 2, 3)]
    places += [(0, off_midline), *((1, index) for index in spread(images.mask, 1, 2))]
    panels = [
        Panel(
            [
                Picture(section(images.restored, axis, index, images.box), images.window),
                Labels(section(rows, axis, index, images.box), table),
            ]
        )
        for axis, index in places
    ]
    sheet.row(panels[:3])
    sheet.row(panels[3:])
    names = {int(v): atlas.name(int(v)) for v in values if not atlas.is_right(int(v))}
    sheet.legend(
        [(_hex(atlas.colour(v)), name.removeprefix("Left-")) for v, name in names.items()]
    )
    return sheet.save(path)


def draw_mni305(images: ScanImages, path: Path) -> Path:
    """The restored image in MNI305 space, with its own and the expected structure centroids."""
    volume = images.load("restored_mni305")
    low, high = (-80, -116, -72), (80, 80, 88)  # the average brain and a margin, mm
    box = tuple(
        (round(a - volume.affine[n, 3]), round(b - volume.affine[n, 3]))
        for n, (a, b) in enumerate(zip(low, high, strict=True))
    )
    limits = (0.0, float(np.percentile(volume.data[volume.data > 0], 99.5)))
    affine = images.record("affine", AffineRecord)
    to_mni305 = np.eye(4) if affine.matrix is None else np.array(affine.matrix)
    table = images.record("structures_table", ParcellationRecord).table
    pairs = atlas.centroid_pairs(table, to_mni305)
    sheet = Sheet(f"{DISPLAY} MNI305 mm, RAS; grid lines every 20 mm.")
    sheet.title(
        "Restored image in MNI305 space",
        note="green: expected outline and centroids; yellow ×: centroids found, within 6 mm",
    )
    if affine.median_residual_mm is not None:
        sheet.title(*_fit(affine))
    panels = []
    for entry in atlas.outlines():
        axis, mm = int(entry["axis"]), float(entry["mm"])
        cut = section(volume, axis, round(mm - volume.affine[axis, 3]), box)
        horizontal, vertical = (a for a in range(3) if a != axis)
        corner = np.array(  # upper left, mm
            [
                volume.affine[horizontal, 3] + box[horizontal][0] - 0.5,
                volume.affine[vertical, 3] + box[vertical][1] - 0.5,
            ]
        )

        def place(points: Any, corner: NDArray[np.float64] = corner) -> NDArray[np.float64]:
            """MNI305 mm to mm from the left and upper edge."""
            return (np.asarray(points, float) - corner) * (1, -1)

        layers: list[Picture | Outline | Mark] = [Picture(cut, limits)]
        layers += [Outline(place(line), EXPECTED) for line in entry["lines"]]
        for name, expected, mapped in pairs:
            if abs(expected[axis] - mm) > 6:
                continue
            x, y = place(expected[[horizontal, vertical]])
            x2, y2 = place(mapped[[horizontal, vertical]])
            layers += [
                Mark(x, y, "line", FOUND, x2, y2),
                Mark(x, y, "ring", EXPECTED, hint=f"{name}, expected"),
                Mark(x2, y2, "cross", FOUND, hint=f"{name}, found"),
            ]
        left, top = corner
        rulers = [
            *((x - left, -1.0, x) for x in _twenties(left, left + cut.width_mm)),
            *((-1.0, top - y, y) for y in _twenties(top - cut.height_mm, top)),
        ]
        panels.append(Panel(layers, rulers))
    for first in range(0, len(panels), 3):
        sheet.row(panels[first : first + 3])
    return sheet.save(path)


def _fit(affine: AffineRecord) -> tuple[str, str]:
    """A title with the residuals of the affine, and a note with its degrees of freedom."""
    far, used = f"{affine.median_residual_mm:.1f} mm", affine.used
    text = f"Median distance of {len(used) or 'the'} centroids from the expected ones: {far}"
    if affine.hull_residual_mm is not None:
        text += f"; of the brain's extent: {affine.hull_residual_mm:.1f} mm"
    return text, f"affine with {affine.dof} degrees of freedom" if affine.dof else ""


def draw_bias(images: ScanImages, path: Path) -> Path:
    """The multiplicative bias field inside the mask, over the scan, on the scan's grid."""
    field = images.load("log_bias")
    box = bounding_box(images.mask_scan, MARGIN_MM)
    inside = images.mask_scan.data > 0.5
    low, high = np.percentile(field.data[inside], (1, 99))
    reach = max(float(high), -float(low), 0.05)
    dim = (0.0, 3 * images.window[1])
    sheet = Sheet(images.footer)
    sheet.title(
        "Bias field",
        note=f"inside the mask: {np.exp(low):.2f} to {np.exp(high):.2f} (1st to 99th percentile)",
    )
    sheet.row(
        [
            Panel(
                [
                    Picture(section(images.scan, axis, index, box), dim),
                    Picture(
                        section(field, axis, index, box),
                        (-reach, reach),
                        "RdBu_r",
                        smooth=False,
                        inside=section(images.mask_scan, axis, index, box),
                    ),
                ]
            )
            for axis in range(3)
            for index in spread(images.mask_scan, axis, 1)
        ]
    )
    ticks, last = [(0.0, "1")], 0.0
    for factor in FACTORS:
        if np.log(factor) - last >= reach / 5:  # room for the label
            last = float(np.log(factor))
            ticks += [(-last, f"{1 / factor:.2f}"), (last, f"{factor:g}")]
    sheet.bar("RdBu_r", (-reach, reach), "factor on the signal", ticks)
    return sheet.save(path)


def draw_gains(images: ScanImages, path: Path) -> Path:
    """The gain of every slice, in per cent; those that could not be compared are hollow."""
    bias = images.record("gains", BiasRecord)
    percent = 100 * (np.array(bias.gains) - 1)
    compared = np.array(bias.compared, bool)
    at = np.arange(1, len(percent) + 1)
    plane = PLANES[images.slice_axis]
    figure, axes = _plot()
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.plot(at, percent, color="#4fc3f7", linewidth=1)
    axes.plot(at[compared], percent[compared], "o", color="#4fc3f7", markersize=4)
    axes.plot(
        at[~compared], percent[~compared], "o", color="#4fc3f7", markersize=4, fillstyle="none"
    )
    reach = max(1.0, 1.15 * float(np.abs(percent).max()))
    axes.set_ylim(-reach, reach)
    axes.set_xlim(0, len(at) + 1)
    axes.set_xlabel(f"{plane.lower()} slice", color=INK)
    axes.set_ylabel("gain corrected, %", color=INK)
    title = (
        f"Alternation {abs(bias.alternation_percent or 0):.2f} ± "
        f"{bias.alternation_se_percent or 0:.2f} %, "
        f"random gains SD {bias.random_sd_percent or 0:.1f} %: "
        + ("corrected" if bias.applied else "not corrected")
    )
    axes.set_title(title, color=INK, fontsize=10)
    return _save_figure(
        figure,
        path,
        f"Gain of {len(percent)} {plane} slices, up to {np.abs(percent).max():.1f} %. {title}",
    )


def draw_histogram(images: ScanImages, path: Path) -> Path:
    """Distribution of the values inside the mask, before and after."""
    inside = images.mask_scan.data > 0.5
    high = images.window[1] * 1.15
    bins = _bins(images.scan.data[inside], high)
    curves: list[tuple[NDArray[np.float32], str, str]] = [
        (images.scan.data[inside], "input", "#ffb74d"),
        (images.restored.data[images.mask.data > 0.5], "restored", "#4fc3f7"),
    ]
    if "log_bias" in images:
        curves.insert(1, (images.unbiased.data[inside], "input without bias field", "#a1887f"))
    figure, axes = _plot()
    for values, label, colour in curves:
        density, _ = np.histogram(values, bins=bins, density=True)
        axes.stairs(density / density.max(), bins, label=label, color=colour, linewidth=1.4)
    axes.set_xlim(0, high)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([])
    axes.set_xlabel("value inside the brain mask, scanner units", color=INK)
    axes.set_ylabel("share of voxels, peak = 1", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    medians = ", ".join(f"{label} {np.median(values):.4g}" for values, label, _ in curves)
    return _save_figure(figure, path, f"Medians in scanner units: {medians}")


def draw_tissues(images: ScanImages, path: Path) -> Path:
    """Distribution of the values of each tissue, before and after."""
    high = images.window[1] * 1.15
    bins = _bins(images.scan.data[images.mask_scan.data > 0.5], high)
    figure = Figure(figsize=(11, 3.2), facecolor=GROUND, layout="constrained")
    before = "input, without bias field" if "log_bias" in images else "input"
    panels = zip(figure.subplots(1, 2), images.by_tissue.items(), strict=True)
    words = []
    for axes, (name, tissues) in panels:
        _dress(axes)
        for tissue, values in tissues.items():
            if values.size >= FEWEST:
                label, colour, line = TISSUE_LOOKS[tissue]
                density, _ = np.histogram(values, bins=bins, density=True)
                peak = max(float(density.max()), 1e-12)
                axes.stairs(
                    density / peak, bins, label=label, color=colour, linestyle=line, linewidth=1.4
                )
                words.append(f"{name} {label} {np.median(values):.4g}")
        axes.set_title(before if name == "input" else name, color=INK, fontsize=10)
        axes.set_xlim(0, high)
        axes.set_ylim(0, 1.05)
        axes.set_yticks([])
        axes.set_xlabel("scanner units", color=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=INK)
    return _save_figure(figure, path, f"Medians in scanner units: {', '.join(words)}")


def draw_residual(images: ScanImages, path: Path) -> Path:
    """The input minus its prediction by the restored image, on the scan's grid."""
    residual = images.load("residual")
    box = bounding_box(images.mask_scan, MARGIN_MM)
    inside = images.mask_scan.data > 0.5
    reach = _round_up(float(np.percentile(np.abs(residual.data[inside]), 99.5)))
    dim = (0.0, 3 * images.window[1])
    sheet = Sheet(images.footer)
    rms = float(np.sqrt(np.mean(residual.data[inside] ** 2)))
    sheet.title(
        "Input minus the input predicted from the restored image",
        note=f"inside the mask: RMS {rms:.3g} times the noise",
    )
    sheet.row(
        [
            Panel(
                [
                    Picture(section(images.scan, axis, index, box), dim),
                    Picture(
                        section(residual, axis, index, box),
                        (-reach, reach),
                        "RdBu_r",
                        smooth=False,
                        inside=section(images.mask_scan, axis, index, box),
                    ),
                ]
            )
            for axis in range(3)
            for index in spread(images.mask_scan, axis, 1)
        ]
    )
    sheet.bar("RdBu_r", (-reach, reach), "standard deviations of the noise")
    return sheet.save(path)


REPORTLETS: dict[str, tuple[tuple[str, ...], Callable[[ScanImages, Path], Path]]] = {
    "flicker": ((), draw_flicker),
    "slices": ((), draw_slices),
    "uncertainty": (("uncertainty",), draw_uncertainty),
    "residual": (("residual",), draw_residual),
    "mask": ((), draw_mask),
    "structures": (("structures",), draw_structures),
    "mni305": (("restored_mni305",), draw_mni305),
    "bias": (("log_bias",), draw_bias),
    "gains": (("gains",), draw_gains),
    "histogram": ((), draw_histogram),
    "tissues": (("structures",), draw_tissues),
}
"""``desc`` -> roles needed besides scan, mask and restored, and the function that draws."""


def view_before_after(images: ScanImages, path: Path) -> Path:
    """The input, interpolated linearly, over the result."""
    high = images.window[1]
    before = images.scan.regrid(images.restored, order=1)
    layer = Layer(before, "input", (0.001 * high, high), "gray")
    note = (
        "The input, interpolated linearly, is drawn over the result, on the same grid and with "
        "the same grey window: move the slider to the left to see the result."
    )
    page = _page(images, path, "Input over result", note)
    return write_viewer(path, images.result, images.window, layer, images.box, page)


def view_uncertainty(images: ScanImages, path: Path) -> Path:
    """The standard deviation of the posterior, over the result."""
    sd = images.load("uncertainty")
    white = images.window[1]
    share = sd.like(sd.data * (100 / white))
    layer = Layer(share, "colours", UNCERTAIN_PERCENT, "inferno", opacity=0.5, scale=True)
    low, high = UNCERTAIN_PERCENT
    note = (
        "Colours: standard deviation (SD) of the true value about the restored one, in per cent "
        f"of the value that is displayed as white ({white:.4g} in the units of the scan; this is "
        f"not the value of white matter). SDs below {low:g} % are not coloured, and those above "
        f"{high:g} % have the last colour of the bar."
    )
    page = _page(images, path, "Uncertainty (SD) over result", note)
    return write_viewer(path, images.result, images.window, layer, images.box, page)


def _page(images: ScanImages, path: Path, title: str, note: str) -> Page:
    """The words of a viewer's page, which will be in ``sub-XX/figures``."""
    name = BIDSName.parse(path.name)
    scan = result_name(BIDSName.parse(name.derivative(extension="", desc=None)), images.image)
    report = quote(f"../../sub-{name.get('sub')}.html") + f"#{quote(scan)}"
    return Page(title, note, scan, report)


VIEWERS: dict[str, tuple[tuple[str, ...], Callable[[ScanImages, Path], Path]]] = {
    "viewer": ((), view_before_after),
    "viewerUncertainty": (("uncertainty",), view_uncertainty),
}
"""``desc`` of a page with linked planes -> roles and function, as in ``REPORTLETS``."""


def _dim_outside(volume: Volume, mask: Volume) -> Volume:
    """Reduce everything outside the mask to a third of its brightness."""
    return volume.like(volume.data * np.where(mask.data > 0.5, 1.0, 0.33))


def _round_up(value: float) -> float:
    """Round up to two leading digits, for readable limits of colour bars."""
    if value <= 0:
        return 1.0
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(np.ceil(value / step) * step)


def _bins(values: NDArray[np.float32], high: float) -> NDArray[np.float64]:
    """About 100 bin edges from 0 to ``high``, each bin a whole number of grey levels wide.

    Scans contain integers: with bins that are narrower than a grey level, or that contain unequal
    numbers of levels, the histogram would look like a comb.
    """
    levels = np.unique(values)
    step = float(np.diff(levels).min()) if 1 < levels.size < 20_000 else 0.0
    width = high / 100
    if step > width / 20:
        width = step * max(1.0, np.round(width / step))
    return np.arange(-width / 2, high + width, width)


def _twenties(low: float, high: float) -> list[float]:
    """Multiples of 20 strictly between two values."""
    return [float(v) for v in range(-200, 201, 20) if low < v < high]


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _plot() -> tuple[Figure, Axes]:
    """An empty plot in the colours of the report."""
    figure = Figure(figsize=(11, 3.2), facecolor=GROUND, layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    """Apply the colours of the report."""
    axes.set_facecolor(GROUND)
    axes.tick_params(colors=FAINT)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def _save_figure(figure: Figure, path: Path, words: str) -> Path:
    """A matplotlib figure as an SVG whose text stays text; ``words`` describe it."""
    stream = StringIO()
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": path.name,
            "font.family": ["Helvetica", "Arial", "DejaVu Sans"],
        }
    ):
        figure.savefig(stream, format="svg", facecolor=GROUND, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
    head, _, rest = text.partition(">")
    return write_text(path, f"{XML}{head}>\n{description(words)}{rest}")
