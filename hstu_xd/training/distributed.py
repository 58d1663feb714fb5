"""One process or many: what torchrun's environment says, and the few collectives training needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Rank, number of processes and device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


# Process groups that were joined, see :func:`keep_group`.
_groups: list[object] = []


def keep_group() -> None:
    """Hold on to the process group for as long as the process lives.

    Else a DDP module that outlives ``destroy_process_group`` ends it. That happens under the
    interpreter's lock and waits for gloo's thread, which may be waiting for this very lock.
    """
    _groups.append(dist.group.WORLD)


@contextmanager
def world() -> Iterator[World]:
    """Join the process group that torchrun started (nccl on CUDA, gloo on CPU), or stand alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    keep_group()
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
