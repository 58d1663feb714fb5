"""The ranker: vectors of candidate and found events, the interest between them, chances by goal."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_xd.interest import interest_of
from hstu_xd.interest.positions import Positions, gap_buckets
from hstu_xd.model.inputs import TransitionAwarePositionalEmbedding
from hstu_xd.ranking.batches import RequestBatch
from hstu_xd.ranking.domain_branch import DomainBranch, Encoded, latest_domains
from hstu_xd.ranking.histories import Levels
from hstu_xd.ranking.settings import RankingSettings
from hstu_xd.search.soft import Requests, SoftSearch


class ItemVectors(nn.Module):
    """Tables of items and of the nodes of each level; an item's vector is all of them, end to end.

    Args:
        paths: (I + 1, H + 1) int64 nodes of every item id, the item itself first; -1: none.
        known: (I + 1,) bool, items that have a vector of their own; the others share one.
        item_width: of the items' table.
        level_width: of the tables of levels.
        std: of the tables' beginning.

    Attributes:
        widths: of each level's part of the result.
        width: of the result.
    """

    rows: Tensor
    starts: Tensor

    def __init__(
        self,
        paths: NDArray[np.int64],
        known: NDArray[np.bool_],
        *,
        item_width: int,
        level_width: int,
        std: float,
    ) -> None:
        super().__init__()
        rows = paths + 1  # row 0 is of what there is not
        rows[:, 0] = np.where(known, np.cumsum(known), 0)
        widths = [item_width] + [level_width] * (paths.shape[1] - 1)
        self.widths = widths
        tables = [
            nn.Embedding(int(column.max()) + 1, width)
            for column, width in zip(rows.T, widths, strict=True)
        ]
        for table in tables:
            nn.init.normal_(table.weight, std=std)
        self.tables = nn.ModuleList(tables)
        self.register_buffer("rows", torch.from_numpy(rows), persistent=False)
        starts = np.cumsum([0, *(len(table.weight) for table in tables)])[:-1]
        self.register_buffer("starts", torch.from_numpy(starts), persistent=False)
        self.width = sum(widths)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Return which item ids have a vector of their own: (I + 1,) bool."""
        return (self.rows[:, 0] > 0).numpy(force=True)

    def forward(self, items: Tensor) -> Tensor:
        """Return vectors of item ids, of any shape: (..., width)."""
        rows = self.rows[items]
        if self.training and len(set(self.widths)) == 1:
            # One look into all tables: a step goes through all of them anyway, an answer must not.
            whole = torch.cat(list(self.tables.parameters()))
            return nn.functional.embedding(rows + self.starts, whole).flatten(-2)
        each = zip(self.tables, rows.unbind(-1), strict=True)
        return torch.cat([table(row) for table, row in each], -1)


class SoftView(nn.Module):
    """What soft search finds in the whole history, as a view of each candidate beside others.

    Args:
        rows: (I + 1, F) int64 row of every item id in the table of each field.
        goals: number of goals.
        settings: all of the run.

    Attributes:
        out_features: width of the view.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, goals: int, settings: RankingSettings) -> None:
        super().__init__()
        search, rank = settings.search, settings.rank
        self._k = search.k
        self.register_buffer("rows", rows, persistent=False)
        self.search = SoftSearch(
            [int(column.max()) + 1 for column in rows.T],
            width=search.width,
            attention_width=search.attention_width or None,
            tables=search.soft,
            init_std=rank.init_std,
        )
        self.out_features = 3 * search.width * rows.shape[1]
        self.over_all = (
            layers_of([self.out_features, *rank.hidden, goals]) if search.auxiliary else None
        )

    def forward(self, batch: RequestBatch) -> Tensor:
        """Return the view of every candidate: (R, C, out_features).

        For padding it is zeros, or anything where the events have padding, too.
        """
        asked = self._asked(batch)
        if batch.histories is not None and batch.histories.padded_length is not None:
            there = (batch.histories.items > 0).view(batch.candidates.shape[0], -1)
            read = self.search(asked, self.search.search_padded(asked, there, self._k))
            return read.view(*batch.candidates.shape, -1)
        return self._laid_out(self.search(asked, self.search.search(asked, self._k)), batch)

    def learn(self, batch: RequestBatch) -> tuple[Tensor, Tensor]:
        """Return the view, and logits of the auxiliary layers, which read all events.

        Returns:
            (R, C, out_features) and (Q, G).
        """
        assert self.over_all is not None
        of_found, of_all = self.search.learn(self._asked(batch), self._k)
        return self._laid_out(of_found, batch), self.over_all(of_all)

    def _laid_out(self, read: Tensor, batch: RequestBatch) -> Tensor:
        """Lay (Q, out_features) of candidates out in a row a request, zeros behind."""
        view = read.new_zeros(*batch.mask.shape, self.out_features)
        view[batch.mask] = read
        return view

    def _asked(self, batch: RequestBatch) -> Requests:
        assert batch.histories is not None
        histories = batch.histories
        requests, width = batch.candidates.shape
        if histories.padded_length is not None:
            candidates, offsets = batch.candidates.flatten(), torch.arange(requests + 1) * width
        else:
            candidates = batch.candidates[batch.mask]
            offsets = nn.functional.pad(batch.mask.sum(1).cumsum(0), (1, 0))
        return Requests(
            events=self.rows[histories.items],
            gaps=histories.gaps,
            offsets=histories.offsets,
            candidates=self.rows[candidates],
            candidate_offsets=offsets,
        )


def layers_of(widths: Sequence[int]) -> nn.Sequential:
    """Make linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RankingModel(nn.Module, ABC):
    """What is trained on requests: logits of their candidates, each for the goal of its request.

    Args:
        levels: of the store's items.
        known: (I + 1,) bool, items that have a vector of their own.
        goals: number of goals.
        settings: all of the run.

    Attributes:
        items: what makes vectors of item ids.
    """

    items: ItemVectors

    @abstractmethod
    def __init__(
        self, levels: Levels, known: NDArray[np.bool_], goals: int, settings: RankingSettings
    ) -> None:
        super().__init__()

    def like(self, levels: Levels, goals: int, settings: RankingSettings) -> "RankingModel":
        """Make a new one of the same class that knows the same items, by other settings."""
        return type(self)(levels, self.items.known, goals, settings)

    @abstractmethod
    def forward(self, batch: RequestBatch) -> Tensor:
        """Return the logits of the requests' candidates for their goals: (R, C)."""

    @abstractmethod
    def tables(self) -> list[nn.Parameter]:
        """Return the parameters that are looked up rather than multiplied."""

    def loss(self, batch: RequestBatch) -> Tensor:
        """Sum the binary cross-entropy of all candidates, each for the goal of its request."""
        return cross_entropy(self(batch)[batch.mask], batch)


def cross_entropy(logits: Tensor, batch: RequestBatch) -> Tensor:
    """Sum the binary cross-entropy of the logits of a batch's candidates, (Q,) in their order."""
    return nn.functional.binary_cross_entropy_with_logits(
        logits, batch.labels[batch.mask], reduction="sum"
    )


class Ranker(RankingModel):
    """Gives each candidate of a request the chance that it is taken, for the request's goal.

    Layers read views of a candidate side by side: what ``xd_interest`` makes of the events that
    were found, and, where they are asked for, that of soft search and that of the domain branch,
    ``[h, h * c]`` with h the latest events as they are encoded for the candidate's domain.

    Args:
        levels: of the store's items.
        known: (I + 1,) bool, items that have a vector of their own.
        goals: number of goals.
        settings: all of the run.
    """

    domains: Tensor

    def __init__(
        self, levels: Levels, known: NDArray[np.bool_], goals: int, settings: RankingSettings
    ) -> None:
        super().__init__(levels, known, goals, settings)
        rank, std = settings.rank, settings.rank.init_std
        self.items = ItemVectors(
            levels.paths, known, item_width=rank.item_width, level_width=rank.level_width, std=std
        )
        self.register_buffer("domains", torch.from_numpy(levels.domains), persistent=False)
        fields = dict(zip(levels.names, self.items.widths, strict=True))
        self.goals = nn.Embedding(goals, rank.goal_width)
        states = settings.interest.domain_states
        places = settings.search.k + states * levels.num_domains
        # Whether every candidate has events of its own, or those of a request are its candidates'.
        self._per_candidate = settings.search.kind == "hard"
        self.interest = interest_of(settings.interest, fields, places=places, goals=goals, std=std)
        read = self.interest.out_features if self.interest is not None else self.items.width
        self.soft = None
        if settings.search.soft != "none":
            self.soft = SoftView(self.items.rows, goals, settings)
            read += self.soft.out_features
        self.branch = None
        if settings.short.events:
            encoder = settings.encoder_settings(levels.num_domains)
            self.branch = DomainBranch(self.items.width, encoder, states=states)
            read += 2 * self.items.width
        counts = levels.counts_width if settings.interest.counts else 0
        self.head = layers_of([read + rank.goal_width + counts, *rank.hidden, goals])
        self.tape = None  # made last, so that all else begins as without it
        if settings.interest.tape and self.interest is not None:
            self.tape = TransitionAwarePositionalEmbedding(levels.num_domains, self.items.width)

    def forward(self, batch: RequestBatch) -> Tensor:
        """Return the logits of the requests' candidates for their goals: (R, C)."""
        return self._logits(batch, None if self.soft is None else self.soft(batch))

    def _logits(self, batch: RequestBatch, soft: Tensor | None) -> Tensor:
        candidates = self.items(batch.candidates)
        encoded = self._encoded(batch)
        views = [self._interest_in(candidates, batch, encoded)]
        if soft is not None:
            views.append(soft)
        if encoded is not None:
            views += [encoded.read, encoded.read * candidates]
        of_goal = self.goals(batch.goals)[:, None].expand(-1, candidates.shape[1], -1)
        logits = self.head(torch.cat([*views, of_goal, batch.counts], -1))
        return logits.gather(-1, batch.goals[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]

    def _interest_in(
        self, candidates: Tensor, batch: RequestBatch, encoded: Encoded | None
    ) -> Tensor:
        """Return what the found events say of each candidate, which is part of it."""
        if self.interest is None:
            return candidates
        if self.tape is not None:
            candidates = candidates + self._switches(batch, self.tape)
        events, there, buckets = self.items(batch.events), batch.events > 0, batch.buckets
        per_group, goals, groups = candidates, batch.goals, 1
        if self._per_candidate:
            groups = candidates.shape[1]
            per_group = candidates.flatten(0, 1).unsqueeze(1)
            goals = goals.repeat_interleave(groups)
        if encoded is not None and encoded.states is not None:
            ages = encoded.ages.repeat_interleave(groups, 0)
            events = torch.cat([events, encoded.states.repeat_interleave(groups, 0)], 1)
            there = torch.cat([there, ages > 0], 1)
            buckets = torch.cat([buckets, gap_buckets(ages.clamp(min=1))], 1)
        found = self.interest(per_group, events, there, buckets, goals)
        return found.view(*candidates.shape[:2], -1)

    def _switches(self, batch: RequestBatch, tape: nn.Module) -> Tensor:
        """Return what TAPE says of the way from the latest event to each candidate: (R, C, d)."""
        assert batch.latest is not None
        entered = self.domains[batch.candidates].clamp(min=0)
        left = latest_domains(self.domains[batch.latest.items], batch.latest)[:, None]
        return tape(torch.where(left < 0, entered, left), entered)  # without events no switch

    def _encoded(self, batch: RequestBatch) -> Encoded | None:
        """Return what the latest events say, where there is an encoder."""
        if self.branch is None:
            return None
        assert batch.latest is not None
        items = batch.latest.items
        return self.branch(
            self.items(items), self.domains[items], batch.latest, self.domains[batch.candidates]
        )

    def loss(self, batch: RequestBatch) -> Tensor:
        """Sum the binary cross-entropy of all candidates, each for the goal of its request.

        The auxiliary loss of soft search, where there is one, counts as much as that of the ranker.
        """
        if self.soft is None or self.soft.over_all is None:
            return super().loss(batch)
        view, others = self.soft.learn(batch)
        goals = batch.goals.repeat_interleave(batch.mask.sum(1))
        auxiliary = cross_entropy(others.gather(1, goals[:, None])[:, 0], batch)
        return cross_entropy(self._logits(batch, view)[batch.mask], batch) + auxiliary

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters that are looked up rather than multiplied.

        Encoder and TAPE are none of them: they learn at one rate, as under ``hstu-xd train``.
        """
        found = [*self.items.parameters(), *self.goals.parameters()]
        if self.interest is not None:
            for part in self.interest.modules():
                found += list(part.parameters()) if isinstance(part, Positions) else []
        if self.soft is not None:
            found += self.soft.search.tables()
        return found
