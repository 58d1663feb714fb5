"""A session over a trained model: append events, ask for any domain, at the cost of one token."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.errors import InputError
from hstu_xd.model import CrossDomainHSTU
from hstu_xd.modules.hstu_layer import Written
from hstu_xd.serving.state import UserState
from hstu_xd.serving.step import Step, run_step

# Events that arrive together for one user beyond which the whole window is encoded at once.
_ENCODE_FROM = 16

# All events of a user that were appended so far, oldest first: item ids and timestamps.
History = Callable[[Hashable], tuple[Sequence[int], Sequence[int]]]


class EncoderSession:
    """States of users over a trained model, each equal to encoding its window from scratch.

    An event's representation depends on the event after it, whose domain and time are known only
    when it arrives. The last event of a user is therefore kept pending and recomputed for every
    request, per requested domain; everything before it is computed once.

    A window of W events slides by quarters: of n events the oldest ``q * ceil((n - W) / q)`` have
    left, with ``q = max(1, W // 4)``, and whenever some leave the rest is encoded anew. So the
    window follows from the number of events alone, however they arrived, and once it has been full
    it holds ``W - q + 1`` to ``W`` events. Answers equal the full encoder on exactly these events.

    Args:
        model: a trained model; put into evaluation mode.
        window: longest history ``W`` that is read, in events; default: all the model has positions
            for. For a trained run give its ``max_sequence_length``.
        dtype: of the kept keys and values; half precisions halve the memory and are not exact.
        max_bytes: bound on all states; the least recently used users are dropped beyond it.
        history: how to get back the events of a user without a state, from the first one on;
            without it a dropped user is unknown. It is called before an ``append`` takes its
            events, so it must not include them yet.

    Example:
        >>> import torch
        >>> from hstu_xd import DomainCatalog
        >>> from hstu_xd.model import CrossDomainHSTU
        >>> from hstu_xd.modules.settings import EncoderSettings
        >>> catalog = DomainCatalog(torch.tensor([0, 0, 0, 1, 1]), ["books", "films"])
        >>> settings = EncoderSettings(num_domains=2, norm_length=8, ddsr=True)
        >>> session = EncoderSession(CrossDomainHSTU(catalog, settings))
        >>> session.append(["ann", "ann", "bob"], [1, 3, 2], [10, 11, 5])
        >>> session.query(["ann", "bob"], [0, 1]).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        model: CrossDomainHSTU,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        history: History | None = None,
    ) -> None:
        if model.settings.normalization != "silu":
            raise InputError(
                f"the model's normalization is {model.settings.normalization!r}; a session "
                "computes 'silu' only: encode whole histories with model.encode"
            )
        longest = model.settings.norm_length
        if window is not None and not 4 <= window <= longest:
            raise InputError(f"window is {window}; 4..{longest} events, the model's positions")
        self.model = model.eval()
        self.window = window or longest
        self._dtype, self._max_bytes, self._history = dtype, max_bytes, history
        self._states: OrderedDict[Hashable, UserState] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._states

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return self._bytes

    def append(
        self, users: Sequence[Hashable], item_ids: Sequence[int], timestamps: Sequence[int]
    ) -> None:
        """Take events in the order given; a user may occur several times.

        Args:
            users: one an event.
            item_ids: item of each event.
            timestamps: time of each event, not before the same user's last one.

        Raises:
            InputError: lengths that differ, an unknown item, or a time that goes back; no state
                has changed then.
        """
        with self._bounded():
            arriving = self._check_events(users, item_ids, timestamps)
            whole = [u for u, events in arriving.items() if self._wants_encoding(u, len(events))]
            for user in whole:
                self._extend(user, arriving.pop(user))
            while arriving:
                self._append_one_each({user: events[0] for user, events in arriving.items()})
                arriving = {user: events[1:] for user, events in arriving.items() if events[1:]}

    def query(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        request_timestamps: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """User vectors for the requested domains.

        Args:
            users: (B,); an unknown one is answered from the learned initial states alone.
            target_domains: (B,) one domain id a user, or (B, V) several.
            request_timestamps: (B,) time of the request; default: that of the last event.

        Returns:
            (B, K) or (B, V, K) float, unit vectors.

        Raises:
            InputError: an unknown domain, or shapes that do not fit.
        """
        with self._bounded():
            return self._answer(users, target_domains, request_timestamps)[0]

    def recommend(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int],
        k: int,
        *,
        exclude_seen: bool = True,
        request_timestamps: Sequence[int] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Best items of a domain for every user.

        Args:
            users: (B,).
            target_domains: (B,) domain ids.
            k: number of items; fewer come back where the domain has no more.
            exclude_seen: leave out items the user has met, those that left the window too.
            request_timestamps: (B,), see :meth:`query`.

        Returns:
            For every user ``(item id, score)`` pairs, best first.
        """
        if k < 1:
            raise InputError(f"k is {k}; at least 1 is needed")
        with self._bounded():
            vectors, states = self._answer(users, target_domains, request_timestamps)
            seen = [torch.cat([s.item_ids, s.forgotten]) for s in states] if exclude_seen else None
            return [
                self._best_items(vector, domain, k, None if seen is None else seen[row])
                for row, (vector, domain) in enumerate(zip(vectors, target_domains))
            ]

    def score(
        self,
        users: Sequence[Hashable],
        candidates: Tensor,
        target_domains: Sequence[int],
        request_timestamps: Sequence[int] | None = None,
    ) -> Tensor:
        """Scores of given items; candidates see the history and not each other.

        Args:
            users: (B,).
            candidates: (B, C) int64 item ids.
            target_domains: (B,) domain ids.
            request_timestamps: (B,), see :meth:`query`.

        Returns:
            (B, C) float.
        """
        self._check_items(candidates.flatten().tolist())
        with self._bounded():
            vectors, _ = self._answer(users, target_domains, request_timestamps)
            return torch.einsum("bk,bck->bc", vectors, self.model.item_vectors(candidates))

    def forget(self, user: Hashable) -> bool:
        """Drop all that is kept of a user; returns whether anything was."""
        state = self._states.pop(user, None)
        if state is None:
            return False
        self._bytes -= state.num_bytes
        return True

    def _answer(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        request_timestamps: Sequence[int] | Tensor | None,
    ) -> tuple[Tensor, list[UserState]]:
        """What :meth:`query` returns, and the states it read."""
        targets = torch.as_tensor(target_domains, dtype=torch.int64)
        if targets.ndim not in (1, 2) or len(targets) != len(users):
            raise InputError(
                f"target_domains has shape {tuple(targets.shape)}; ({len(users)},) or "
                f"({len(users)}, V) is needed, one row a user"
            )
        self._check_domains(targets)
        states = [self._state(user) for user in users]
        if request_timestamps is None:
            last = [int(s.timestamps[-1]) if len(s.timestamps) else 0 for s in states]
            times = torch.tensor(last)
        else:
            times = torch.as_tensor(request_timestamps, dtype=torch.int64)
        wide = targets if targets.ndim == 2 else targets.unsqueeze(1)
        step = Step.gather(states, wide, times.unsqueeze(1).expand_as(wide))
        vectors = run_step(self.model, step).vectors
        return (vectors if targets.ndim == 2 else vectors.squeeze(1)), states

    def _best_items(
        self, vector: Tensor, domain: int, k: int, excluded: Tensor | None
    ) -> list[tuple[int, float]]:
        """Items of a domain and their scores, best first, for one (K,) vector."""
        pool = self.model.catalog.items_of(domain)
        scores = self.model.item_vectors(pool) @ vector
        if excluded is not None:
            excluded = excluded[self.model.catalog.domain_of(excluded) == domain]
            scores[torch.searchsorted(pool, excluded)] = float("-inf")
        best = scores.topk(min(k, pool.numel()))
        pairs = zip(pool[best.indices].tolist(), best.values.tolist())
        return [(item, score) for item, score in pairs if score > float("-inf")]

    def _state(self, user: Hashable) -> UserState:
        """The state of a user, rebuilt or empty where there is none; now the most recent."""
        if user in self._states:
            self._states.move_to_end(user)
            return self._states[user]
        if self._history is None:
            return UserState.empty(self.model.settings, self._dtype)
        items, times = self._history(user)
        state = self._encode(list(zip(items, times)), torch.zeros(0, dtype=torch.int64))
        self._keep(user, state)
        return state

    def _keep(self, user: Hashable, state: UserState) -> None:
        old = self._states.pop(user, None)
        self._bytes += state.num_bytes - (old.num_bytes if old is not None else 0)
        self._states[user] = state

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Compute without gradients; afterwards the states keep to ``max_bytes``, come what may."""
        try:
            with torch.no_grad():
                yield
        finally:
            while self._max_bytes is not None and self._bytes > self._max_bytes:
                self._bytes -= self._states.popitem(last=False)[1].num_bytes

    def _wants_encoding(self, user: Hashable, arriving: int) -> bool:
        events = len(self._state(user).item_ids) + arriving
        return arriving >= _ENCODE_FROM or events > self.window

    def _extend(self, user: Hashable, events: list[tuple[int, int]]) -> None:
        """Encode the window anew with more events."""
        state = self._state(user)
        known = list(zip(state.item_ids.tolist(), state.timestamps.tolist()))
        self._keep(user, self._encode(known + events, state.forgotten))

    def _leaving(self, events: int) -> int:
        """How many of the oldest events leave, see the class."""
        quarter = max(1, self.window // 4)
        return quarter * max(0, -(-(events - self.window) // quarter))

    def _append_one_each(self, events: dict[Hashable, tuple[int, int]]) -> None:
        """One event each for some users: commit what was pending, take the new one as pending."""
        users = list(events)
        states = [self._state(user) for user in users]
        items, times = (torch.tensor(column) for column in zip(*events.values()))
        domains = self.model.catalog.domain_of(items)
        before = [
            state.num_bytes if user in self._states else 0 for user, state in zip(users, states)
        ]
        running = [row for row, state in enumerate(states) if len(state.item_ids)]
        if running:
            step = Step.gather(
                [states[row] for row in running],
                domains[running].unsqueeze(1),
                times[running].unsqueeze(1),
            )
            out = run_step(self.model, step)
            for place, row in enumerate(running):
                parts = (out.keys, out.values, out.state_keys, out.state_values)
                states[row].commit(*(part[:, place, 0] for part in parts))
        for row, (user, state) in enumerate(zip(users, states)):
            state.add_pending(int(items[row]), int(times[row]), int(domains[row]))
            self._bytes += state.num_bytes - before[row]
            self._states[user] = state

    def _encode(self, events: list[tuple[int, int]], forgotten: Tensor) -> UserState:
        """The state after some events, by the full encoder over all but the last of the window."""
        leaving = self._leaving(len(events))
        gone = torch.tensor([item for item, _ in events[:leaving]], dtype=torch.int64)
        state = UserState.empty(self.model.settings, self._dtype)
        state.forgotten = torch.cat([forgotten, gone]).unique()
        if not events:
            return state
        events = events[leaving:]
        items, times = (torch.tensor(column) for column in zip(*events))
        domains = self.model.catalog.domain_of(items)
        state.item_ids, state.timestamps, state.domains = items, times, domains
        state.committed = len(events) - 1
        if not state.committed:
            return state
        written = self._run_full(items, times, domains)
        state.keys = torch.stack([w.keys for w in written]).to(self._dtype)
        state.values = torch.stack([w.values for w in written]).to(self._dtype)
        if self.model.settings.ddsr:
            self._fill_states(state, written)
        return state

    def _run_full(self, items: Tensor, times: Tensor, domains: Tensor) -> list[Written]:
        """What every layer's tokens but the last leave behind."""
        batch = JaggedBatch(
            item_ids=items[:-1],
            timestamps=times[:-1],
            next_timestamps=times[1:],
            target_domains=domains[1:],
            offsets=torch.tensor([0, len(items) - 1]),
        )
        written: list[Written] = []
        self.model(batch, written=written)
        return written

    def _fill_states(self, state: UserState, written: list[Written]) -> None:
        """DDSR's latest states of every domain, newest first."""
        kept = state.state_times.shape[1]
        committed = state.domains[: state.committed]
        for domain in committed.unique().tolist():
            rows = torch.nonzero(committed == domain).squeeze(1).flip(0)[:kept]
            state.state_counts[domain] = len(rows)
            state.state_times[domain, : len(rows)] = state.timestamps[rows]
            for index, layer in enumerate(self.model._hstu.layers):
                assert layer._ddsr is not None
                keys, values = layer._ddsr.memory(written[index].states[rows])
                state.state_keys[index, domain, : len(rows)] = keys.to(self._dtype)
                state.state_values[index, domain, : len(rows)] = values.to(self._dtype)

    def _check_events(
        self, users: Sequence[Hashable], item_ids: Sequence[int], timestamps: Sequence[int]
    ) -> dict[Hashable, list[tuple[int, int]]]:
        if not len(users) == len(item_ids) == len(timestamps):
            raise InputError(
                f"{len(users)} users, {len(item_ids)} items and {len(timestamps)} timestamps; one "
                "of each an event is needed"
            )
        self._check_items(item_ids)
        arriving: dict[Hashable, list[tuple[int, int]]] = {}
        for user, item, time in zip(users, item_ids, timestamps):
            events = arriving.setdefault(user, [])
            known = self._state(user).timestamps
            last = events[-1][1] if events else (int(known[-1]) if len(known) else None)
            if last is not None and time < last:
                raise InputError(
                    f"user {user!r}: an event at {time} after one at {last}; append events in "
                    "order of time"
                )
            events.append((int(item), int(time)))
        return arriving

    def _check_items(self, item_ids: Sequence[int]) -> None:
        known = self.model.catalog.num_items
        for item in item_ids:
            if not 1 <= item <= known:
                raise InputError(f"unknown item {item}; the catalogue has items 1..{known}")

    def _check_domains(self, domains: Tensor) -> None:
        known = self.model.catalog.num_domains
        if domains.numel() and (int(domains.min()) < 0 or int(domains.max()) >= known):
            wrong = domains[(domains < 0) | (domains >= known)].flatten()[0]
            raise InputError(f"unknown domain {int(wrong)}; the catalogue has 0..{known - 1}")
