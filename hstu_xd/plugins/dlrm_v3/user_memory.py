"""What a user's rows have left in every layer, and which rows of a request are to be computed.

Upstream's positions count back from the request, and its times are told from it, too. So a row is
known by what the layers are given of it and not by its event: as many rows of a domain as are given
once more are kept, and those behind them are computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hstu_xd.ops.state_attention.state_reads import QuestionReads


@dataclass(eq=False)
class RowMemory:
    """Keys and values that rows have left in each layer.

    Attributes:
        inputs: (m, K) float, what the first layer was given.
        facts: (n, 4) int64, what else the events among them depend on; None: nothing else.
        keys: of each layer, first to last, (m, H, dqk) float, or of states (n, H * dqk).
        values: likewise with dv.
    """

    inputs: Tensor
    facts: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Return all of them."""
        facts = [] if self.facts is None else [self.facts]
        return [self.inputs, *facts, *self.keys, *self.values]


@dataclass(eq=False)
class UserMemory:
    """All that is kept of a user.

    Attributes:
        groups: of every domain that was asked for, of all where rows read the states of others; a
            domain's contextual rows, then its events.
        states: domain states that events wrote, with DDSR alone.
    """

    groups: dict[int, RowMemory] = field(default_factory=dict)
    states: RowMemory | None = None

    @classmethod
    def of(cls, told: dict[str, Any]) -> "UserMemory":
        """Undo ``dataclasses.asdict``."""
        groups = {domain: RowMemory(**group) for domain, group in told["groups"].items()}
        return cls(groups, RowMemory(**told["states"]) if told["states"] else None)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(tensor.nbytes for part in self.parts() for tensor in part.tensors())

    def parts(self) -> Iterator[RowMemory]:
        """Go through groups and states."""
        yield from self.groups.values()
        if self.states is not None:
            yield self.states


@dataclass(eq=False)
class GrowingMemory:
    """What is kept of rows from a request on: what still holds, and what its layers add.

    Attributes:
        kept: of earlier requests; None: nothing.
        num_kept: rows of it that still hold.
        memory: of this request.
    """

    kept: RowMemory | None
    num_kept: int
    memory: RowMemory

    def keep(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take what the next layer made of the new rows; return what it has of all of them."""
        layer, memory = len(self.memory.keys), self.memory
        if self.kept is not None and self.num_kept:
            keys = torch.cat([self.kept.keys[layer][: self.num_kept], keys])
            values = torch.cat([self.kept.values[layer][: self.num_kept], values])
        memory.keys.append(keys)
        memory.values.append(values)
        return keys, values


@dataclass(eq=False)
class NewGroup(GrowingMemory):
    """The rows of one domain that are computed for a request.

    Attributes:
        num_events: contextual rows and events that are new, which stand first.
        num_targets: the targets of the domain.
    """

    num_events: int
    num_targets: int

    @property
    def num_rows(self) -> int:
        """Count the rows."""
        return self.num_events + self.num_targets


@dataclass(eq=False)
class NewStates(GrowingMemory):
    """The rows of a request that read domain states.

    Attributes:
        places: (S,) int64, places of the new events, then of the targets, among the new rows.
        num_events: new events.
        reads: which states they read.
        asked_domains: (S,) int64, the domain that each row's query knows.
    """

    places: Tensor
    num_events: int
    reads: QuestionReads
    asked_domains: Tensor


@dataclass(frozen=True, eq=False)
class NewRows:
    """The rows of one user's request that the layers compute.

    Attributes:
        rows: (R,) int64, where they stand in the request, group by group: new events, then targets.
        groups: of the domains that are computed.
        states: what reads domain states; None without DDSR.
    """

    rows: Tensor
    groups: dict[int, NewGroup]
    states: NewStates | None

    def commit(self, memory: UserMemory) -> None:
        """Let a user's memory be what the layers have kept."""
        if self.states is not None:
            memory.groups, memory.states = {}, self.states.memory
        memory.groups.update({domain: new.memory for domain, new in self.groups.items()})


def num_equal(kept: Tensor | None, given: Tensor) -> int:
    """Count the first rows that two tables share; 0 without the first one.

    Example:
        >>> num_equal(torch.tensor([[1], [2], [3]]), torch.tensor([[1], [2], [4], [5]]))
        2
    """
    if kept is None:
        return 0
    both = min(len(kept), len(given))
    return int((kept[:both] == given[:both]).all(1).int().cumprod(0).sum())
