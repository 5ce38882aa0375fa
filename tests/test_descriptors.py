# SPDX-License-Identifier: Apache-2.0
"""The descriptors of ``scripts/descriptors.py`` meet the requirements of each platform.

Their own validators passed when this was written: ``bosh validate``, ``nipoppy pipeline validate``
(Nipoppy 0.4.8) and ``builder/validation.py`` of Neurodesk's recipes. Only bosh runs in the tests.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import boutiques
import pytest
import yaml

from brainprior_bids import __version__

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDERS = re.compile(r"\b(OWNER|REGISTRY|HOST/OWNER)\b")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("descriptors", ROOT / "scripts/descriptors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("descriptors")
    module.write(out)
    return out


def test_boutiques_accepts_the_descriptors(written):
    for path in (
        written / "boutiques" / "brainprior.json",
        written / "nipoppy" / f"brainprior-{__version__}" / "descriptor.json",
    ):
        boutiques.validate(str(path))


def test_the_nipoppy_bundle_is_complete_and_its_invocation_fits_the_descriptor(written):
    folder = written / "nipoppy" / f"brainprior-{__version__}"
    config = json.loads((folder / "config.json").read_text())
    (step,) = config["STEPS"]
    assert all((folder / step[key]).is_file() for key in step if key.endswith("_FILE"))
    boutiques.invocation(str(folder / "descriptor.json"), "-i", str(folder / "invocation.json"))


def test_the_neurodesk_recipe_has_its_fields_and_the_same_version_as_its_tests(written):
    folder = written / "neurodesk" / "brainprior"
    recipe = yaml.safe_load((folder / "build.yaml").read_text())
    tests = yaml.safe_load((folder / "fulltest.yaml").read_text())
    assert recipe["build"]["kind"] == "neurodocker"
    assert recipe["build"]["base-image"].endswith(f":{__version__}")
    assert recipe["deploy"]["bins"] == ["brainprior"]
    icon = recipe["icon"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(icon, validate=True).startswith(b"\x89PNG")
    assert (tests["name"], tests["version"]) == (recipe["name"], recipe["version"])
    for test in tests["tests"]:
        assert test["command"].startswith("brainprior ")


def test_the_entry_for_the_list_of_bids_apps_has_what_the_list_wants(written):
    (entry,) = yaml.safe_load((written / "bids-apps" / "apps.yml").read_text())
    assert set(entry) == {
        "gh", "dh", "status", "description", "ds_type", "datatype", "ci", "branch"
    }  # fmt: skip
    assert (entry["ds_type"], entry["datatype"]) == (["raw"], ["anat"])


def test_owner_and_registry_are_named_in_one_file():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    if listed == [""]:
        pytest.skip("not a git checkout")
    named = {
        name
        for name in filter(None, listed)
        if Path(name).suffix in {".md", ".yml", ".yaml", ".toml", ".json", ".cff", ".cfg", ".sh"}
        and (ROOT / name).is_file()
        and PLACEHOLDERS.search((ROOT / name).read_text("utf-8"))
    }
    assert named == {"publishing.toml"}


def test_the_command_lists_its_files(tmp_path):
    script = str(ROOT / "scripts" / "descriptors.py")
    result = subprocess.run(
        [sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_file() for line in result.stdout.splitlines())
