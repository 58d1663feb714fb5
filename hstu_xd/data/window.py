"""Which events of a history a model reads: the latest ones, and of every domain some before those.

The latter are a hard search by the coarsest level of a taxonomy, the domain, for every domain that
may be asked for: a domain that is rare in a history keeps some events there however many of the
others come after them. What is left is a history like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.errors import InputError


@dataclass(frozen=True)
class Window:
    """A rule which events of a history are read.

    Attributes:
        latest: latest events of a history that are read, at least 1.
        older: events of each domain that are read beside those, the latest ones before them.

    Example:
        >>> import torch
        >>> domains = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])
        >>> Window(latest=3, older=1).kept(domains, torch.tensor([0, 8])).tolist()
        [False, False, False, True, True, True, True, True]
    """

    latest: int
    older: int = 0

    def __post_init__(self) -> None:
        if self.latest < 1 or self.older < 0:
            raise InputError(f"{self}: the latest event at least is read, and none is read twice")

    @classmethod
    def of(cls, window: "Window | int") -> "Window":
        """Return a window; a number means so many of the latest events."""
        return window if isinstance(window, Window) else cls(window)

    def size(self, num_domains: int) -> int:
        """Return how many events are read at most."""
        return self.latest + self.older * num_domains

    def kept(self, domains: Tensor, offsets: Tensor) -> Tensor:
        """Tell which events of some histories are read.

        Args:
            domains: (E,) int64, of whole histories end to end, oldest event first.
            offsets: (B + 1,) int64, user ``b`` owns ``offsets[b]:offsets[b + 1]``.

        Returns:
            (E,) bool.
        """
        ends = torch.repeat_interleave(offsets[1:], offsets.diff())
        kept = ends - torch.arange(ends.numel()) <= self.latest
        if self.older and not bool(kept.all()):
            (before,) = (~kept).nonzero(as_tuple=True)
            users = torch.repeat_interleave(torch.arange(offsets.numel() - 1), offsets.diff())
            kept[before] = latest_of_each(domains[before], users[before], self.older)
        return kept


def latest_of_each(domains: Tensor, users: Tensor, count: int) -> Tensor:
    """Tell which events are among the latest of their user and domain.

    Args:
        domains: (E,) int64, of events in the order of time.
        users: (E,) int64, whose they are.
        count: events of each user and domain that are.

    Returns:
        (E,) bool.
    """
    if not domains.numel():
        return torch.zeros(0, dtype=torch.bool)
    group = users * (int(domains.max()) + 1) + domains
    order = group.argsort(stable=True)
    _, sizes = group[order].unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    return torch.empty_like(domains, dtype=torch.bool).index_copy(
        0, order, ends - torch.arange(ends.numel()) <= count
    )
