# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out: how it is recognised and reported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from brainprior_bids.engine.errors import MemoryShortageError, is_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation, on the CPU or on a GPU."""
    return isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)


def explains_memory(function: Callable[P, R]) -> Callable[P, R]:
    """Raise MemoryShortageError if memory runs out outside the network.

    The network falls back to tiles by itself (``denoiser.Prior``); the volumes of the solver and
    the samples have to fit.
    """

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            message = str(error).partition("\n")[0]
            raise MemoryShortageError(
                f"{function.__name__}: out of memory outside the network ({message}), where tiles "
                "do not help. Draw fewer samples, free memory, or run on a machine with more (the "
                "CPU in place of a GPU)."
            ) from error

    return explained
