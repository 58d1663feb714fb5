"""The newest rows of some users through all layers, on top of what their earlier ones left."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hstu_xd.model.fused_layer import Attend, FusedLayer, LayerCache
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.incremental_views import BiasTables, NewRows, RowBiases
from hstu_xd.model.settings import EncoderSettings


@dataclass(frozen=True, eq=False)
class IncrementalModel:
    """A model with its weights laid out for rows that arrive one at a time.

    Attributes:
        model: in evaluation mode.
        layers: first to last.
        tables: biases of all layers.
        sources: (D + 1, K), a domain's factor in the embedding of a switch from it; 0 in the last
            row, for rows whose domain stays.
        destinations: (D, K), a domain's factor in the embedding of a switch to it.
        requests: (D, K), the embedding of a target domain.
        added: (layers, D, W), what a target domain adds to a layer's products: to DDSR's queries.
        initial_memory: (layers, H, D, dqk + dv), DDSR's keys and values of the initial states.
    """

    model: CrossDomainHSTU
    layers: list[FusedLayer]
    tables: BiasTables
    sources: Tensor
    destinations: Tensor
    requests: Tensor
    added: Tensor
    initial_memory: Tensor

    @classmethod
    def from_model(cls, model: CrossDomainHSTU) -> "IncrementalModel":
        """Lay out the weights of a model; later changes of them are not seen."""
        s, layers = model.settings, [layer.fused() for layer in model.encoder.layers]
        sources, destinations, requests = model.next_domain_factors()
        biases = [layer.bias_tables for layer in layers if layer.bias_tables is not None]
        states = [layer.states for layer in layers if layer.states is not None]
        ages = [weights.ages for weights in states if weights.ages is not None]
        return cls(
            model=model,
            layers=layers,
            tables=BiasTables.build(
                s,
                positions=torch.stack([positions for positions, _ in biases]) if biases else None,
                times=torch.stack([times for _, times in biases]) if biases else None,
                state_ages=torch.stack(ages) if ages else None,
            ),
            sources=torch.cat([sources, torch.zeros_like(sources[:1])]),
            destinations=destinations,
            requests=requests,
            added=torch.stack([layer.added_by_target() for layer in layers]),
            initial_memory=torch.stack([weights.initial for weights in states])
            if states
            else torch.zeros(s.num_blocks, 0),
        )

    def memories(
        self, caches: Sequence[LayerCache], rows: Tensor, events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the full encoder's rows left behind, as a user's memory keeps it.

        Args:
            caches: of every layer.
            rows: (R,) int64, which of them to remember.
            events: (n,) int64, rows that write states.

        Returns:
            (layers, H, dqk + dv, R) keys and values of the rows, and (layers, H, n, dqk + dv)
            those of the states they write; None without DDSR.
        """
        pairs = list(zip(self.layers, caches, strict=True))
        memory = [layer.row_memory(cache, rows) for layer, cache in pairs]
        states = [
            layer.states.memory_of(cache.states[events])
            for layer, cache in pairs
            if layer.states is not None
        ]
        return torch.stack(memory), torch.stack(states) if states else None

    def step(self, users: Sequence[NewRows]) -> list[Tensor]:
        """Run rows through all layers, exactly as the full encoder would, and commit the writers.

        What a row goes through alone is one product for the rows of all users; then the rows of
        each user read that user's memory where it lies.

        Args:
            users: rows of each user, of different users if there are writers.

        Returns:
            For each user (V, K) float, unit vectors of the readers.
        """
        with _one_thread():
            parts = [_UserPart(self, rows) for rows in users]
            sizes = [len(rows.item_ids) for rows in users]
            x, targets = self._input(users)
            x, tokens = self._insert_tokens(x, users, sizes)
            added = self.added.index_select(1, targets).unbind()
            for number, layer in enumerate(self.layers):
                x = layer.step(x, added[number], _StepMemory(parts, sizes, tokens, number))
            for part in parts:
                part.commit()
            return [
                rows[user.num_writers :]
                for rows, user in zip(self.model.unit_vectors(x).split(sizes), users, strict=True)
            ]

    def _input(self, users: Sequence[NewRows]) -> tuple[Tensor, Tensor]:
        """Return the layers' input (R, K), and the target domains (R,)."""
        stays = len(self.sources) - 1
        columns = [
            (item, position, stays if domain == target else domain, target)
            for rows in users
            for item, position, domain, target in zip(
                rows.item_ids, rows.positions, rows.domains, rows.target_domains
            )
        ]
        items, positions, sources, targets = torch.tensor(columns).unbind(1)
        signals = torch.addcmul(
            self.requests.index_select(0, targets),
            self.destinations.index_select(0, targets),
            self.sources.index_select(0, sources),
        )
        return self.model.embed(items, positions, signals), targets

    def _insert_tokens(
        self, x: Tensor, users: Sequence[NewRows], sizes: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Put the vectors of history tokens into their rows of (R, K), and return these rows."""
        vectors = self.model.encoder.history_tokens
        if vectors is None:
            return x, None
        starts = accumulate(sizes[:-1], initial=0)
        laid = [
            (start + row, number)
            for start, rows in zip(starts, users)
            for row, number in rows.tokens.items()
        ]
        if not laid:
            return x, None
        places, numbers = torch.tensor(laid).unbind(1)
        return x.index_copy(0, places, vectors.index_select(0, numbers)), places


class _KeysAndValues(NamedTuple):
    """Keys and values that one user's rows read, and the places for their own; a layer each.

    Attributes:
        keys: (H, dqk, n).
        values: (H, n, dv).
        own: (H, dqk + dv, r), the last r of both.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    own: Sequence[Tensor]

    @classmethod
    def from_whole(cls, whole: Tensor, rows: int, settings: EncoderSettings) -> "_KeysAndValues":
        """Take views of (layers, H, dqk + dv, n)."""
        keys, values = whole.split_with_sizes((settings.dqk, settings.dv), 2)
        own = whole[..., whole.shape[3] - rows :]
        return cls(keys.unbind(), values.transpose(2, 3).unbind(), own.unbind())


class _UserPart:
    """One user's part of a step.

    Attributes:
        rows: of the user.
        biases: by what they may read.
        row_memory: of earlier rows and of the new ones.
        state_memory: DDSR's of states in memory, initial ones and those of the new rows; None
            without it.
    """

    def __init__(self, model: IncrementalModel, rows: NewRows) -> None:
        s, user, count = model.tables.settings, rows.user, len(rows.item_ids)
        self.rows = rows
        self.biases = RowBiases.build(model.tables, rows)
        # Memory in half precision is read, and written, through a copy in float32.
        self._memory = user.memory[..., : user.num_rows + count].float()
        self.row_memory = _KeysAndValues.from_whole(self._memory, count, s)
        self.state_memory: _KeysAndValues | None = None
        self._states: Tensor | None = None
        if s.ddsr:
            room = self._memory.new_empty(s.num_blocks, s.num_heads, count, s.dqk + s.dv)
            parts = [user.state_memory.float(), model.initial_memory, room]
            self._states = torch.cat(parts, dim=2)
            self.state_memory = _KeysAndValues.from_whole(self._states.transpose(2, 3), count, s)

    def commit(self) -> None:
        """Leave the writers' keys, values and states in the user's memory."""
        user, writers = self.rows.user, self.rows.num_writers
        if user.memory.dtype != self._memory.dtype:
            places = slice(user.num_rows, user.num_rows + writers)
            user.memory[..., places] = self._memory[..., places]
        states = None
        if self._states is not None:
            first = self._states.shape[2] - len(self.rows.item_ids)
            states = self._states[:, :, first : first + writers]
        self.rows.commit(states)


class _StepMemory(NamedTuple):
    """What a layer's rows read, as :class:`hstu_xd.model.fused_layer.StepMemory` says.

    Attributes:
        users: parts of the step.
        sizes: rows of each.
        tokens: (T,) int64, rows that are history tokens, of all users together; None if none are.
        layer: its number.
    """

    users: Sequence[_UserPart]
    sizes: list[int]
    tokens: Tensor | None
    layer: int

    def read_rows(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Let the rows attend to earlier rows and to one another."""
        read = []
        for user, query, new in self._of_each(queries, own):
            memory = user.row_memory
            memory.own[self.layer].copy_(new)
            bias = user.biases.of_rows(self.layer)
            read.append(attend(query, memory.keys[self.layer], memory.values[self.layer], bias))
        return _heads_together(read)

    def read_states(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Ask the domain states; every event is its domain's newest state, history tokens none."""
        answers = []
        for user, query, new in self._of_each(queries, own):
            memory = user.state_memory
            assert memory is not None
            memory.own[self.layer].copy_(new)
            bias = user.biases.states[self.layer]
            answers.append(attend(query, memory.keys[self.layer], memory.values[self.layer], bias))
        answer = _heads_together(answers)
        return answer if self.tokens is None else answer.index_fill_(0, self.tokens, 0)

    def _of_each(self, queries: Tensor, own: Tensor) -> Iterable[tuple[_UserPart, Tensor, Tensor]]:
        """Split (H, R, dqk) queries and (H, dqk + dv, R) keys and values by user."""
        sizes = self.sizes
        return zip(self.users, queries.split_with_sizes(sizes, 1), own.split_with_sizes(sizes, 2))


def _heads_together(parts: list[Tensor]) -> Tensor:
    """Join (H, r, dv) of each user to (R, H * dv)."""
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: products this small take longer when several share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
