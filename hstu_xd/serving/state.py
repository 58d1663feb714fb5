"""What is kept of one user between two events."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.modules.settings import EncoderSettings

_FIRST_CAPACITY = 16


@dataclass
class UserState:
    """Events of the window and what all but the last of them left behind in every layer.

    The last event is *pending*: its representation depends on the domain and time of the event
    after it, so it is committed when that one arrives, and computed afresh for every request.

    Attributes:
        item_ids: (n,) int64, events of the window, the pending one last.
        timestamps: (n,) int64.
        domains: (n,) int64.
        forgotten: (f,) int64, items of events that left the window.
        committed: number of events in the arrays below: ``n - 1``, or 0 without any event.
        keys: (layers, capacity, H * dqk), in order of arrival.
        values: (layers, capacity, H * dv).
        state_keys: (layers, D, M, H * dqk), DDSR's keys of each domain's latest states, newest
            first; empty without DDSR.
        state_values: (layers, D, M, H * dv).
        state_times: (D, M) int64, time of the event that wrote each state.
        state_counts: (D,) int64, how many of the M are there.
    """

    item_ids: Tensor
    timestamps: Tensor
    domains: Tensor
    forgotten: Tensor
    committed: int
    keys: Tensor
    values: Tensor
    state_keys: Tensor
    state_values: Tensor
    state_times: Tensor
    state_counts: Tensor

    @classmethod
    def empty(cls, settings: EncoderSettings, dtype: torch.dtype) -> "UserState":
        """The state of a user of whom nothing is known."""
        s, ids = settings, torch.zeros(0, dtype=torch.int64)
        domains = s.num_domains if s.ddsr else 0
        kept = (s.num_blocks, domains, s.states_per_domain)
        return cls(
            item_ids=ids,
            timestamps=ids,
            domains=ids,
            forgotten=ids,
            committed=0,
            keys=torch.zeros(s.num_blocks, 0, s.num_heads * s.dqk, dtype=dtype),
            values=torch.zeros(s.num_blocks, 0, s.num_heads * s.dv, dtype=dtype),
            state_keys=torch.zeros(*kept, s.num_heads * s.dqk, dtype=dtype),
            state_values=torch.zeros(*kept, s.num_heads * s.dv, dtype=dtype),
            state_times=torch.zeros(kept[1:], dtype=torch.int64),
            state_counts=torch.zeros(domains, dtype=torch.int64),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, spare capacity included.

        Committed events take ``layers * H * (dqk + dv) * itemsize`` each, all events 24 more, and
        DDSR ``layers * D * M * H * (dqk + dv) * itemsize + 8 * D * (M + 1)`` whatever the history.
        """
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add_pending(self, item_id: int, timestamp: int, domain: int) -> None:
        """Take an event as the pending one; what was pending must have been committed."""
        self.item_ids = _appended(self.item_ids, item_id)
        self.timestamps = _appended(self.timestamps, timestamp)
        self.domains = _appended(self.domains, domain)

    def commit(
        self, keys: Tensor, values: Tensor, state_keys: Tensor, state_values: Tensor
    ) -> None:
        """Keep what the pending event left behind.

        Args:
            keys: (layers, H * dqk).
            values: (layers, H * dv).
            state_keys: (layers, H * dqk), of the state it writes; unused without DDSR.
            state_values: (layers, H * dv).
        """
        self._reserve(self.committed + 1)
        self.keys[:, self.committed] = keys.to(self.keys.dtype)
        self.values[:, self.committed] = values.to(self.values.dtype)
        self.committed += 1
        if self.state_counts.numel():
            domain = int(self.domains[-1])
            for kept, new in (
                (self.state_keys[:, domain], state_keys),
                (self.state_values[:, domain], state_values),
            ):
                kept[:, 1:] = kept[:, :-1].clone()
                kept[:, 0] = new.to(kept.dtype)
            times = self.state_times[domain]
            times[1:] = times[:-1].clone()
            times[0] = self.timestamps[-1]
            slots = self.state_times.shape[1]
            self.state_counts[domain] = min(slots, int(self.state_counts[domain]) + 1)

    def _reserve(self, events: int) -> None:
        capacity = self.keys.shape[1]
        if events <= capacity:
            return
        capacity = max(_FIRST_CAPACITY, events, capacity + capacity // 2)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(old.shape[0], capacity, old.shape[2])
            new[:, : self.committed] = old[:, : self.committed]
            setattr(self, name, new)


def _appended(values: Tensor, value: int) -> Tensor:
    return torch.cat([values, values.new_tensor([value])])
