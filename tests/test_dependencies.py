# SPDX-License-Identifier: Apache-2.0
"""What is imported is declared in ``setup.cfg``, and what is declared is used."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_IMPORTED = {
    "bids-validator-deno": "a program, started by bids/validate.py",
}
"""Declared for running, imported nowhere in the package, and why."""
OPTIONAL = {"lpips": "evaluation/perceptual.py leaves its metric out where it is absent"}
"""Imported in a function if it is installed, and not declared."""
TOOLS = {"pytest-timeout", "pytest-xdist", "mypy", "pre-commit", "ruff"}
"""Programs and plugins of the extras, which nothing imports."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None = None) -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = (
        config["options"]["install_requires"]
        if extra is None
        else config["options.extras_require"][extra]
    )
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in text.split("\n") if line}


def imported(files: Iterable[Path]) -> set[str]:
    """Distributions of other projects that files import, anywhere in them."""
    files = list(files)
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    ours = {path.stem for path in files} | {"brainprior_bids", "gaussian"}
    owners = packages_distributions()
    return {
        normal(owners.get(module, [module])[0])
        for module in modules - set(sys.stdlib_module_names) - ours
    }


def package() -> list[Path]:
    return [*(ROOT / "brainprior_bids").rglob("*.py"), *(ROOT / "workflows").rglob("*.py")]


def test_every_import_of_the_package_is_declared():
    assert imported(package()) - set(OPTIONAL) <= declared()


def test_nothing_declared_is_idle():
    assert declared() - imported(package()) == set(NOT_IMPORTED)


def test_every_import_of_the_tests_is_declared_and_used():
    result = imported((ROOT / "tests").rglob("*.py"))
    assert result <= declared() | declared("test")
    assert declared("test") - result <= TOOLS


def test_every_import_of_the_benchmarks_is_declared():
    result = imported((ROOT / "benchmarks").rglob("*.py"))
    assert result - declared() == declared("benchmark")


def test_the_tutorial_imports_what_is_declared(tmp_path):
    cells = re.findall(
        r"```\{code-cell\} python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S
    )
    code = re.sub(r"^[!:].*$", "", "\n".join(cells), flags=re.M)
    (tmp_path / "tutorial.py").write_text(code)
    assert imported([tmp_path / "tutorial.py"]) <= declared() | declared("docs")


@pytest.mark.parametrize("extra", [None, "benchmark", "test", "docs", "dev"])
def test_every_declared_version_is_pinned(extra):
    pins = (ROOT / "constraints.txt").read_text().split()
    assert declared(extra) <= {normal(pin.partition("==")[0]) for pin in pins}


@pytest.mark.parametrize(
    "name", ["CITATION.cff", "Dockerfile", "Singularity.def", "docs/boutiques/brainprior.json"]
)
def test_every_file_names_the_version_of_setup_cfg(name):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    result = re.findall(
        r'^\s*"?(?:ARG |tool-)?version"?[=:] ?"?(\d[\w.]*)', (ROOT / name).read_text(), re.M | re.I
    )
    assert set(result) == {config["metadata"]["version"]}, "scripts/set_version.sh changes them"
