# SPDX-License-Identifier: Apache-2.0
"""The pages mention only options, files and names that exist."""

from __future__ import annotations

import importlib
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from brainprior_bids.cli.command import COMMANDS
from brainprior_bids.cli.parser import build_parser
from brainprior_bids.evaluation import stamp
from brainprior_bids.evaluation.stamp import (
    DIGITS,
    check_pages,
    check_tables,
    read_stamp,
    shipped_weights,
)
from brainprior_bids.evaluation.studies import STUDIES

DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("engine", "anatomy", "bids")
MEASURED = json.loads((files("brainprior_bids") / "data" / "measured.json").read_text())
"""What reports quote; reports of other weights say "not measured" (``reports/measured.py``)."""


def test_the_method_page_names_code_that_exists():
    names = re.findall(rf"`((?:{'|'.join(PARTS)})\.[\w.]+)`", (DOCS / "method.md").read_text())
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):  # the longest part that is a module
            try:
                result = importlib.import_module("brainprior_bids." + ".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[cut:]:
                result = getattr(result, attribute)
            break
        else:
            pytest.fail(f"{name}: no such module")


def test_the_comparison_names_options_that_exist():
    """First column: brainprior's option, or the other program's in brackets."""
    ours = {option for action in build_parser()._actions for option in action.option_strings}
    text = (DOCS / "comparison.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `-")]
    named = {option for row in rows for option in re.findall(r"(?<![\w-])--?[\w-]+", row)}
    assert len(named) > 50
    assert named <= ours


def table_of(study, page):
    """Lines of a study's table; of the page, until the study is remade with shipped weights.

    Both state their weights, which must be those of ``data/measured.json``.
    """
    weights = MEASURED[study]["prior_sha256"][:DIGITS]
    path = DOCS / "tables" / f"{study}.md"
    if path.is_file():
        assert read_stamp(path.read_text(), path.name).weights == weights
        return path.read_text().splitlines()
    text = (DOCS / page).read_text()
    assert f"weights {weights}" in " ".join(text.split())
    return text.splitlines()


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_coverage_that_reports_quote_is_that_of_the_table():
    scans, said = "", {}
    for cells in map(cells_of, table_of("coverage", "tasks/samples.md")):
        if len(cells) == 6 and cells.pop(2) != "0":  # with the network's own error
            continue
        if len(cells) == 5 and " mm, " in cells[0] + scans:  # the next conditions follow below
            scans = cells[0] or scans
            shares = [int(share) for share in re.findall(r"(\d+) %", " ".join(cells[2:4]))]
            said[scans, re.sub(r"^\d+ ", "", cells[1])] = shares
    assert said == {
        (row["scans"], row["of"].removeprefix("whole ")): [row["50"], row["90"]]
        for row in MEASURED["coverage"]["rows"]
    }


def test_the_lesions_that_reports_quote_are_those_of_the_table():
    rows = [cells for cells in map(cells_of, table_of("lesions", "usage.md")) if len(cells) == 7]
    for row in MEASURED["lesions"]["rows"]:
        start = [row["scans"], row["size"].removesuffix(" across")]
        (cells,) = (cells for cells in rows if cells[:2] == start)
        kept = [float(value) for value in re.findall(r"\d\.\d\d", " ".join(cells[2:6]))]
        assert (min(kept), max(kept)) == (row["least"], row["most"])


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        patterns = re.findall(r"^([\w*/-]+)$", index, re.MULTILINE)
        assert page.stem == "index" or any(
            re.fullmatch(pattern.replace("*", ".*"), page.stem) for pattern in patterns
        ), page.name


def test_the_tables_are_of_the_shipped_weights_and_on_a_page():
    """Or listed as older; ``docs/conf.py`` refuses to build the pages otherwise."""
    assert check_tables(DOCS / "tables", shipped_weights(), DOCS.parent / stamp.MEASURED) == []
    assert check_pages(DOCS) == []
    pages = "".join(
        path.read_text() for path in DOCS.rglob("*.md") if path.parent.name != "tables"
    )
    for table in (DOCS / "tables").glob("*.md"):
        assert re.search(rf"```{{include}} (\.\./)?tables/{table.name}", pages)
        assert not re.search(r"[\s'\"`=]/\w", table.read_text()), table.name  # no absolute path


def test_every_study_has_a_row_on_the_evaluation_page():
    rows = re.findall(r"^\| `(\w[\w-]+)` \|", (DOCS / "evaluation.md").read_text(), re.MULTILINE)
    assert rows == list(STUDIES)


def test_the_readme_quotes_the_restoration_table():
    """T1w, 5 mm, noise 0.01: README cannot include the table."""
    lines = (DOCS / "tables" / "restoration.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| T1w, 5 mm, noise 0.01 |"))
    cells = [cell.strip(" *") for cell in row.split("|")[1:-1]]
    psnr = [f"{float(cells[column]):.1f}" for column in (1, 3, 5)]  # cubic, TV, restored
    readme = (DOCS.parent / "README.md").read_text().replace("*", "")
    assert f"| PSNR, dB | {' | '.join(psnr)} |" in readme
    assert f"| SSIM | {cells[9].replace(', ', ' | ')} |" in readme
    assert f"RMS error / posterior SD = {cells[11]};" in readme


def test_every_command_is_on_its_page_and_in_the_help():
    page = (DOCS / "commands.md").read_text()
    assert set(re.findall(r"^## (.*)$", page, re.M)) == set(COMMANDS)
    listed = build_parser().format_help().partition("other commands")[2].partition("exit codes")[0]
    assert set(re.findall(r"^  ([a-z-]+) ", listed, re.M)) == set(COMMANDS)
