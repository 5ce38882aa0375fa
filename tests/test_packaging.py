# SPDX-License-Identifier: Apache-2.0
"""The installed files are those in the tree."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    result = {"brainprior_bids.workflows"} | {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "brainprior_bids").rglob("__init__.py")
    }
    assert listed == result


def test_every_file_names_its_licence():
    for folder in ("brainprior_bids", "workflows", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "SPDX-License-Identifier: Apache-2.0" in path.read_text()[:200], path


@pytest.mark.parametrize("kind", ["installed", "sdist"])
def test_what_is_built_holds_the_whole_package(tmp_path, kind):
    """Every module, weight and data file; ``scripts/release.sh`` installs and runs it as well."""
    source, out = tmp_path / "source", tmp_path / "out"
    folders = {"brainprior_bids": "brainprior_bids", "workflows": "brainprior_bids/workflows"}
    for folder in folders:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pyc*"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    arguments = {
        "installed": ["build", "--build-base", str(tmp_path / "base"), "--build-lib", str(out)],
        "sdist": ["sdist", "--formats", "tar", "--dist-dir", str(out)],
    }[kind]
    code = f"import setuptools; setuptools.setup(script_args={arguments!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    if kind == "sdist":
        (built,) = out.iterdir()
        with tarfile.open(built) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
    else:
        names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    expected = {
        f"{folder if kind == 'sdist' else target}/{path.relative_to(source / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert expected - names == set()
    assert any(name.endswith("prior.safetensors") for name in expected)
    assert not [name for name in names if name.startswith(("tests", "docs"))]
