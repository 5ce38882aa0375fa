# SPDX-License-Identifier: Apache-2.0
"""The pages name things that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from brainprior_bids.cli.parser import build_parser

DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("engine", "anatomy", "bids")


def test_the_method_page_names_code_that_exists():
    names = re.findall(rf"`((?:{'|'.join(PARTS)})\.[\w.]+)`", (DOCS / "method.md").read_text())
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):  # the longest part that is a module
            try:
                found = importlib.import_module("brainprior_bids." + ".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[cut:]:
                found = getattr(found, attribute)
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


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        patterns = re.findall(r"^([\w*/-]+)$", index, re.MULTILINE)
        assert page.stem == "index" or any(
            re.fullmatch(pattern.replace("*", ".*"), page.stem) for pattern in patterns
        ), page.name
