# SPDX-License-Identifier: Apache-2.0
"""Imports go one way, and no module uses another's private names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"engine", "settings", "records", "typed_json", "__init__"},
    {"bids", "anatomy", "scan"},
    {"interfaces", "reports"},
    {"workflows"},
    {"run"},
    {"cli", "__main__"},
)
"""From the bottom: a part may import its own layer and those before it."""
DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
COMMANDS = {"training", "evaluation"}
"""Used by the command line and by each other; they may import all but ``cli`` and ``run``."""


def modules():
    for folder, package in (("brainprior_bids", ""), ("workflows", "workflows.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = package + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            yield name, ast.parse(path.read_text())


MODULES = dict(modules())


def imported(tree):
    """(module below ``brainprior_bids``, names taken from it) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("brainprior_bids"):
            inner = node.module.removeprefix("brainprior_bids").lstrip(".")
            names = [alias.name for alias in node.names]
            yield inner or "__init__", names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("brainprior_bids."):
                    yield alias.name.removeprefix("brainprior_bids."), []


def part_of(module):
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    own = part_of(module)
    for other, names in imported(MODULES[module]):
        part = part_of(other) if other != "__init__" else (names[0] if names else "__init__")
        if part not in DEPTH and part not in COMMANDS:
            part = "__init__"  # __version__
        if part == own:
            continue
        if own in COMMANDS:
            assert part in COMMANDS or DEPTH[part] < DEPTH["workflows"], f"{module} -> {other}"
        elif part in COMMANDS:
            assert own == "cli", f"{module} -> {other}"
        else:
            assert DEPTH[part] <= DEPTH[own], f"{module} -> {other}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_private_names_of_another(module):
    tree = MODULES[module]
    taken, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("brainprior_bids"):
            taken += [alias.name for alias in node.names]
            modules |= {alias.asname or alias.name for alias in node.names}
    assert [name for name in taken if name.startswith("_") and name != "__version__"] == []
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    }
    assert used == set()
