"""What is kept of users between two events, and a bounded place in memory for it."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hstu_xd.data.window import Window, latest_of_each
from hstu_xd.model.settings import EncoderSettings

# Arrays that are full grow by this many places or a 32nd of their length, whichever is more.
_SPARE = 8


@dataclass
class UserState:
    """Events of the window and what the committed ones left behind in every layer.

    The last event is *pending*: its representation depends on the domain and time of the event
    after it, so it is computed afresh for every request. Events before it can be *committed*: what
    they leave to later ones is final. That is done when it is first needed, so that some of the
    newest events may not be committed yet.

    Memory holds a row of every committed event. Where the model cuts histories into segments, it
    holds rows of the events that can still be read, and of the history tokens laid before the first
    event that is not committed; the others are gone.

    Arrays have spare places behind what they hold; a step uses them for its own rows.

    Attributes:
        events: (3, capacity) int64, item ids, timestamps and domains of the window's events.
        length: number of events ``n``.
        older: of those, events of before the latest ones, kept as their domain's latest there.
        forgotten: (f,) int64, items of events that are kept no more.
        memory: (layers, H, dqk + dv, capacity), keys and values of rows, rows last: so they are
            read fastest.
        rows: (2, capacity) int64, what the rows in memory are, see :class:`SegmentedWindow`; (0,
            capacity) where the model does not cut histories: they are the committed events.
        num_rows: number of rows in memory ``R``.
        committed: number of committed events, ``n - 1`` at most.
        state_memory: (layers with DDSR, H, D * M, dqk + dv), keys and values of each domain's
            latest states, the ``i``-th of a domain in place ``i mod M``; empty without DDSR.
        state_times: (D * M,) int64, time of the event that wrote each state.
        state_counts: (D,) int64, states that each domain has written so far.
        revision: which of the user's values in a store this was; empty where it was none.
        unsaved: events that it has been given since.
        version: digest of 16 bytes of the history's version that it was made of; empty where
            histories have no versions.
    """

    events: Tensor
    length: int
    forgotten: Tensor
    memory: Tensor
    rows: Tensor
    num_rows: int
    committed: int
    state_memory: Tensor
    state_times: Tensor
    state_counts: Tensor
    revision: bytes = b""
    unsaved: int = 0
    version: bytes = b""
    older: int = 0

    @classmethod
    def empty(cls, settings: EncoderSettings, dtype: torch.dtype) -> "UserState":
        """Return the state of a user of whom nothing is known."""
        s = settings
        width = s.dqk + s.dv
        domains = s.num_domains if s.ddsr else 0
        num_states = domains * s.states_per_domain
        return cls(
            events=torch.zeros(3, 0, dtype=torch.int64),
            length=0,
            forgotten=torch.zeros(0, dtype=torch.int64),
            memory=torch.zeros(s.num_blocks, s.num_heads, width, 0, dtype=dtype),
            rows=torch.zeros(2 if s.has_segments else 0, 0, dtype=torch.int64),
            num_rows=0,
            committed=0,
            state_memory=torch.zeros(
                len(s.state_layers), s.num_heads, num_states, width, dtype=dtype
            ),
            state_times=torch.zeros(num_states, dtype=torch.int64),
            state_counts=torch.zeros(domains, dtype=torch.int64),
        )

    @property
    def item_ids(self) -> Tensor:
        """Return what the window holds: (n,) int64."""
        return self.events[0, : self.length]

    @property
    def timestamps(self) -> Tensor:
        """Return what the window holds: (n,) int64."""
        return self.events[1, : self.length]

    @property
    def domains(self) -> Tensor:
        """Return what the window holds: (n,) int64."""
        return self.events[2, : self.length]

    @property
    def seen(self) -> Tensor:
        """Return the items of all events, those that left the window too: (n + f,) int64."""
        return torch.cat([self.item_ids, self.forgotten])

    @property
    def last_time(self) -> int | None:
        """Return the time of the last event; None without events."""
        return int(self.timestamps[-1]) if self.length else None

    @property
    def uncommitted(self) -> int:
        """Count the events before the pending one that are not committed yet."""
        return max(0, self.length - 1 - self.committed)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all arrays: :func:`expected_bytes`, and spare places.

        Those are at most ``max(8, n / 32)`` rows' and events', and as many as there were rows in a
        step.
        """
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add(self, events: Tensor) -> None:
        """Take (3, m) events as the newest; the one that was pending no longer is."""
        end = self.length + events.shape[1]
        self.events = _with_room(self.events, end)
        self.events[:, self.length : end] = events
        self.length = end
        self.unsaved += events.shape[1]

    def lacked(self, history: Tensor, window: Window) -> Tensor | None:
        """Return what of a history came after the events that this state was made of.

        Args:
            history: (3, N) all events of the user, oldest first.
            window: of the session.

        Returns:
            (3, m) the newest events; None where the state is not that of the events before them,
            as after one of those was removed.
        """
        older, latest = self.events[:, : self.length].tensor_split([self.older], dim=1)
        quarter, number = max(1, window.latest // 4), latest.shape[1]
        # How many have left follows from the number of events, so that few places need a look.
        for start in reversed(range(0, history.shape[1] - number + 1, quarter)):
            before, same, after = history.tensor_split([start, start + number], dim=1)
            if start != left_window(start + number, window.latest) or not torch.equal(same, latest):
                continue
            kept = latest_of_each(before[2], torch.zeros_like(before[2]), window.older)
            if torch.equal(before[:, kept], older) and torch.equal(
                before[0, ~kept].unique(), self.forgotten
            ):
                return after
        return None

    def reserve(self, rows: int, readers: int) -> None:
        """Make room for rows behind those in memory, and for readers of the pending event."""
        end = self.num_rows + rows
        self.memory = _with_room(self.memory, end)
        self.rows = _with_room(self.rows, end)
        self.events = _with_room(self.events, max(1, self.length) + readers - 1)

    def commit(self, events: int, rows: int, states: Tensor | None) -> None:
        """Count the first uncommitted events, whose keys and values are in memory, as committed.

        Args:
            events: number of events ``m``.
            rows: number of rows that have been added to memory for them, behind those it had.
            states: (layers with DDSR, H, m, dqk + dv), keys and values of the states that they
                write; None without DDSR.
        """
        self.num_rows += rows
        first, self.committed = self.committed, self.committed + events
        if states is None or not events:
            return
        counts = self.state_counts.tolist()
        states_per_domain = len(self.state_times) // len(counts)
        latest: dict[int, int] = {}  # place -> the event whose state it holds now
        domains = self.events[2, first : self.committed].tolist()
        for event, domain in enumerate(domains, start=first):
            place = domain * states_per_domain + counts[domain] % states_per_domain
            latest[place] = event
            counts[domain] += 1
        for place, event in latest.items():
            self.state_memory[:, :, place] = states[:, :, event - first]
            self.state_times[place] = self.events[1, event]
        self.state_counts = torch.tensor(counts)

    def keep_only(self, readable: Tensor) -> None:
        """Free the rows in memory that are not readable: (R,) bool."""
        if bool(readable.all()):
            return
        (rows,) = readable.nonzero(as_tuple=True)
        self.memory, self.rows = self.memory.index_select(3, rows), self.rows.index_select(1, rows)
        self.num_rows = len(rows)

    def slide(self, leaving: int, older: int) -> None:
        """Forget the oldest events but for their items; no event is committed any more.

        Args:
            leaving: of the latest events.
            older: events of each domain, of those that have left, that are kept all the same.
        """
        before = self.domains[: self.older + leaving]
        kept = torch.ones(self.length, dtype=torch.bool)
        kept[: before.numel()] = latest_of_each(before, torch.zeros_like(before), older)
        self.forgotten = torch.cat([self.forgotten, self.item_ids[~kept]]).unique()
        self.events = self.events[:, : self.length][:, kept]
        self.older = int(kept[: before.numel()].sum())
        self.length = int(kept.sum())
        self.restart(self.memory[..., :0].clone(), self.rows[:, :0].clone())

    def restart(self, memory: Tensor, rows: Tensor) -> None:
        """Start over with room for other memory; no event is committed yet."""
        self.memory, self.rows = memory, rows
        self.num_rows = self.committed = 0
        self.state_times.zero_()
        self.state_counts.zero_()


def left_window(events: int, window: int) -> int:
    """Return how many of so many events have left a window, which slides by quarters."""
    quarter = max(1, window // 4)
    return quarter * max(0, -(-(events - window) // quarter))


def expected_bytes(
    settings: EncoderSettings, events: int, dtype: torch.dtype, *, rows: int | None = None
) -> int:
    """Compute the bytes of a state whose ``n`` events are committed but for the last.

    ``24 n + R L E + D * M * S E + 8 D (M + 1) + 8 f`` with ``E = H * (dqk + dv) * itemsize``:
    three integers an event, keys and values of the ``R = n - 1`` committed ones in ``L`` layers,
    states in the ``S`` layers with DDSR (none without it), and here no items ``f`` that left the
    window. A model that cuts histories into segments adds ``16 R``, two integers a row, and has
    fewer of them.

    Args:
        settings: of the model.
        events: number ``n``.
        dtype: of keys and values.
        rows: number ``R``, where it is not ``n - 1``: one less than
            ``EncoderRows.num_readable`` of the window, in which the pending event counts.
    """
    s = settings
    of_layer = s.num_heads * (s.dqk + s.dv) * dtype.itemsize
    states = s.num_domains * s.states_per_domain if s.ddsr else 0
    counts = s.num_domains if s.ddsr else 0
    rows = max(1, events) - 1 if rows is None else rows
    memory = rows * (s.num_blocks * of_layer + (16 if s.has_segments else 0))
    memory += states * len(s.state_layers) * of_layer
    return 24 * events + memory + 8 * (states + counts)


def _with_room(values: Tensor, length: int) -> Tensor:
    """Return the values in an array whose last dimension has at least ``length`` places."""
    known = values.shape[-1]
    if length <= known:
        return values
    # What was empty takes just what it needs: it may be all that ever comes.
    spare = max(_SPARE, length // 32) if known else 0
    roomy = values.new_zeros(*values.shape[:-1], length + spare)
    roomy[..., :known] = values
    return roomy


class Sized(Protocol):
    """What knows its size."""

    @property
    def num_bytes(self) -> int:
        """Count its bytes."""
        ...


S = TypeVar("S", bound=Sized)


class StateCache(Generic[S]):
    """States of users in memory; the least recently used ones are dropped beyond a bound.

    Args:
        max_bytes: bound on all states; None: no bound.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._states: OrderedDict[Hashable, tuple[S, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._states

    def get(self, user: Hashable) -> S | None:
        """Return a user's state, which now is the most recently used."""
        if user not in self._states:
            return None
        self._states.move_to_end(user)
        return self._states[user][0]

    def keep(self, user: Hashable, state: S) -> None:
        """Keep a state, or count anew the bytes of one that was kept and has changed."""
        self.drop(user)
        size = state.num_bytes
        self._states[user] = state, size
        self.num_bytes += size

    def drop(self, user: Hashable) -> bool:
        """Drop a user; returns whether there was a state."""
        if user not in self._states:
            return False
        self.num_bytes -= self._states.pop(user)[1]
        return True

    def shrink(self) -> None:
        """Drop the least recently used users until the rest keeps to the bound."""
        while self._max_bytes is not None and self.num_bytes > self._max_bytes:
            self.drop(next(iter(self._states)))
