# SPDX-License-Identifier: Apache-2.0
"""nireports' assembler with the pictures grouped by scan, and with an offline template.

The pictures are found by their names in ``sub-XX/figures``. The index of nireports would walk the
whole derivative folder, and supports only a fixed list of entities (see
``docs/decisions/report-assembler.md``).
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import yaml
from nireports.assembler.report import Report, SubReport
from nireports.assembler.reportlet import Reportlet

from brainprior_bids.bids.files import temporary_folder
from brainprior_bids.bids.names import BIDSName, result_name, split_desc
from brainprior_bids.engine.errors import InputError

SPECIFICATION = "subject.yml"
TEMPLATE = "report.html.j2"
VIEWER_LINKS = {
    "viewer": "input and result, with a slider between them",
    "viewerUncertainty": "uncertainty over the result",
}
"""``desc`` of a viewer's page -> text of its link."""
HEAD = 4096
"""Characters at the start of a picture, with its description and the names of its states."""


@dataclass
class TextReportlet:
    """A piece of HTML in place of a picture, with the attributes that the template reads."""

    name: str
    html: str
    title: str | None = None
    subtitle: str | None = None
    description: str | None = None
    components: list[tuple[str, str | None]] = field(init=False)

    def __post_init__(self) -> None:
        self.components = [(self.html, None)]


@dataclass(frozen=True)
class TextSection:
    """A section without pictures."""

    name: str
    html: str


@dataclass(frozen=True)
class ScanSection:
    """A section with a scan's facts, its pictures, and the form to rate it."""

    scan: str
    html: str
    rating: str


class FigureIndex:
    """The pictures of one subject; answers the query that nireports' ``Reportlet`` makes.

    Parameters
    ----------
    output_dir : Path
        Root of the derivative data set.
    subject : str
        Label, without ``sub-``.
    """

    def __init__(self, output_dir: Path, subject: str) -> None:
        self.root = str(output_dir)
        self._paths: dict[tuple[str, str], Path] = {}
        for path in sorted((output_dir / f"sub-{subject}" / "figures").glob("sub-*_*.*")):
            try:
                name = BIDSName.parse(path.name)
            except InputError:  # not a picture of a scan
                continue
            image, desc = split_desc(name.get("desc") or "")
            scan = name.derivative(extension="", space=None, desc=None)
            self._paths[result_name(BIDSName.parse(scan), image), desc] = path

    def get(self, *, scan: str, desc: str) -> list[SimpleNamespace]:
        """The picture ``desc`` of a scan, as a list with one entry or none."""
        path = self._paths.get((scan, desc))
        return [] if path is None else [SimpleNamespace(path=str(path), entities={})]


class SubjectReport(Report):
    """A nireports report whose sections are text and the pictures of scans, in a given order."""

    __slots__ = ()

    def index(self, config: Mapping[str, Any]) -> None:
        """Make the sections; called by ``Report`` when it is constructed."""
        out_dir = Path(config["out_dir"])
        figures: FigureIndex = config["metadata"]["figures"]
        for section in config["metadata"]["sections"]:
            if isinstance(section, TextSection):
                text = TextReportlet(f"{section.name}-text", section.html)
                self.sections.append(SubReport(section.name, reportlets=[text]))
                continue
            facts = section.html + _viewers(figures, section.scan, out_dir)
            reportlets: list[Any] = [TextReportlet(f"{section.scan}-facts", facts)]
            for entry in config["reportlets"]:
                settings = {**entry, "name": f"{section.scan}-{entry['bids']['desc']}"}
                reportlet = Reportlet(
                    figures, config=settings, out_dir=out_dir, bids_filters={"scan": section.scan}
                )
                if not reportlet.is_empty():
                    (picture,) = figures.get(scan=section.scan, desc=entry["bids"]["desc"])
                    reportlet.components = [
                        (
                            _accessible(
                                content, entry, reportlet.name, section.scan, Path(picture.path)
                            ),
                            caption,
                        )
                        for content, caption in reportlet.components
                    ]
                    reportlets.append(reportlet)
            rating = TextReportlet(
                f"{section.scan}-rating", section.rating, subtitle="Your rating"
            )
            reportlets.append(rating)
            self.sections.append(SubReport(section.scan, reportlets=reportlets))


def _viewers(figures: FigureIndex, scan: str, out_dir: Path) -> str:
    """A paragraph with links to the scan's viewer pages; empty if there are none."""
    links = []
    for desc, text in VIEWER_LINKS.items():
        for page in figures.get(scan=scan, desc=desc):
            address = quote(os.path.relpath(page.path, out_dir))
            links.append(f'<a href="{address}">{text}</a>')
    if not links:
        return ""
    return f'<p class="viewers">View in three linked planes: {" · ".join(links)}</p>\n'


def _accessible(
    content: str, entry: Mapping[str, Any], name: str, scan: str, picture: Path
) -> str:
    """A picture's HTML with an alternative text; a flicker also gets links to its states.

    The links set the fragment of the picture's address (``reports.sheet.FLICKER``), which needs
    neither a pointer nor a script.
    """
    with picture.open(encoding="utf-8") as stream:
        start = stream.read(HEAD)
    desc = re.search(r"<desc>(.*?)</desc>", start, re.DOTALL)
    alt = html.escape(f"{scan}: {entry['alt']}" + (f" {html.unescape(desc[1])}." if desc else ""))
    content = content.replace("<img ", f'<img alt="{alt}" ', 1)
    content = content.replace("<object ", f'<object name="{name}" aria-label="{alt}" ', 1)
    address = re.search(r'<object [^>]*data="([^"]*)"', content)
    if address is None or 'id="input"' not in start:  # earlier versions had no states
        return content
    states = (
        ("input", "input"),
        ("result", "result"),
        ("alternate", "alternate on hover or focus"),
    )
    links = " · ".join(
        f'<a href="{address[1]}#{state}" target="{name}">{text}</a>' for state, text in states
    )
    return f'{content}<p class="states">Show: {links}</p>\n'


def assemble(
    out_file: Path,
    *,
    title: str,
    subject: str,
    sections: Sequence[TextSection | ScanSection],
) -> Path:
    """Write the report of one subject atomically.

    Parameters
    ----------
    out_file : Path
        A file in the root of the derivative data set, so that links to pictures are relative.
    title : str
        Title of the page.
    subject : str
        Label, without ``sub-``.
    sections : sequence of TextSection or ScanSection
        In the order of the report.
    """
    data = files("brainprior_bids") / "data" / "reports"
    specification = yaml.safe_load((data / SPECIFICATION).read_text(encoding="utf-8"))
    with temporary_folder("report", out_file.parent) as folder:
        bootstrap = Path(folder) / SPECIFICATION
        bootstrap.write_text(
            yaml.safe_dump(
                {**specification, "title": title, "template_path": str(data / TEMPLATE)}
            ),
            encoding="utf-8",
        )
        draft = Path(folder) / out_file.name
        report = SubjectReport(
            out_file.parent,
            None,
            bootstrap_file=bootstrap,
            out_filename=str(draft),
            plugins=[],
            metadata={
                "figures": FigureIndex(out_file.parent, subject),
                "sections": list(sections),
            },
        )
        report.generate_report()
        os.replace(draft, out_file)
    return out_file
