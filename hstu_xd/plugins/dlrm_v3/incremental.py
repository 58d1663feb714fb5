"""The cross-domain model on top of what a user's rows have left: new rows alone are computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hstu_xd.ops.state_attention.state_reads import QuestionReads
from hstu_xd.plugins.dlrm_v3.domain_groups import RequestLayout
from hstu_xd.plugins.dlrm_v3.domain_states import RequestStates
from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU, CrossDomainTransducer
from hstu_xd.plugins.dlrm_v3.user_memory import (
    NewGroup,
    NewRows,
    NewStates,
    RowMemory,
    UserMemory,
    num_equal,
)


def new_rows(
    memory: UserMemory,
    x: Tensor,
    layout: RequestLayout,
    row_groups: Tensor,
    states: RequestStates | None,
) -> NewRows:
    """Find what a request shares with those before it.

    Args:
        memory: of the user.
        x: (L, K) float, what the layers are given.
        layout: of the request.
        row_groups: (L,) int64, the domain inside which each row attends.
        states: which ones the rows read; None without DDSR.
    """
    asked, num_kept = row_groups[layout.is_target], None
    given = x[~layout.is_target]
    if states is not None:
        # An event reads what those before it in all domains have written.
        asked = row_groups[~layout.is_context]
        num_kept = _num_kept(memory.states, given, _facts(states))
    context = torch.arange(layout.num_context)
    rows, groups = [], {}
    for domain in asked.unique().tolist():
        in_group = row_groups == domain
        events = torch.cat([context, (in_group & layout.is_history).nonzero().squeeze(1)])
        targets = (in_group & layout.is_target).nonzero().squeeze(1)
        kept, same = memory.groups.get(domain), 0
        if kept is not None:
            same = num_equal(kept.inputs, x[events])
            same = same if num_kept is None else int((events < num_kept).sum())
        new = events[same:]
        groups[domain] = NewGroup(kept, same, RowMemory(x[events]), len(new), len(targets))
        rows += [new, targets]
    found = torch.cat(rows)
    reading = None
    if states is not None and num_kept is not None:
        places = torch.zeros(len(x), dtype=torch.int64)
        places[found] = torch.arange(len(found))
        num_kept = max(0, num_kept - len(context))
        reading = _new_states(memory.states, num_kept, given, states, places)
    return NewRows(found, groups, reading)


def _new_states(
    kept: RowMemory | None, num_kept: int, given: Tensor, states: RequestStates, places: Tensor
) -> NewStates:
    """Find which rows read states anew: events from a place on, and all targets."""
    facts = _facts(states)
    return NewStates(
        kept,
        num_kept,
        RowMemory(given, facts),
        places=places[states.places[num_kept:]],
        num_events=len(facts) - num_kept,
        reads=_questions(states, num_kept),
        asked_domains=states.asked_domains[num_kept:],
    )


def _facts(states: RequestStates) -> Tensor:
    """Tell what the answers to events depend on beside their inputs: (n, 4) int64."""
    events = states.history
    domains, length = events.grouping.group_of, events.grouping.num_tokens
    columns = domains, events.timestamps, events.next_timestamps, states.asked_domains[:length]
    return torch.stack(columns, dim=1)


def _num_kept(kept: RowMemory | None, given: Tensor, facts: Tensor) -> int:
    """Count the first rows, the contextual ones included, that are as they were."""
    if kept is None:
        return 0
    num_context = len(given) - len(facts)
    return min(num_equal(kept.inputs, given), num_context + num_equal(kept.facts, facts))


def _questions(states: RequestStates, num_kept: int) -> QuestionReads:
    """Let events from a place on, and then the targets, ask as rows that write nothing."""
    events, targets = states.history, states.targets
    places = torch.arange(num_kept, events.grouping.num_tokens)
    return QuestionReads(
        events,
        groups=torch.cat([events.grouping.group_of[num_kept:], targets.groups]),
        positions=torch.cat([places, targets.positions]),
        written=torch.cat([events.timestamps[num_kept:], targets.written]),
        timestamps=torch.cat([events.next_timestamps[num_kept:], targets.timestamps]),
        apart=True,
    )


class IncrementalTransducer(CrossDomainTransducer):
    """The transducer that gives the layers the new rows of users alone, while it has memories."""

    memories: Sequence[UserMemory] = ()

    def _plan(self, layout: RequestLayout, domains: Tensor, times: Tensor) -> None:
        if not self.memories:
            super()._plan(layout, domains, times)
            return
        self._request = layout, domains, times

    def _hstu_compute(self, *, max_seq_len: int, seq_embeddings: Tensor, **others: Any) -> Tensor:
        if not self.memories:
            return super()._hstu_compute(
                max_seq_len=max_seq_len, seq_embeddings=seq_embeddings, **others
            )
        norm_length = self._cross_domain.norm_length_for(max_seq_len)
        users = self._new_rows(seq_embeddings)
        first = self._request[0].offsets.tolist()
        rows = torch.cat([user.rows + begin for user, begin in zip(users, first)])
        computed = self._stu_module.extend(seq_embeddings[rows], users, norm_length)
        for user, memory in zip(users, self.memories):
            user.commit(memory)
        # Only targets are read; rows of events are put beside them, those that were kept are zero.
        return torch.zeros_like(seq_embeddings).index_copy(0, rows, computed)

    def _new_rows(self, x: Tensor) -> list[NewRows]:
        """Find what is new of each user in (L, K) rows of a batch."""
        layout, *facts = self._request
        settings, lengths = self._cross_domain.settings, layout.offsets.diff()
        num_targets = layout.offsets[1:] - layout.first_targets
        found = []
        rows = zip(*(each.split(lengths.tolist()) for each in (x, *facts)))
        for user, (given, domains, times) in enumerate(rows):
            one = slice(user, user + 1)
            own = RequestLayout.build(lengths[one], num_targets[one], layout.num_context)
            states = RequestStates.build(own, domains, times, settings) if settings.ddsr else None
            groups = domains if settings.domain_mask else torch.zeros_like(domains)
            found.append(new_rows(self.memories[user], given, own, groups, states))
        return found


class IncrementalDlrmHSTU(CrossDomainDlrmHSTU):
    """CrossDomainDlrmHSTU that scores the candidates of users from what is kept of each.

    Its parameters have the same names. Layers attend in buckets, and scores are divided by a fixed
    norm length: without one every event would move all that is kept.
    """

    transducer = IncrementalTransducer

    @contextmanager
    def remembering(self, memories: Sequence[UserMemory]) -> Iterator[None]:
        """Compute on top of the memories of a batch's users, and add to them."""
        self._hstu_transducer.memories = memories
        try:
            yield
        finally:
            self._hstu_transducer.memories = ()
