# SPDX-License-Identifier: Apache-2.0
"""The environment of the process: no network, no home folder, and the requested threads.

Libraries read these variables when they are imported, here and in the worker processes, so this
runs before any import of them. Every command calls ``prepare_process`` before it reads its
arguments, so that it runs with a terminal or a locale that is not UTF-8, and for a user without a
home folder.
"""

from __future__ import annotations

import codecs
import gc
import getpass
import io
import locale
import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

from platformdirs import user_cache_dir

from brainprior_bids.bids.files import write_text
from brainprior_bids.engine.errors import UsageError, is_full
from brainprior_bids.settings import Settings

LONGEST_SOCKET = 107
"""Maximum length of a socket's path (AF_UNIX), in bytes."""
SOCKET_NAME = len("/pymp-12345678/listener-12345678")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
UTF8_LOCALES = ("C.UTF-8", "en_US.UTF-8", "UTF-8")


def prepare_environment(settings: Settings) -> None:
    """Set the environment variables of this run, and make the work folder."""
    home = settings.work_dir / "home"
    try:
        write_text(  # by rename: another process may share the work folder
            home / "nipype.cfg",
            f"[logging]\nworkflow_level = {settings.nipype_level}\ninterface_level = INFO\n"
            "[execution]\ncheck_version = false\n",
        )
    except OSError as error:
        what = "Make room" if is_full(error) else "Check its permissions"
        raise UsageError(
            f"--work-dir {settings.work_dir} cannot be created or written ({error.strerror}). "
            f"{what}, or choose another folder."
        ) from error
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
    # Idle threads sleep: threads that wait actively would slow down other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    templates = Path(user_cache_dir("templateflow"))  # TemplateFlow's own default
    if not templates.is_dir():
        templates = home / "templateflow"
    os.environ.setdefault("TEMPLATEFLOW_HOME", str(templates))
    if not _writable(Path(os.environ.get("HOME", "/nonexistent"))):
        os.environ["HOME"] = str(home)
        os.environ["XDG_CACHE_HOME"] = str(home / ".cache")
        os.environ["MPLCONFIGDIR"] = str(home / "matplotlib")
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # a read-only root
        temporary = str(home / "tmp")
        os.makedirs(temporary, exist_ok=True)
        os.environ["TMPDIR"] = temporary
        tempfile.tempdir = None
    find_place_for_sockets(temporary)


def prepare_process() -> None:
    """Set UTF-8 for text files, output for any terminal, a home folder and a user's name."""
    use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        Path.home()
    except (KeyError, RuntimeError):
        os.environ["HOME"] = "/nonexistent"  # `prepare_environment` sets one


def use_utf8() -> None:
    """Have other packages read and write text files as UTF-8, whatever the locale."""
    with suppress(LookupError):  # a locale whose encoding Python does not know
        if codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
            return
    for name in UTF8_LOCALES:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            return


def find_place_for_sockets(requested: str) -> None:
    """Have multiprocessing create its sockets where their paths are short enough for the system.

    All other temporary files remain in the folder ``requested``.
    """
    before = tempfile.tempdir
    for folder in (requested, *SHORT_FOLDERS, os.environ.get("XDG_RUNTIME_DIR", requested)):
        if len(os.fsencode(folder)) + SOCKET_NAME <= LONGEST_SOCKET:
            tempfile.tempdir = folder
            try:
                multiprocessing.util.get_temp_dir()  # created now, and kept
            except OSError:  # it cannot be written
                continue
            finally:
                tempfile.tempdir = before
            return


def why_no_workers() -> str | None:
    """Why no worker process can be started here; None if one can."""
    try:
        multiprocessing.get_context("forkserver").Lock()
    except (OSError, ImportError) as error:
        return f"/dev/shm cannot be used ({getattr(error, 'strerror', None) or error})"
    folder = multiprocessing.util.get_temp_dir()
    if len(os.fsencode(folder)) + SOCKET_NAME - len("/pymp-12345678") > LONGEST_SOCKET:
        return f"{folder} is too long a path for a socket; set TMPDIR to a shorter one"
    return None


def revive_tracker() -> None:
    """Start multiprocessing's resource tracker again if it was killed.

    A new tracker does not know this process's semaphores, and shows a traceback for each that is
    released, which can be at any time; therefore this is checked at every poll.
    """
    synchronize = sys.modules.get("multiprocessing.synchronize")
    if synchronize is None:  # no semaphore was ever made
        return
    with warnings.catch_warnings(record=True) as died:
        warnings.simplefilter("always")
        resource_tracker.ensure_running()
    if died:
        for lock in [item for item in gc.get_objects() if isinstance(item, synchronize.SemLock)]:
            resource_tracker.register(lock._semlock.name, "semaphore")


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
