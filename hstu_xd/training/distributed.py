"""One process or many: what torchrun's environment says, and the few collectives training needs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hstu_xd.errors import HstuXdError


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

    def in_main(self, work: Callable[[], object]) -> None:
        """Do something in the first process; the others wait, and fail where it does.

        Raises:
            HstuXdError: what the work raised, in all processes.
            OSError: likewise.
        """
        outcome: list[Exception | None] = [None]
        if self.is_main:
            try:
                work()
            except (HstuXdError, OSError) as error:
                outcome = [error]
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]


class DelayedMaximum:
    """The largest number that any process gives, known to all of them one call later.

    So nobody waits for the others: a number is on its way while its process works on. Every process
    makes as many calls as any other.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int) -> None:
        # Of its own, and on the CPU: a result on a GPU would wait for all that the GPU has to do.
        self._group = dist.new_group(backend="gloo") if size > 1 else None
        self._work: dist.Work | None = None
        self._sent = torch.zeros(())
        if self._group is not None:
            keep_group(self._group)

    def __call__(self, own: int) -> int:
        """Give a number; return the largest of those given at the call before.

        A process that stands alone gets its own at once. A number other than 0 is the last one:
        nothing is on its way then that a process which ends would tear from the others.
        """
        if self._group is None:
            return own
        if largest := self.finish():
            return largest
        self._sent = torch.tensor(own)
        self._work = dist.all_reduce(
            self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return 0

    def finish(self) -> int:
        """Wait for what is on its way, and return it; 0 where nothing is."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._sent)


# Process groups that were joined, see :func:`keep_group`.
_groups: list[object] = []


def keep_group(group: object = None) -> None:
    """Hold on to a process group, that of all processes unless told, while the process lives.

    Else a DDP module that outlives ``destroy_process_group`` ends it. That happens under the
    interpreter's lock and waits for gloo's thread, which may be waiting for this very lock.
    """
    _groups.append(group or dist.group.WORLD)


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
