"""What all layers share about a batch: groupings, coordinates and domain states."""

from dataclasses import dataclass

from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_reads import StateReads


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
