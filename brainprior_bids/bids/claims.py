# SPDX-License-Identifier: Apache-2.0
"""One process a scan: who is at work on a scan keeps others from it.

Two runs of one scan at the same time would meet in its work folder. A claim is a lock on one byte
of a file, the byte being given by the scan's name: POSIX record locks hold on NFS too, need one
open file for any number of scans, and end with their process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

LOG = logging.getLogger("brainprior")
FILE = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)


class Claims:
    """The scans that this process works on.

    Parameters
    ----------
    folders : paths
        Where the lock files lie: the output folder's ``logs`` and the work folder, either of
        which another run may share. Made if absent.

    Attributes
    ----------
    refused : list of str
        Scans that another process holds.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.refused: list[str] = []
        self._files: list[IO[bytes]] = []
        for folder in dict.fromkeys(folders):
            folder.mkdir(parents=True, exist_ok=True)
            self._files.append((folder / FILE).open("ab"))

    def take(self, scan: str) -> bool:
        """Claim a scan; False where another process has it.

        On a file system without locks nothing is claimed, a warning says so, and it is True.
        """
        for number, file in enumerate(self._files):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(scan), os.SEEK_SET)
            except OSError as error:
                if error.errno in TAKEN:
                    for held in self._files[:number]:
                        fcntl.lockf(held, fcntl.LOCK_UN, 1, _byte(scan), os.SEEK_SET)
                    self.refused.append(scan)
                    return False
                LOG.warning(
                    "%s cannot be locked (%s): make sure that no other process works on these "
                    "scans.",
                    file.name,
                    error.strerror,
                )
        return True

    def give_back(self, scan: str) -> None:
        """Let others have a scan."""
        for file in self._files:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, _byte(scan), os.SEEK_SET)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()  # ends its locks


def _byte(scan: str) -> int:
    return int.from_bytes(hashlib.sha256(scan.encode()).digest()[:5])
