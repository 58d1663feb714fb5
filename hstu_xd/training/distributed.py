"""One process or many: what torchrun's environment says, and the few collectives training needs."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hstu_xd.errors import HstuXdError

T = TypeVar("T")


def num_processes() -> int:
    """Return the number of processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this process is the one of its job that writes files and talks."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class World:
    """This process among those of its job, which may be on machines of their own.

    Attributes:
        rank: from 0.
        size: number of processes.
        device: of this process.
        group: through the CPU, for objects; None: there is one process.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def from_main(self, work: Callable[[], T]) -> T:
        """Do something in the first process; all get what it returns, or fail where it does.

        Raises:
            HstuXdError: what the work raised, in all processes.
            OSError: likewise.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (HstuXdError, OSError) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, group=self.group)
        found, error = outcome
        if error is not None:
            raise error
        return found

    def in_main(self, work: Callable[[], object]) -> None:
        """Do something in the first process; the others wait, and fail where it does.

        Raises:
            HstuXdError: what the work raised, in all processes.
            OSError: likewise.
        """

        def do() -> None:
            work()

        self.from_main(do)

    def in_all(self, work: Callable[[], T]) -> T:
        """Do something in every process, and fail in all of them where one fails.

        Raises:
            HstuXdError: what the work raised in the first process where it did.
            OSError: likewise.
        """
        found: Any = None
        failed: Exception | None = None
        try:
            found = work()
        except (HstuXdError, OSError) as error:
            failed = error
        for each in self.gather(failed):
            if each is not None:
                raise each
        return found

    def gather(self, value: T) -> list[T]:
        """Return what every process gives, in the order of their ranks, in all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def collect(self, value: T) -> list[T]:
        """Return in the first process what every process gives; nothing in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, found, group=self.group)
        return found or []

    @contextmanager
    def files_of_main(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        """Let all processes read small files that the first one has.

        Args:
            folder: of the first process; others may have another disk.
            names: of the files; those that are not there are left out.

        Yields:
            The folder in the first process, in the others one with copies, for the time of the
            block.
        """

        def read() -> dict[str, bytes]:
            files = {name: folder / name for name in names}
            return {name: file.read_bytes() for name, file in files.items() if file.is_file()}

        found = self.from_main(read) if self.size > 1 else {}
        if self.is_main:
            yield folder
            return
        with tempfile.TemporaryDirectory() as copies:
            for name, content in found.items():
                (Path(copies) / name).write_bytes(content)
            yield Path(copies)


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
def world(*, on_cpu: bool = False) -> Iterator[World]:
    """Join the process group that torchrun started, or stand alone.

    Args:
        on_cpu: whether the work is the CPU's even where there are GPUs.
    """
    size = num_processes()
    rank = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available() and not on_cpu
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
    group = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
    keep_group(group)
    try:
        yield World(rank, size, device, group)
    finally:
        dist.destroy_process_group()
