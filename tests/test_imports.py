# SPDX-License-Identifier: Apache-2.0
"""Imports have one direction, and no module uses another module's private names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("engine", "anatomy", "bids", "reports", "interfaces", "workflows", "run", "cli")
"""Each may import those before it."""
SHARED = {
    "background": set(),
    "settings": set(),
    "typed_json": {"engine"},
    "records": {"engine", "typed_json"},
}
"""Modules beside the packages, and what they import (of the engine: names and errors)."""
ALLOWED = {
    **{name: {*CHAIN[:rank], *SHARED} for rank, name in enumerate(CHAIN)},
    "engine": set(),
    "anatomy": {"engine", "records"},
    **SHARED,
    "scan": {"engine", "anatomy"},
    "__main__": {"cli"},
    # used by the command line only
    "training": {"engine", "anatomy"},
    "evaluation": {"engine", "anatomy", "background", "bids", "records", "training"},
}
ALLOWED["cli"] |= {"training", "evaluation"}
NEVER_IN_THE_ENGINE = {
    "SimpleITK", "ants", "bids", "matplotlib", "nibabel", "nilearn", "nipype", "niworkflows",
}  # fmt: skip
EXCEPTIONS: dict[str, set[str]] = {}
"""File -> private names of our other modules that it uses for now."""
OTHER_PROJECTS = {
    "brainprior_bids/cli/boutiques.py": {"_actions"},  # argparse lists its options nowhere else
    "brainprior_bids/cli/config_file.py": {"_actions"},
    "brainprior_bids/cli/parser.py": {"_actions"},
    "brainprior_bids/cli/options.py": {"_ArgumentGroup"},
    "brainprior_bids/run/environment.py": {"_semlock"},  # has a semaphore's name
    "brainprior_bids/run/interrupt.py": {"_exit"},  # os
    "brainprior_bids/run/pool.py": {
        "_exit",  # os
        "_processes", "_executor_manager_thread_wakeup", "_shutdown_lock",  # a pool's workers
    },
    "brainprior_bids/run/cluster.py": {"_get_all_nodes"},  # Nipype's own name for it
    "brainprior_bids/training/prior.py": {"_foreach_lerp_"},  # torch's optimisers call it
}  # fmt: skip
"""File -> private names of other projects that it cannot do without."""


def sources() -> Iterator[tuple[str, Path]]:
    """Package or top-level module, and file."""
    for path in sorted((ROOT / "brainprior_bids").rglob("*.py")):
        inside = path.relative_to(ROOT / "brainprior_bids")
        if inside.parts != ("__init__.py",):
            yield inside.parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "workflows").rglob("*.py")):
        yield "workflows", path


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports, anywhere in it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (("brainprior_bids",) if parts[0] == "workflows" else ()) + parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def parts_of_ours(path: Path) -> set[str]:
    """The first-level parts of brainprior_bids that a file imports."""
    names = (f"{module}.{name}".split(".") for module, name in imported(path))
    return {
        words[1]
        for words in names
        if words[0] == "brainprior_bids" and words[1] and not words[1].startswith("__")
    }


def test_every_part_has_its_place():
    assert {part for part, _ in sources()} == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    wrong = {
        str(path.relative_to(ROOT)): sorted(extra)
        for owner, path in sources()
        if owner == part and (extra := parts_of_ours(path) - ALLOWED[part] - {part})
    }
    assert wrong == {}


def test_the_engine_needs_torch_and_numpy_only():
    outside = {
        f"{path.name}: {module}"
        for part, path in sources()
        if part == "engine"
        for module, _ in imported(path)
        if module.split(".")[0] in NEVER_IN_THE_ENGINE
    }
    assert outside == set()


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables, attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def is_own_object(node: ast.expr) -> bool:
    """``self``, ``cls`` and ``super()``: names of a base class are a class's own."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_private_names(path: Path) -> set[str]:
    """Private names that a file imports, or reaches for in an object that is not its own."""
    tree = ast.parse(path.read_text())
    own = own_names(tree)
    modules = {word for module, _ in imported(path) for word in module.split(".")}
    names = {name for _, name in imported(path)} | modules
    names |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr not in own
        and not is_own_object(node.value)
    }
    return {name for name in names if is_private(name)}


def test_private_names_stay_in_their_module():
    result = {
        str(path.relative_to(ROOT)): names
        for _, path in sources()
        if (names := foreign_private_names(path))
    }
    expected = {
        path: EXCEPTIONS.get(path, set()) | OTHER_PROJECTS.get(path, set())
        for path in {*EXCEPTIONS, *OTHER_PROJECTS}
    }
    assert result == expected


def test_a_private_name_of_another_module_is_found(tmp_path, monkeypatch):
    file = tmp_path / "brainprior_bids" / "run" / "one.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from brainprior_bids.bids.names import _stem\n"
        "import brainprior_bids.bids.query as query\n"
        "class One:\n"
        "    def __init__(self): self._x = 1\n"
        "    def same(self, other): return self._y == other._x\n"
        "query._find(One()._hidden)\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert foreign_private_names(file) == {"_stem", "_find", "_hidden"}
