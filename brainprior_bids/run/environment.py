# SPDX-License-Identifier: Apache-2.0
"""The process's surroundings: no network, no home folder needed, no thread too many.

Libraries read these variables when they are imported, here and in the worker processes, so this
runs before any of them is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from brainprior_bids.bids.files import write_text
from brainprior_bids.settings import Settings


def prepare_environment(settings: Settings) -> None:
    """Set the environment variables of this run, and make the work folder."""
    home = settings.work_dir / "home"
    home.mkdir(parents=True, exist_ok=True)
    write_text(  # by rename: another process may share the work folder
        home / "nipype.cfg",
        f"[logging]\nworkflow_level = {settings.nipype_level}\ninterface_level = INFO\n"
        "[execution]\ncheck_version = false\n",
    )
    threads = str(settings.omp_nthreads)
    os.environ.update(
        NIPYPE_NO_ET="1",
        NO_ET="1",
        NIPYPE_CONFIG_DIR=str(home),
        TEMPLATEFLOW_AUTOUPDATE="off",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=threads,
    )
    templates = Path("~/.cache/templateflow").expanduser()  # TemplateFlow's own default
    if not templates.is_dir():
        templates = home / "templateflow"
    os.environ.setdefault("TEMPLATEFLOW_HOME", str(templates))
    if not _writable(Path(os.environ.get("HOME", "/nonexistent"))):
        os.environ["HOME"] = str(home)
        os.environ["XDG_CACHE_HOME"] = str(home / ".cache")
        os.environ["MPLCONFIGDIR"] = str(home / "matplotlib")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # a read-only root
        temporary = home / "tmp"
        temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
