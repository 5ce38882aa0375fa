# SPDX-License-Identifier: Apache-2.0
"""A second device, where there is no GPU: its tensors are computed on the CPU, but kept apart.

torch's device ``meta`` stands for the GPU. Every operation passes ``_run``, which refuses what a
GPU refuses: tensors of both devices in one operation (but for single numbers, copies, and indices
from the CPU), numpy, and random numbers from a generator of the CPU. So the code of the CUDA path
runs without one, and a forgotten ``.to`` is an error here as it is there.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR = torch.device("meta")
COPIES = ("aten._to_copy.", "aten.copy_.", "aten.copy.")
INDEXING = ("aten.index.", "aten.index_put.", "aten.index_put_.", "aten._index_put_impl_.")


class FarTensor(torch.Tensor):
    """Reports that it is on the other device; ``near`` has its values."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near):
        form = {"layout": near.layout}
        if near.layout == torch.strided:
            form = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.size(), dtype=near.dtype, device=FAR, **form
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = str(function), _tensors((args, kwargs))
    is_far = any(isinstance(t, FarTensor) for t in tensors)
    if is_far and not name.startswith(COPIES):
        if name.startswith(INDEXING) and isinstance(args[0], FarTensor):
            tensors = _tensors((args[0], args[2:]))  # without the indices
        if not all(isinstance(t, FarTensor) or t.ndim == 0 for t in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        is_far = torch.device(kwargs["device"]) == FAR
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if is_far and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of the same device")
    near_args, near_kwargs = tree_map_only(FarTensor, lambda t: t.near, (args, kwargs))
    result = function(*near_args, **near_kwargs)
    if not is_far:
        return result
    for argument in function._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:  # in place
            index = function._schema.arguments.index(argument)
            return args[index] if index < len(args) else kwargs[argument.name]
    # a conjugate that is only marked as one would be forgotten
    return tree_map_only(torch.Tensor, lambda t: FarTensor(t.resolve_conj().resolve_neg()), result)


@contextlib.contextmanager
def second_device(monkeypatch):
    """Within it ``FAR`` is a device, on which nothing is cast by itself (no autocast)."""
    tensor = torch.tensor

    def tensor_too(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        output = tensor(data, **options)
        return output if device is None else output.to(device)

    def near(function: Any) -> Any:
        return lambda kind, *more, **options: function(
            "cpu" if kind == FAR.type else kind, *more, **options
        )

    monkeypatch.setattr(torch, "tensor", tensor_too)
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        monkeypatch.setattr(torch, name, near(getattr(torch, name)))
    with _Watch():
        yield FAR
