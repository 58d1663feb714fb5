"""Rows of a batch regrouped by user and domain, so that stock layers attend inside domains."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class DomainGroups:
    """A jagged batch [contextual | history | targets] of every user, cut into one of every domain.

    A group holds one user's rows of one domain in their order, behind a copy of the user's
    contextual prefix. Groups stand in the order of users and then of domains, or the shorter ones
    first. Only targets are read from a stack of layers: groups without a target are left out,
    unless rows read the states of other domains.

    Attributes:
        rows: (R,) int64, the row of the batch that stands at each row of the groups.
        lengths: (G,) int64, rows of each group, the prefix included.
        offsets: (G + 1,) int64; group ``g`` has the rows ``offsets[g]:offsets[g + 1]``.
        num_targets: (G,) int64, how many of them, the last ones, are targets.
        target_places: (T,) int64, places of the targets among the rows of the groups.
        num_rows: rows ``L`` of the batch.
    """

    rows: Tensor
    lengths: Tensor
    offsets: Tensor
    num_targets: Tensor
    target_places: Tensor
    num_rows: int

    @classmethod
    def build(
        cls,
        layout: "RequestLayout",
        row_domains: Tensor,
        num_domains: int,
        *,
        with_unasked: bool = False,
        shortest_first: bool = False,
    ) -> "DomainGroups":
        """Regroup a batch.

        Args:
            layout: which rows are contextual, history and targets.
            row_domains: (L,) int64 in ``0..num_domains - 1``, of every row.
            num_domains: number of domains ``D``.
            with_unasked: keep groups without a target.
            shortest_first: sort groups by length; else users who visit one domain alone keep
                their places, and sums over rows their order.
        """
        own = layout.users * num_domains + row_domains
        places = layout.num_users * num_domains
        asked = torch.bincount(own[layout.is_target], minlength=places)
        members = torch.bincount(own[~layout.is_context], minlength=places)
        groups = (members if with_unasked else asked).nonzero().squeeze(1)
        if shortest_first:
            groups = groups[torch.argsort(members[groups], stable=True)]
        number = torch.full((places,), -1, device=own.device)
        number[groups] = torch.arange(groups.numel(), device=own.device)
        own_groups = number[own].masked_fill(layout.is_context, -1)
        members = (own_groups >= 0).nonzero().squeeze(1)
        prefix = torch.arange(layout.num_context, device=own.device)
        prefixes = (layout.offsets[groups // num_domains].unsqueeze(1) + prefix).flatten()
        prefix_groups = torch.arange(groups.numel(), device=own.device).repeat_interleave(
            layout.num_context
        )
        # Prefixes stand first here, so the stable sort leaves them at the head of their groups.
        rows = torch.cat([prefixes, members])
        of_rows, order = torch.sort(torch.cat([prefix_groups, own_groups[members]]), stable=True)
        rows = rows[order]
        lengths = torch.bincount(of_rows, minlength=groups.numel())
        is_copy = order < prefixes.numel()
        return cls(
            rows=rows,
            lengths=lengths,
            offsets=pad(lengths.cumsum(0), (1, 0)),
            num_targets=asked[groups],
            target_places=(layout.is_target[rows] & ~is_copy).nonzero().squeeze(1),
            num_rows=layout.num_rows,
        )

    def gather(self, x: Tensor) -> Tensor:
        """Take the rows of a batch into the groups: (L, K) -> (R, K)."""
        return x[self.rows]

    def places_of(self, rows: Tensor) -> Tensor:
        """Return where history rows and targets of the batch stand in the groups: (n,) -> (n,)."""
        places = torch.zeros(self.num_rows, dtype=torch.int64, device=rows.device)
        places[self.rows] = torch.arange(self.rows.numel(), device=rows.device)
        return places[rows]

    def spread_targets(self, grouped: Tensor) -> Tensor:
        """Put targets back to their rows of the batch, with zeros elsewhere: (R, K) -> (L, K)."""
        places = self.target_places
        whole = grouped.new_zeros(self.num_rows, grouped.shape[1])
        return whole.index_copy(0, self.rows[places], grouped[places])


@dataclass(frozen=True, eq=False)
class RequestLayout:
    """Where the rows of a jagged batch [contextual | history | targets] stand.

    Attributes:
        offsets: (B + 1,) int64; user ``u`` has the rows ``offsets[u]:offsets[u + 1]``.
        users: (L,) int64, the user of each row.
        is_context, is_history, is_target: (L,) bool.
        num_context: contextual rows of every user.
        first_targets: (B,) int64, row of each user's first target, which the history ends before.
    """

    offsets: Tensor
    users: Tensor
    is_context: Tensor
    is_history: Tensor
    is_target: Tensor
    num_context: int
    first_targets: Tensor

    @classmethod
    def build(cls, lengths: Tensor, num_targets: Tensor, num_context: int) -> "RequestLayout":
        """Lay rows out.

        Args:
            lengths: (B,) int64, all rows of each user.
            num_targets: (B,) int64, the last of them.
            num_context: the first of them, as many for every user.
        """
        offsets = pad(lengths.cumsum(0), (1, 0))
        users = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
        position = torch.arange(users.numel(), device=users.device) - offsets[users]
        is_context = position < num_context
        is_target = position >= (lengths - num_targets)[users]
        return cls(
            offsets,
            users,
            is_context,
            ~(is_context | is_target),
            is_target,
            num_context,
            first_targets=offsets[1:] - num_targets,
        )

    def row_domains(self, history: Tensor, targets: Tensor) -> Tensor:
        """Put domains to their rows, 0 to contextual ones: those of history and targets -> (L,)."""
        domains = torch.zeros_like(self.users)
        domains[self.is_history] = history
        domains[self.is_target] = targets
        return domains

    def transitions(self, row_domains: Tensor) -> tuple[Tensor, Tensor]:
        """Return the domain that each row leaves, and the one that it enters.

        A history row tells of the step to the next one. The last one stays where it is: it must not
        know what is asked. A target tells of the step from the last history row to itself.

        Args:
            row_domains: (L,) int64.

        Returns:
            Two (L,) int64.
        """
        left = torch.where(self.is_target, row_domains[self.previous], row_domains)
        return left, self.following(row_domains)

    @property
    def previous(self) -> Tensor:
        """The history row before each row, of all targets the last one: (L,) int64.

        A row without one before it, and a contextual row, has itself.
        """
        own = torch.arange(self.num_rows, device=self.users.device)
        before = torch.where(self.is_target, self.first_targets[self.users], own) - 1
        before = before.clamp(min=0)
        there = ~self.is_context & self.is_history[before] & (self.users[before] == self.users)
        return torch.where(there, before, own)

    def following(self, values: Tensor) -> Tensor:
        """Return what the next history row of the user has, a row's own where there is none.

        So targets keep their own, and the last history row does not know what is asked.

        Args:
            values: (L,), one of every row.
        """
        goes_on = torch.zeros_like(self.is_history)
        same_user = self.users[1:] == self.users[:-1]
        goes_on[:-1] = self.is_history[:-1] & self.is_history[1:] & same_user
        return torch.where(goes_on, values.roll(-1), values)

    @property
    def num_users(self) -> int:
        """Number of users ``B``."""
        return self.offsets.numel() - 1

    @property
    def num_rows(self) -> int:
        """Number of rows ``L``."""
        return self.users.numel()
