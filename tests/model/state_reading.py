"""What DDSR reads, in tiles of a height that the test chooses."""

from torch import Tensor

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_tiles import StateTiles


def reads_in_tiles(
    grouping: DomainGrouping,
    timestamps: Tensor,
    next_timestamps: Tensor,
    states_per_domain: int,
    height: int | None,
) -> StateReads:
    """``StateReads`` with its lazy ``tiles`` filled in beforehand; None leaves the choice to it."""
    reads = StateReads(grouping, timestamps, next_timestamps, states_per_domain)
    vars(reads)["tiles"] = StateTiles.build(
        grouping, timestamps, next_timestamps, states_per_domain=states_per_domain, height=height
    )
    return reads
