"""A session over a trained model: append events, ask for any domain, at the cost of one token."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.fused_layer import LayerCache
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.incremental import IncrementalModel
from hstu_xd.model.rows import EVENT
from hstu_xd.objectives.objective import Scorer
from hstu_xd.serving.new_rows import SegmentedWindow, new_rows
from hstu_xd.serving.requests import (
    Answer,
    Request,
    arriving_events,
    check_domains,
    check_items,
    check_model,
    check_order,
    checked_events,
)
from hstu_xd.serving.retrieval import ItemIndex
from hstu_xd.serving.state import StateCache, UserState, left_window
from hstu_xd.serving.stored_states import Found, StoredStates, Versions, short_version
from hstu_xd.serving.stores import StateStore, StoreError

# Events that are committed by one step; more are encoded together with the whole window.
_BLOCK = 16

# All events of a user that were appended so far, oldest first: item ids and timestamps.
History = Callable[[Hashable], tuple[Sequence[int], Sequence[int]]]


class EncoderSession:
    """States of users over a trained model, each equal to encoding its window from scratch.

    An event's representation depends on the event after it, whose domain and time are known only
    when it arrives. The last event of a user is therefore kept pending and recomputed for every
    request, per requested domain; everything before it is computed once. An ``append`` mostly
    records: the next ``query`` runs what is new and the pending event through the layers together.
    A session belongs to one thread at a time.

    Where the model cuts histories into segments, keys and values of an event stay as long as a next
    event may read them; those of history tokens stand for it from then on. The event that closes a
    segment brings them about, and they are committed with the events before it.

    A window of W events slides by quarters: of n events the oldest ``q * ceil((n - W) / q)`` have
    left, with ``q = max(1, W // 4)``, and whenever some leave the rest is encoded anew. So the
    window follows from the number of events alone, however they arrived, and once it has been full
    it holds ``W - q + 1`` to ``W`` events, and before them the latest of each domain of those that
    have left, where the window asks for older ones. Answers equal the full encoder on exactly these
    events.

    Args:
        model: a trained model, float32 on the CPU; put into evaluation mode. Its weights are read
            now: later changes are not seen.
        window: which events are read, ``W`` latest ones among them, ``load_trained(run).window`` of
            a run; a number: those alone; default: as many as the model has positions for.
        dtype: of the kept keys and values; half precisions halve the memory and are not exact.
        max_bytes: bound on all states; the least recently used users are dropped beyond it.
        history: how to get back the events of a user without a state, from the first one on;
            without it a dropped user is unknown. It is called before an ``append`` takes its
            events, so it must not include them yet.
        store: where states outlive the session and other sessions of the same checkpoint find
            them, see :mod:`hstu_xd.serving.stores`; users are strings then. Every ``append`` is
            stored before it returns, where there are no ``versions``; memory holds what was read
            of late. Without a store the states are in memory alone.
        versions: of the histories that states are made of; a state of another version, in memory or
            in the store, gets what it lacks of its history, or is rebuilt. None: a state of the
            same checkpoint is believed.
        store_every: where there are versions, a state is stored once it has so many events more
            than what the store has of it.
        retrieval: how ``recommend`` searches, "exact" or "approximate", see
            :class:`hstu_xd.serving.retrieval.ItemIndex`; or such an index of the same model, which
            several sessions may share.
        scorer: what ranks items, of the objective that the model was trained for; None: dot
            products. An index that is given knows its own.

    Attributes:
        index: the items, to find or score those that are nearest to a vector.

    Example:
        >>> import torch
        >>> from hstu_xd import CrossDomainHSTU, DomainCatalog
        >>> from hstu_xd.model.settings import EncoderSettings
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
        window: Window | int | None = None,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        history: History | None = None,
        store: StateStore | None = None,
        versions: Versions | None = None,
        store_every: int = 1,
        retrieval: str | ItemIndex = "exact",
        scorer: Scorer | None = None,
    ) -> None:
        check_model(model)
        longest = model.window
        self.window = Window.of(longest if window is None else window)
        most = longest - self.window.older * model.catalog.num_domains
        if window is not None and not 4 <= self.window.latest <= most:
            raise InputError(f"window is {window}; 4..{most} events, the model's positions")
        if store_every < 1:
            raise InputError(f"store_every is {store_every}; at least 1 event")
        self.model = model.eval()
        self._dtype, self._history, self._versions = dtype, history, versions
        self._cache: StateCache[UserState] = StateCache(max_bytes)
        with torch.inference_mode():
            self._incremental = IncrementalModel.from_model(model)
        if isinstance(retrieval, str):
            retrieval = ItemIndex(model, retrieval, scorer)
        self.index = retrieval
        self._stored, self._store_every = None, store_every
        if store is not None:
            self._stored = StoredStates(store, model, self.window, dtype, store_every)

    def __len__(self) -> int:
        return len(self._cache)

    def __contains__(self, user: Hashable) -> bool:
        return user in self._cache

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all states."""
        return self._cache.num_bytes

    def append(
        self, users: Sequence[Hashable], item_ids: Sequence[int], timestamps: Sequence[int]
    ) -> None:
        """Take events in the order given; a user may occur several times.

        Where another session writes to the same user in a store at the same time, the events of the
        slower one come after those of the faster one.

        Args:
            users: one an event.
            item_ids: item of each event.
            timestamps: time of each event, not before the same user's last one.

        Raises:
            InputError: lengths that differ, an unknown item, or a time that goes back; no state
                has changed then, unless the time is behind an event that another session stored
                meanwhile: then users without such a race have got their events.
            StoreError: the store failed, or holds a state that cannot be used and there is no
                history to rebuild it from.
        """
        with self._bounded():
            arriving = arriving_events(self.model.catalog, users, item_ids, timestamps)
            while arriving:
                states = self._load(arriving)
                for user, events in arriving.items():
                    check_order(user, states[user], events)
                for user, events in arriving.items():
                    self._extend(states[user], events)
                    if self._versions is not None:
                        states[user].version = short_version(self._versions.following(str(user)))
                self._commit([state for state in states.values() if state.uncommitted >= _BLOCK])
                self._keep(states)
                arriving = {user: arriving[user] for user in self._save(states)}

    def query(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        request_timestamps: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return user vectors for the requested domains.

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
            vectors, _ = self._vectors(users, target_domains, request_timestamps)
        return vectors.clone()  # an ordinary tensor

    def recommend(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int],
        k: int,
        *,
        exclude_seen: bool = True,
        request_timestamps: Sequence[int] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Recommend the best items of a domain to every user.

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
            vectors, states = self._vectors(users, target_domains, request_timestamps)
            seen = [state.seen for state in states] if exclude_seen else None
            return self.index.best_of_each(vectors, target_domains, k, seen)

    def score(
        self,
        users: Sequence[Hashable],
        candidates: Tensor,
        target_domains: Sequence[int],
        request_timestamps: Sequence[int] | None = None,
    ) -> Tensor:
        """Score given items; candidates see the history and not each other.

        Args:
            users: (B,).
            candidates: (B, C) int64 item ids.
            target_domains: (B,) domain ids.
            request_timestamps: (B,), see :meth:`query`.

        Returns:
            (B, C) float.
        """
        check_items(self.model.catalog, candidates.flatten().tolist())
        with self._bounded():
            vectors, _ = self._vectors(users, target_domains, request_timestamps)
            scores = self.index.scores(vectors, candidates)
        return scores.clone()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests of any users, for any domains and at any times, in one step.

        Raises:
            InputError: an unknown domain.
            StoreError: as :meth:`append`.
        """
        with self._bounded():
            check_domains(self.model.catalog, [request.target_domains for request in requests])
            vectors, states = self._answer(requests)
            return [
                Answer(found.clone(), state.seen, state.last_time)
                for found, state in zip(vectors, states)
            ]

    def forget(self, user: Hashable) -> bool:
        """Drop all that is kept of a user, in the store too; returns whether anything was."""
        dropped = self._cache.drop(user)
        return self._stored.delete(user) or dropped if self._stored is not None else dropped

    def release(self, users: Iterable[Hashable]) -> None:
        """Let go of states in memory: the next call reads or rebuilds them; no store is asked."""
        for user in users:
            self._cache.drop(user)

    def _vectors(
        self,
        users: Sequence[Hashable],
        target_domains: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        request_timestamps: Sequence[int] | Tensor | None,
    ) -> tuple[Tensor, list[UserState]]:
        """Return what :meth:`query` returns, and the states it read."""
        targets = torch.as_tensor(target_domains, dtype=torch.int64)
        if targets.ndim not in (1, 2) or len(targets) != len(users):
            raise InputError(
                f"target_domains has shape {tuple(targets.shape)}; ({len(users)},) or "
                f"({len(users)}, V) is needed, one row a user"
            )
        requested = (targets if targets.ndim == 2 else targets.unsqueeze(1)).tolist()
        check_domains(self.model.catalog, requested)
        times: Sequence[int | None] = [None] * len(users)
        if request_timestamps is not None:
            times = torch.as_tensor(request_timestamps, dtype=torch.int64).tolist()
        rows, states = self._answer([Request(*row) for row in zip(users, requested, times)])
        vectors = torch.stack(rows)
        return vectors if targets.ndim == 2 else vectors.squeeze(1), states

    def _answer(self, requests: Sequence[Request]) -> tuple[list[Tensor], list[UserState]]:
        """Return (V, K) vectors for each request, and the states they were computed from."""
        states = self._load(request.user for request in requests)
        if len(states) < len(requests):
            # A user of several requests must have nothing left to commit in any of them.
            self._commit(list(states.values()))
        read, settings = [states[request.user] for request in requests], self.model.settings
        rows = [
            new_rows(state, settings, list(request.target_domains), request.timestamp)
            for state, request in zip(read, requests)
        ]
        vectors = self._incremental.step(rows)
        self._keep({user: state for user, state in states.items() if user in self._cache})
        return vectors, read

    def _load(self, users: Iterable[Hashable]) -> dict[Hashable, UserState]:
        """Return states of users, rebuilt or empty where there is none, as the most recent ones."""
        versions = {user: self._version(user) for user in users}
        held = {user: self._cache.get(user) for user in versions}
        # What is of the present version of its history is right, whatever a store has.
        doubtful = {
            user: state
            for user, state in held.items()
            if state is None
            or state.version != versions[user]
            or (self._stored is not None and not state.version)
        }
        found = self._stored.read(doubtful) if self._stored is not None and doubtful else Found()
        states: dict[Hashable, UserState] = {}
        for user, version in versions.items():
            state = held[user]
            if user in doubtful:
                state = self._renewed(user, version, state, found)
            assert state is not None
            states[user] = state
        return states

    def _version(self, user: Hashable) -> bytes:
        return b"" if self._versions is None else short_version(self._versions.present(str(user)))

    def _renewed(
        self, user: Hashable, version: bytes, held: UserState | None, found: Found
    ) -> UserState:
        """Return a user's state as of now, from what memory and store have, and keep it."""
        present = found.revisions.get(user, b"")
        known = found.usable(user, held, versioned=bool(version))
        self._cache.drop(user)
        state = next((state for state in known if state.version == version), None)
        if state is None:
            if self._history is None and (known or user in found.refused):
                raise StoreError(
                    f"user {user!r}: the stored state cannot be used, and the session has no "
                    "history to rebuild it from; give it one, or forget the user"
                )
            state = self._made(user, known)
            state.version = version
            if present and not state.revision:
                # What is stored was of no use, as after an event was removed: it is not to stay.
                state.unsaved = max(state.unsaved, self._store_every)
        state.revision = present
        # States of unknown users are not kept: there may be any number of them.
        if state.length:
            self._keep({user: state})
        return state

    def _made(self, user: Hashable, behind: Sequence[UserState]) -> UserState:
        """Return the state of a user's history; one that is behind it gets what it lacks."""
        if self._history is None:
            return UserState.empty(self.model.settings, self._dtype)
        events = checked_events(self.model.catalog, *self._history(user))
        for state in behind:
            lacked = state.lacked(events, self.window)
            if lacked is not None:
                self._extend(state, lacked)
                if state.uncommitted >= _BLOCK:
                    self._commit([state])
                return state
        state = UserState.empty(self.model.settings, self._dtype)
        self._extend(state, events)
        self._commit([state])
        return state

    def _save(self, states: dict[Hashable, UserState]) -> list[Hashable]:
        """Store changed states; returns the users whose change was lost to another writer's."""
        if self._stored is None:
            return []
        lost = list(states)
        try:
            lost = self._stored.save(states)
        finally:
            for user in lost:
                self._cache.drop(user)
        return lost

    def _keep(self, states: dict[Hashable, UserState]) -> None:
        for user, state in states.items():
            self._cache.keep(user, state)

    def _extend(self, state: UserState, events: Tensor) -> None:
        """Take (3, m) more events; the oldest leave where the window has no room for them."""
        state.add(events)
        leaving = left_window(state.length - state.older, self.window.latest)
        if leaving:
            state.slide(leaving, self.window.older)

    def _commit(self, states: Sequence[UserState]) -> None:
        """Commit all events but the last: few in one step, many by the full encoder."""
        few = [state for state in states if 0 < state.uncommitted <= _BLOCK]
        if few:
            settings = self.model.settings
            self._incremental.step([new_rows(state, settings, [0], None) for state in few])
        for state in states:
            if state.uncommitted:
                self._encode(state)

    def _encode(self, state: UserState) -> None:
        """Commit all events but the last, whatever was committed before, by the full encoder."""
        caches: list[LayerCache] = []
        window = state.events[:, : state.length]
        items, times, domains = window
        # The pending event is encoded only so that history tokens are placed before it; its output
        # is discarded.
        batch = JaggedBatch(
            item_ids=items,
            timestamps=times,
            next_timestamps=torch.cat([times[1:], times[-1:]]),
            target_domains=torch.cat([domains[1:], domains[-1:]]),
            offsets=torch.tensor([0, len(items)]),
        )
        self.model(batch, caches=caches, asked=times.new_empty(0))
        events = readable = torch.arange(len(items) - 1)
        rows = state.rows[:, :0]
        if self.model.settings.has_segments:
            window_rows = SegmentedWindow.build(window, self.model.settings)
            laid = window_rows.rows_from(0)[:, :-1]
            (events,) = (laid[1] == EVENT).nonzero(as_tuple=True)
            (readable,) = window_rows.is_readable(laid).nonzero(as_tuple=True)
            rows = laid[:, readable]
        memory, states = self._incremental.memories(caches, readable, events)
        state.restart(memory.to(self._dtype), rows)
        state.commit(len(events), len(readable), states)

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Compute without gradients; afterwards the states keep to ``max_bytes``, come what may."""
        try:
            with torch.inference_mode():
                yield
        finally:
            self._cache.shrink()
