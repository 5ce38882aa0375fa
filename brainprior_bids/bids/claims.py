# SPDX-License-Identifier: Apache-2.0
"""Claims: a process that works on a scan locks it, so that no other process takes the same scan.

Without them, two simultaneous runs of one scan would use the same work folder. A claim is a lock
on one byte of a file; the byte is derived from the scan's name. POSIX record locks work on NFS
too, need one open file for any number of scans, and are released when their process ends for any
reason. A run claims its own name as the owner of its temporary files in the same way: if an
owner's byte can be locked, that run was killed, and its temporary files can be removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from brainprior_bids.bids.files import TEMPORARY, become_owner

LOG = logging.getLogger("brainprior")
FILE = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
ANYONE = 1 << 41
"""The byte that every process locks, shared; bytes of names are below 1 << 40."""


class Claims:
    """The scans that this process works on, and its own name as an owner of temporary files.

    Parameters
    ----------
    folders : paths
        Folders of the lock files: the output folder's ``logs`` and the work folder, both of which
        another run may share. Created if absent.

    Attributes
    ----------
    refused : list of str
        Scans that another process has claimed.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.refused: list[str] = []
        self._files: list[IO[bytes]] = []
        for folder in dict.fromkeys(folders):
            folder.mkdir(parents=True, exist_ok=True)
            self._files.append((folder / FILE).open("a+b"))
        self._owner = become_owner()
        for file in self._files:
            with suppress(OSError):  # without locks; `take` warns of it
                # other processes hold these while they check for others or clean up: wait for them
                fcntl.lockf(file, fcntl.LOCK_SH, 1, ANYONE, os.SEEK_SET)
                fcntl.lockf(file, fcntl.LOCK_EX, 1, _byte(self._owner), os.SEEK_SET)

    def take(self, scan: str) -> bool:
        """Claim a scan; False if another process has it.

        On a file system without locks nothing is claimed; the result is True, with a warning.
        """
        claimed = self._try(scan)
        if not claimed:
            self.refused.append(scan)
        return claimed

    def _try(self, scan: str) -> bool:
        for number, file in enumerate(self._files):
            try:
                _lock(file, _byte(scan), fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in TAKEN:
                    for locked in self._files[:number]:
                        _lock(locked, _byte(scan), fcntl.LOCK_UN)
                    return False
                LOG.warning(
                    "%s cannot be locked (%s): make sure that no other process works on these "
                    "scans.",
                    file.name,
                    error.strerror,
                )
        return True

    def give_back(self, scan: str) -> None:
        """Release a scan."""
        for file in self._files:
            with suppress(OSError):
                _lock(file, _byte(scan), fcntl.LOCK_UN)

    def is_free(self, scan: str) -> bool:
        """Whether no other process works on a scan."""
        free = self._try(scan)
        if free:
            self.give_back(scan)
        return free

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process has claims in the folders; if so, a new process waits."""
        alone = True
        try:
            for file in self._files:
                try:
                    _lock(file, ANYONE, fcntl.LOCK_EX)
                except OSError as error:
                    alone = alone and error.errno not in TAKEN
            yield alone
        finally:
            for file in self._files:
                with suppress(OSError):
                    _lock(file, ANYONE, fcntl.LOCK_SH)

    def sweep(self, folders: Iterable[Path]) -> None:
        """Remove temporary files directly in ``folders`` whose owner was killed."""
        dead: dict[str, bool] = {}
        for folder in folders:
            for path in [path for path in _listed(folder) if path.name.startswith(".")]:
                match = TEMPORARY.fullmatch(path.name)
                if match is None or match[1] == self._owner:
                    continue
                if match[1] not in dead:
                    dead[match[1]] = self._is_dead(match[1])
                if dead[match[1]]:
                    LOG.debug("%s: left by a run that was killed, removed", path)
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)

    def _is_dead(self, owner: str) -> bool:
        """Whether an owner's byte is free in every folder; False if there are no locks."""
        try:
            for file in self._files:
                _lock(file, _byte(owner), fcntl.LOCK_EX)
                _lock(file, _byte(owner), fcntl.LOCK_UN)
        except OSError:
            return False
        return True

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()  # ends its locks


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # missing or unreadable
        return []


def _lock(file: IO[bytes], byte: int, how: int) -> None:
    """Lock one byte without waiting, or unlock it."""
    fcntl.lockf(file, how if how == fcntl.LOCK_UN else how | fcntl.LOCK_NB, 1, byte, os.SEEK_SET)


def _byte(scan: str) -> int:
    return int.from_bytes(hashlib.sha256(scan.encode()).digest()[:5])
