"""Shapes of a prepared log that its manifest does not hold: distributions and transitions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.counts import domain_counts
from hstu_xd.data.store import InteractionStore


@dataclass(frozen=True)
class DataStats:
    """What the report draws of a store with U users and D domains.

    Attributes:
        domain_names: D names.
        events: (D,) int64, events of each domain.
        lengths: (U,) int64, history lengths.
        deltas: (U,) float64, sum_d (s_d / S)^2 of each user, 1/D..1; 0 for a user without events.
        transitions: (D, D) int64, how often an event of the row's domain is followed by one of
            the column's domain, within users.
    """

    domain_names: list[str]
    events: NDArray[np.int64]
    lengths: NDArray[np.int64]
    deltas: NDArray[np.float64]
    transitions: NDArray[np.int64]

    @property
    def mean_delta(self) -> float:
        """Mean over users that have events."""
        return float(self.deltas[self.lengths > 0].mean())

    @property
    def switch_share(self) -> float:
        """Share of neighbouring events that lie in different domains; 0 without neighbours."""
        total = int(self.transitions.sum())
        return 1 - int(self.transitions.trace()) / total if total else 0.0


def measure(store: InteractionStore) -> DataStats:
    """Read all events of a store once, in blocks of users.

    Raises:
        InputError: the store's catalogue cannot be read.
    """
    num_domains = store.num_domains
    lengths = np.diff(store.offsets)
    deltas = np.zeros(len(lengths))
    events = np.zeros(num_domains, np.int64)
    transitions = np.zeros(num_domains * num_domains, np.int64)
    item_domain = store.catalog.item_domains.numpy()
    for block in domain_counts(store.offsets, store.item_ids, item_domain, num_domains):
        sizes = np.maximum(lengths[block.users, None], 1)
        deltas[block.users] = np.square(block.counts / sizes).sum(axis=1)
        events += block.counts.sum(axis=0)
        user, domain = np.divmod(block.cell, num_domains)
        same_user = user[1:] == user[:-1]
        pairs = (domain[:-1] * num_domains + domain[1:])[same_user]
        transitions += np.bincount(pairs, minlength=num_domains * num_domains)
    return DataStats(
        store.domain_names,
        events,
        lengths,
        deltas,
        transitions.reshape(num_domains, num_domains),
    )
