# SPDX-License-Identifier: Apache-2.0
"""The environment that the command sets, and its behaviour without a home folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from brainprior_bids.run.environment import prepare_environment
from brainprior_bids.settings import Settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for name in ("NIPYPE_CONFIG_DIR", "HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TMPDIR",
                 "OMP_NUM_THREADS", "TEMPLATEFLOW_HOME", "NIPYPE_NO_ET", "NO_ET", "MPLBACKEND",
                 "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TEMPLATEFLOW_AUTOUPDATE",
                 "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_WAIT_POLICY"):  # fmt: skip
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setenv("HOME", str(tmp_path))
    return Settings(tmp_path / "raw", tmp_path / "out", tmp_path / "work", omp_nthreads=3)


def test_threads_and_telemetry(settings):
    prepare_environment(settings)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "3"
    assert os.environ["NIPYPE_NO_ET"] == "1"
    folder = settings.work_dir / "home"
    assert os.environ["NIPYPE_CONFIG_DIR"] == str(folder)
    assert "check_version = false" in (folder / "nipype.cfg").read_text()


def test_idle_threads_sleep_unless_the_user_wants_otherwise(settings, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    prepare_environment(settings)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    prepare_environment(settings)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_templates_are_looked_for_where_templateflow_keeps_them(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("TEMPLATEFLOW_HOME")
    prepare_environment(settings)
    assert os.environ["TEMPLATEFLOW_HOME"] == str(settings.work_dir / "home" / "templateflow")
    (tmp_path / ".cache" / "templateflow").mkdir(parents=True)
    monkeypatch.delenv("TEMPLATEFLOW_HOME")
    prepare_environment(settings)
    assert os.environ["TEMPLATEFLOW_HOME"] == str(tmp_path / ".cache" / "templateflow")


def test_a_home_that_can_be_written_is_kept(settings, tmp_path):
    prepare_environment(settings)
    assert os.environ["HOME"] == str(tmp_path)


def test_a_home_that_cannot_be_written_moves_into_the_work_folder(settings, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    prepare_environment(settings)
    home = str(settings.work_dir / "home")
    assert os.environ["HOME"] == home
    assert os.environ["MPLCONFIGDIR"].startswith(home)
    assert os.environ["XDG_CACHE_HOME"].startswith(home)


def test_without_a_temporary_folder_there_is_one_in_the_work_folder(settings, monkeypatch):
    def nowhere():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    prepare_environment(settings)
    assert os.environ["TMPDIR"] == str(settings.work_dir / "home" / "tmp")
    assert os.path.isdir(os.environ["TMPDIR"])


def test_lines_of_training_and_evaluation_are_shown():
    code = (
        "import logging; from brainprior_bids.run.logs import log_to_stderr; log_to_stderr();"
        "logging.getLogger('brainprior_bids.training.prior').info('step 50')"
    )
    messages = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert messages.stderr.count("step 50") == 1
