# SPDX-License-Identifier: Apache-2.0
"""The pages name things that exist."""

from __future__ import annotations

import importlib
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from brainprior_bids.cli.parser import build_parser
from brainprior_bids.evaluation.stamp import check_tables, shipped_prior

DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("engine", "anatomy", "bids")


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
    """First column: ours, and theirs in brackets where we have none."""
    ours = {option for action in build_parser()._actions for option in action.option_strings}
    text = (DOCS / "comparison.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `-")]
    named = {option for row in rows for option in re.findall(r"(?<![\w-])--?[\w-]+", row)}
    assert len(named) > 50
    assert named <= ours


def test_the_reports_figures_are_those_of_the_pages_and_both_name_their_weights():
    """Reports of other weights say "not measured" (``reports/measured.py``)."""
    content = json.loads((files("brainprior_bids") / "data" / "measured.json").read_text())
    for page in ("tasks/samples.md", "usage.md"):
        text = " ".join((DOCS / page).read_text().split())
        assert f"weights {content['prior_sha256'][:12]}" in text, page
    scans, messages = "", {}
    for line in (DOCS / "tasks" / "samples.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and " mm, " in cells[0] + scans:  # below a condition the next ones' is
            scans = cells[0] or scans
            held_in = re.findall(r"(\d+) %", " ".join(cells[2:4]))
            messages[scans, re.sub(r"^\d+ ", "", cells[1])] = held_in
    rows = content["coverage"]["rows"]
    assert messages == {
        (row["scans"], row["of"].removeprefix("whole ")): [str(row["50"]), str(row["90"])]
        for row in rows
    }
    lines = (DOCS / "usage.md").read_text().splitlines()
    for row in content["lesions"]["rows"]:
        start = f"| {row['scans']} | {row['size'].removesuffix(' across')} |"
        (line,) = (line for line in lines if line.startswith(start))
        cells = line.removeprefix(start).split("|")[:4]
        kept = [float(value) for cell in cells for value in cell.split(",")]
        assert (min(kept), max(kept)) == (row["least"], row["most"])


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        patterns = re.findall(r"^([\w*/-]+)$", index, re.MULTILINE)
        assert page.stem == "index" or any(
            re.fullmatch(pattern.replace("*", ".*"), page.stem) for pattern in patterns
        ), page.name


def test_the_tables_are_of_the_shipped_weights_and_on_the_evaluation_page():
    """Or listed as older; ``docs/conf.py`` refuses to build the pages otherwise."""
    assert check_tables(DOCS / "tables", shipped_prior()) == []
    page = (DOCS / "evaluation.md").read_text()
    for table in (DOCS / "tables").glob("*.md"):
        assert f"```{{include}} tables/{table.name}" in page
        assert not re.search(r"[\s'\"`=]/\w", table.read_text()), table.name  # no absolute path


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
