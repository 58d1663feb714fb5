"""Which domain states every token of a batch reads: what all layers with DDSR share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.grouping import DomainGrouping
from hstu_xd.lazy import lazy_property
from hstu_xd.modules.state_tiles import StateTiles
from hstu_xd.ops.state_table import StateTable


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
