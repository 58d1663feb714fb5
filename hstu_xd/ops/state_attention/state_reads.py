"""Which domain states every token of a batch reads: the plan that all layers with DDSR share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_table import StateTable
from hstu_xd.ops.state_attention.state_tiles import StateTiles


@dataclass(frozen=True, eq=False)
class StateReads:
    """The plan of :func:`hstu_xd.ops.state_attention`: tokens, their times, states per domain.

    A token reads the latest ``M`` states of each domain, its own included. The layout that an
    implementation needs is built on its first use.

    Attributes:
        grouping: the batch by (user, domain).
        timestamps: (L,) int64, when each token happened, in the log's own unit.
        next_timestamps: (L,) int64, time of the event after each token.
        states_per_domain: latest states ``M`` of each domain that a token reads.

    Raises:
        InputError: a target view for ``grouping``, times that are not int64 or not one a token, or
            ``states_per_domain`` below 1.

    Example:
        >>> domains, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 3])
        >>> grouping = DomainGrouping.from_jagged(domains, offsets, 2)
        >>> times = torch.tensor([5, 6, 9])
        >>> StateReads(grouping, times, times, states_per_domain=1).num_rows
        5
    """

    grouping: DomainGrouping
    timestamps: Tensor
    next_timestamps: Tensor
    states_per_domain: int

    def __post_init__(self) -> None:
        length = self.grouping.num_tokens
        if self.grouping.key_grouping is not None:
            raise InputError(
                "reads.grouping is a target view; the grouping of the tokens by their own domain "
                "is needed, as DomainGrouping.from_jagged gives it"
            )
        for name in ("timestamps", "next_timestamps"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (length,) or tensor.dtype != torch.int64:
                raise InputError(
                    f"reads.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"torch.int64 of shape ({length},) is needed, one entry a token"
                )
        if self.states_per_domain < 1:
            raise InputError(
                f"reads.states_per_domain is {self.states_per_domain}; at least 1 is needed"
            )

    @property
    def num_rows(self) -> int:
        """Rows ``L + D`` of keys and values: a state of each token, an initial one a domain."""
        return self.grouping.num_tokens + self.grouping.num_domains

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
        """Choose the tokens of a tile by what the host knows: nothing may wait for the device."""
        if self.timestamps.device.type == "cpu":
            return 16
        if torch.compiler.is_compiling():
            # The mean length differs from batch to batch: it must not lead to a compilation.
            return 64
        users = max(1, self.grouping.batch_offsets.numel() - 1)
        return 32 if self.grouping.num_tokens / users < 40 else 64
