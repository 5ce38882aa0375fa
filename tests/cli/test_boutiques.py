# SPDX-License-Identifier: Apache-2.0
"""The Boutiques descriptor agrees with the parser, validates, and gives valid command lines."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from brainprior_bids.cli.boutiques import FILES, descriptor
from brainprior_bids.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "boutiques" / "brainprior.json"


def bosh(*arguments):
    """bosh as users call it; it needs a writable home folder."""
    code = "import sys; from boutiques.bosh import bosh; sys.exit(bosh(sys.argv[1:]) and 0)"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_stored_descriptor_is_that_of_the_parser():
    messages = "python -m brainprior_bids.cli.boutiques >docs/boutiques/brainprior.json"
    assert json.loads(STORED.read_text(encoding="utf-8")) == descriptor(), messages


def test_every_option_is_in_it_under_a_flag_of_its_own():
    options = {i["id"]: i for i in descriptor()["inputs"] if "command-line-flag" in i}
    actions = {a.dest: a for a in build_parser()._actions if a.option_strings}
    assert set(options) == set(actions) - {"help", "version"}
    for dest, option in options.items():
        assert option["command-line-flag"] in actions[dest].option_strings
        assert option["type"] == "Flag" or actions[dest].nargs != 0
    assert set(FILES) < set(options)


def test_boutiques_accepts_it_and_not_anything(tmp_path):
    bosh("validate", STORED)
    broken = descriptor()
    broken["inputs"][-1]["value-key"] = "[NOWHERE]"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        bosh("validate", tmp_path / "broken.json")
    assert "NOWHERE" in refused.value.stderr


INVOCATIONS = [
    {"analysis_level": "group", "verbose": True},
    {
        "analysis_level": "participant",
        "participant_label": ["01", "x2"],
        "modalities": ["T2w", "FLAIR"],
        "task": ["restore", "inpaint"],
        "n_samples": 3,
        "slice_thickness_mm": 4.5,
        "random_seed": 7,
        "mem_gb": "6G",
        "low_mem": True,
        "exports": ["fmriprep"],
        "verbose": True,
    },
]


@pytest.mark.parametrize("given", INVOCATIONS, ids=lambda given: given["analysis_level"])
def test_its_command_lines_are_ours(tmp_path, given):
    invocation = tmp_path / "invocation.json"
    invocation.write_text(json.dumps({"bids_dir": "raw", "output_dir_name": "out", **given}))
    messages = bosh("exec", "simulate", STORED, "-i", invocation)
    line = re.search(r"^mkdir -p out; brainprior (.*)$", messages, re.MULTILINE)
    assert line, messages
    options = vars(build_parser().parse_args(shlex.split(line[1])))
    assert (options["bids_dir"], options["output_dir"]) == (Path("raw"), Path("out"))
    for name, value in given.items():
        read = {"analysis_level": [value], "mem_gb": 6.0, "exports": [("fmriprep", "")]}
        assert options[name] == read.get(name, value), name
