# SPDX-License-Identifier: Apache-2.0
"""Checks before the first step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from brainprior_bids.bids.claims import Claims
from brainprior_bids.run.preflight import clean_work_dir

HOLD = """
import sys
from pathlib import Path
from brainprior_bids.bids.claims import Claims
with Claims([Path(sys.argv[1])]) as claims:
    print(claims.take(sys.argv[2]), flush=True)
    sys.stdin.read()
"""


def ours(folder):
    for name in ("brainprior_wf/sub_01_T1w_wf/n4", "brainprior_wf/sub_02_T1w_wf", "home"):
        (folder / name).mkdir(parents=True)
    for name in ("validate-x", "mine"):
        (folder / name).mkdir()


def test_a_work_folder_is_cleaned_of_our_own_only(tmp_path):
    ours(tmp_path)
    with Claims([tmp_path]) as claims:
        clean_work_dir(tmp_path, claims)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".lock"}


@pytest.fixture
def beside(tmp_path):
    """Another process that works on sub-01."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "sub_01_T1w"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "True\n"
    yield other
    other.kill()
    other.communicate()


def test_the_scans_of_a_running_process_are_not_cleaned_away(tmp_path, beside, told):
    ours(tmp_path)
    with Claims([tmp_path]) as claims:
        clean_work_dir(tmp_path, claims)
        assert (tmp_path / "brainprior_wf" / "sub_01_T1w_wf" / "n4").is_dir()
        assert not (tmp_path / "brainprior_wf" / "sub_02_T1w_wf").exists()
        assert (tmp_path / "home").is_dir()  # its temporary files
        assert "another process uses" in told.text
        assert claims.refused == []  # nothing was requested
    beside.kill()
    beside.communicate()
    with Claims([tmp_path]) as claims:
        clean_work_dir(tmp_path, claims)
    assert not (tmp_path / "brainprior_wf").exists()
