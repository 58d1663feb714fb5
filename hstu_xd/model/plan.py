"""What all layers share about a batch: groupings, coordinates and domain states.

Which domain states every token of a batch reads: what all layers with DDSR share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_table import StateTable
from hstu_xd.ops.state_attention.state_tiles import StateTiles


@dataclass(frozen=True, eq=False)
class StateReads:
    """A token reads the latest ``M`` states of each domain, its own included.

    Each implementation's layout is built on its first use.

    Attributes:
        grouping: the batch by (user, domain).
        timestamps: (L,) int64.
        next_timestamps: (L,) int64, time of the event after each token.
        states_per_domain: latest states ``M`` of each domain that a token reads.
    """

    grouping: DomainGrouping
    timestamps: Tensor
    next_timestamps: Tensor
    states_per_domain: int

    @lazy_property
    def tiles(self) -> StateTiles:
        """The layout of plain PyTorch; to cut it the host reads the lengths of the histories."""
        return StateTiles.build(
            self.grouping,
            self.timestamps,
            self.next_timestamps,
            states_per_domain=self.states_per_domain,
        )

    @lazy_property
    def table(self) -> StateTable:
        """The layout of the fused kernels."""
        return StateTable.build(
            self.grouping,
            self.timestamps,
            self.next_timestamps,
            states_per_domain=self.states_per_domain,
            tile=self._tile(),
        )

    def _tile(self) -> int:
        """Tokens of a tile, from what the host knows: nothing here may wait for the device."""
        if self.timestamps.device.type == "cpu":
            return 16
        if torch.compiler.is_compiling():
            # The mean length differs from batch to batch: it must not lead to a compilation.
            return 64
        users = max(1, self.grouping.batch_offsets.numel() - 1)
        return 32 if self.grouping.num_tokens / users < 40 else 64


@dataclass(frozen=True, eq=False)
class EncoderPlan:
    """Built once a batch; each part on its first use, so switches that are off cost nothing.

    Attributes:
        domains: (L,) int64, domain of each token.
        target_domains: (L,) int64, domain of the event after each token.
        timestamps: (L,) int64.
        next_timestamps: (L,) int64, time of the event after each token.
        offsets: (B + 1,) int64.
        num_domains: number of domains ``D``.
        states_per_domain: states that DDSR reads per domain ``M``.
        padded_length: tokens of every user where padding was kept, see :class:`JaggedBatch`.
    """

    domains: Tensor
    target_domains: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    offsets: Tensor
    num_domains: int
    states_per_domain: int = 1
    padded_length: int | None = None

    @lazy_property
    def full_view(self) -> DomainGrouping:
        """One group a user: full attention."""
        return DomainGrouping.single(self.offsets, self.domains.numel(), self.padded_length)

    @lazy_property
    def own_view(self) -> DomainGrouping:
        """Queries read the run of their own domain."""
        return DomainGrouping.from_jagged(
            self.domains, self.offsets, self.num_domains, self.padded_length
        )

    @lazy_property
    def target_view(self) -> DomainGrouping:
        """Queries read the run of the domain they predict."""
        return self.own_view.target_view(self.target_domains)

    def own_views(self, *, masked: bool) -> tuple[DomainGrouping, ...]:
        """Groupings whose attentions add up to what a token reads, under the mask or without."""
        return (self.own_view if masked else self.full_view,)

    def target_views(self) -> tuple[DomainGrouping, ...]:
        """The same for heads in the target view."""
        return (self.target_view,)

    # A plan without history tokens holds events alone; see TokenPlan.

    @property
    def events(self) -> "EncoderPlan":
        """The plan of the events alone."""
        return self

    @property
    def num_kept(self) -> int:
        """Rows that an event after the batch's may read."""
        return self.domains.numel()

    def take_events(self, x: Tensor) -> Tensor:
        """Rows of the events."""
        return x

    def spread_events(self, x: Tensor) -> Tensor:
        """Events to their rows."""
        return x

    @property
    def positions(self) -> Tensor:
        """(L,) int64, position of each token in its user's history."""
        return self.full_view.positions

    @lazy_property
    def state_reads(self) -> StateReads:
        """Which domain states every token reads."""
        return StateReads(
            self.own_view, self.timestamps, self.next_timestamps, self.states_per_domain
        )
