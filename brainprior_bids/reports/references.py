# SPDX-License-Identifier: Apache-2.0
"""The references of the methods text, from ``data/reports/boilerplate.bib``."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from importlib.resources import files

MOST_AUTHORS = 6
"""A list of more authors is cut after these; the BibTeX entry has all of them."""


def bibtex() -> dict[str, str]:
    """Key -> BibTeX of every reference."""
    text = (files("brainprior_bids") / "data" / "reports" / "boilerplate.bib").read_text("utf-8")
    return {
        entry[1]: f"{entry[0]}\n" for entry in re.finditer(r"@\w+\{(\w+),.*?\n\}", text, re.DOTALL)
    }


def references() -> dict[str, dict[str, str]]:
    """Key -> fields (author, title, year …) of every reference."""
    return {
        key: dict(re.findall(r"(\w+) = \{(.*?)\},?\n", entry)) for key, entry in bibtex().items()
    }


def html_list(keys: Iterable[str]) -> str:
    """References as a numbered list, in the order of ``keys``."""
    known = references()
    items = (_item({name: html.escape(text) for name, text in known[key].items()}) for key in keys)
    return "<ol>\n" + "\n".join(items) + "\n</ol>\n"


def _item(entry: dict[str, str]) -> str:
    """One entry, whose fields are escaped."""
    url = entry.get("url") or f"https://doi.org/{entry['doi']}"
    shown = url.replace("https://arxiv.org/abs/", "arXiv:").replace("https://doi.org/", "doi:")
    text = f"{_authors(entry['author'])} {entry['title']}. {_place(entry)}{entry['year']}."
    return f'<li>{text} <a href="{url}">{shown}</a></li>'


def _authors(field: str) -> str:
    """``A, B. B., C, D. D.``, ending in a full stop; of a long list the first, and "et al."."""
    names = field.split(" and ")
    if len(names) > MOST_AUTHORS:
        names = [*names[:MOST_AUTHORS], "et al."]
    return f"{', '.join(names).removesuffix('.')}."


def _place(entry: dict[str, str]) -> str:
    """Journal or proceedings, volume, number and pages; empty for a preprint."""
    title = entry.get("journal") or entry.get("booktitle")
    if title is None:
        return ""
    number = f"({entry['number']})" if "number" in entry else ""
    volume = f" {entry['volume']}{number}" if "volume" in entry else ""
    pages = f", {entry['pages'].replace('--', '–')}" if "pages" in entry else ""
    return f"<em>{title}</em>{volume}{pages}, "
