# SPDX-License-Identifier: Apache-2.0
"""One training in several processes, started by ``torchrun``.

All processes have the same weights, and each draws its own crops at every step; gradients are
averaged, so N processes with batch B take the same step as one process with batch N B. Only
process 0 writes. Without ``torchrun`` there is one process, and every method returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brainprior_bids.engine.errors import UsageError

PATIENCE = timedelta(days=7)
"""Time for which a process waits for the others: process 0 may be preparing thousands of scans."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and the number of processes.

    Parameters
    ----------
    rank, size : int
        Rank of this process, from 0, and number of processes.
    device : torch.device
        Device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes: the one of rank 0."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """(n, …) of this process -> (size n, …) of all, in the order of their ranks."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace every gradient by its mean over the processes; the same mean of ``loss``.

        A parameter without a gradient counts as 0, and stays without one if no process has any.
        """
        loss = loss.detach().float()
        if self.size == 1:
            return loss
        own = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in own], device=self.device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own]
        flat = torch.cat([*(part.float() for part in parts), has, loss.reshape(1)])
        dist.all_reduce(flat)
        flat /= self.size
        has_gradient = flat[-1 - len(own) : -1] > 0
        start = 0
        for p, some in zip(own, has_gradient.tolist(), strict=True):
            if some:
                p.grad = flat[start : start + p.numel()].reshape(p.shape).to(p.dtype)
            start += p.numel()
        return flat[-1]

    def least(self, count: int) -> int:
        """The minimum of ``count`` over the processes."""
        if self.size == 1:
            return count
        least = torch.tensor(count, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def share(self, module: nn.Module) -> None:
        """Give every process the tensors of process 0."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> Processes:
    """Join the other processes, if ``torchrun`` started this one.

    Parameters
    ----------
    device : str
        ``cpu`` (gloo) or ``cuda`` (nccl; process n of a machine takes its GPU n).

    Raises
    ------
    UsageError
        If one GPU is named for several processes, or there are fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    torch_device = torch.device(device)
    if size == 1:
        return Processes(0, 1, torch_device)
    if torch_device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if torch_device.index is not None or local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun: process {local} of this machine needs a GPU of its own; --device is "
                f"{device}, torch sees {torch.cuda.device_count()}. Pass --device cuda and start "
                "as many processes as there are GPUs."
            )
        torch_device = torch.device("cuda", local)
        torch.cuda.set_device(torch_device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch_device.type == "cuda" else "gloo", timeout=PATIENCE
        )
    return Processes(dist.get_rank(), dist.get_world_size(), torch_device)


def leave() -> None:
    """Leave the process group, if ``join`` created one."""
    if dist.is_initialized():
        dist.destroy_process_group()
