"""The newest rows of some users through all layers, on top of what their earlier ones left."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hstu_xd.model.fused_layer import FusedLayer, LayerCache
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.incremental_views import BiasTables, NewRows
from hstu_xd.model.step_memory import EagerMemory, NativeMemory, loops_suit


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
        added: (D, W) of each layer, what a target domain adds to its products: to DDSR's queries.
        initial_memory: (layers with DDSR, H, D, dqk + dv), keys and values of the initial states.
        in_loops: read memories by the loops in C.
    """

    model: CrossDomainHSTU
    layers: list[FusedLayer]
    tables: BiasTables
    sources: Tensor
    destinations: Tensor
    requests: Tensor
    added: list[Tensor]
    initial_memory: Tensor
    in_loops: bool

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
            added=[layer.added_by_target() for layer in layers],
            initial_memory=torch.stack([weights.initial for weights in states])
            if states
            else torch.zeros(0),
            in_loops=loops_suit(s),
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
            (layers, H, dqk + dv, R) keys and values of the rows, and of the layers with DDSR
            (layers, H, n, dqk + dv) those of the states they write; None without any.
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
        with _one_thread() as threads:
            sizes = [len(rows.item_ids) for rows in users]
            x, targets = self._input(users)
            x, tokens = self._insert_tokens(x, users, sizes)
            given = self.tables, self.initial_memory, users
            if self.in_loops:
                memory = NativeMemory(*given, threads=threads)
            else:
                memory = EagerMemory(*given, tokens)
            for number, layer in enumerate(self.layers):
                memory.layer = number
                x = layer.step(x, self.added[number].index_select(0, targets), memory)
            memory.commit()
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


@contextmanager
def _one_thread() -> Iterator[int]:
    """Compute with one thread: products this small take longer when several share them.

    Yields how many there are otherwise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
