# SPDX-License-Identifier: Apache-2.0
"""The tree of our exceptions.

Every message states the scan or operator, what was expected, what was received, and what to do.
"""

from __future__ import annotations

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
"""``errno`` of a full disk (or no inode left), and of an exhausted quota."""
MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "alloc_failed",
    "bad_alloc",
    "could not create a primitive",
    "can't start new thread",
)
"""Words of torch, CUDA, ITK, oneDNN (the primitive) and Python (the thread) when memory runs
out."""


class BrainpriorError(Exception):
    """Root of every error that brainprior raises on purpose."""


class UsageError(BrainpriorError):
    """The command line or a call was wrong; the command exits with 2."""


class SamplerError(UsageError):
    """The requested sampler cannot be used for this scan; ``obstacle`` says why."""

    def __init__(self, sampler: str, obstacle: str) -> None:
        super().__init__(sampler, obstacle)  # both, so that it can be pickled
        self.sampler, self.obstacle = sampler, obstacle

    def __str__(self) -> str:
        return f"restore: sampler {self.sampler!r} cannot be used: {self.obstacle}. Use 'exact'."


class InputError(BrainpriorError):
    """A scan, mask or sidecar cannot be used; that scan fails, the others continue."""


class ShapeMismatchError(InputError):
    """Two arrays or operators disagree on their shape."""


class GeometryError(InputError):
    """An affine, a spacing or a thickness makes no sense."""


class AnatomyError(InputError):
    """No brain, or no usable structures, were found in a scan."""


class WeightsError(BrainpriorError):
    """A weights file is missing, of another version, or does not match its hash."""


class RecordError(BrainpriorError):
    """The report of a step cannot be read: no JSON, or a value of the wrong type."""


class DivergenceError(BrainpriorError):
    """An iteration produced non-finite values."""


class ConvergenceError(BrainpriorError):
    """An iterative solve did not reach its stated tolerance."""


class MemoryShortageError(BrainpriorError):
    """Memory ran out even in the smallest tiles."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception is a failed allocation, by its class, number or words."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in MEMORY_WORDS)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk. Nipype and ITK raise their
    own errors, which quote the words of the system.
    """
    words = [os.strerror(number) for number in FULL]
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(text in str(error) for text in words):
            return True
        error = error.__cause__ or error.__context__
    return False
