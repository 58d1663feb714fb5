"""States of histories that a log has: stored now and then, and the log has what they lack."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from store_cases import KINDS, open_store, place
from test_state_stores import MODEL, History, append, close, event, expected, history, window

from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.codec import decode_state, fingerprint
from hstu_xd.serving.stores import MemoryStore, StateStore, StoreError, Write


class Log:
    """Histories that have versions, as those of a service have: what a state lacks is there."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.reads = self.version = self.upcoming = 0

    def present(self, user: str) -> bytes:
        return str(self.version).encode()

    def following(self, user: str) -> bytes:
        """A version that no history has had, whoever asks."""
        self.upcoming += 1
        return str(self.upcoming).encode()

    def read(self, user: object) -> History:
        self.reads += 1
        return tuple(zip(*self.events)) if self.events else ((), ())

    def session(self, store: StateStore, every: int) -> EncoderSession:
        return EncoderSession(
            MODEL, store=store, history=self.read, versions=self, store_every=every
        )

    def take(self, session: EncoderSession) -> None:
        """Let a session have the next event, and log it."""
        self.let(session)
        self.events.append(event(len(self.events)))
        self.version = self.upcoming

    def let(self, session: EncoderSession) -> None:
        """Let a session have the next event, which then is not logged."""
        append(session, "ann", len(self.events), len(self.events) + 1)

    def remove(self, events: slice) -> None:
        """Remove events, as another process does."""
        del self.events[events]
        self.upcoming += 1
        self.version = self.upcoming


class Counting(MemoryStore):
    """A store that counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.written = 0

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        self.asked += bool(users)
        return super().revisions(users)

    def put(self, writes: Sequence[Write]) -> list[bool]:
        self.written += len(writes)
        return super().put(writes)


def stored_items(store: MemoryStore) -> list[int]:
    checkpoint = fingerprint(MODEL, Window(MODEL.window), torch.float32)
    state = decode_state(store._values["ann"], checkpoint, MODEL.settings, torch.float32)
    return state.item_ids.tolist()


def test_a_state_of_a_log_is_stored_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log, store = Log(), Counting()
    session = log.session(store, every=4)
    for number in range(19):
        log.take(session)
        close(session.query(["ann"], [1])[0], expected(window(number + 1), 1))
    assert store.written == 4
    # The first time there might have been a value.
    assert (store.asked, log.reads) == (1, 1)

    encoded: list[int] = []
    encode = EncoderSession._encode
    monkeypatch.setattr(
        EncoderSession,
        "_encode",
        lambda session, state: (encoded.append(state.length), encode(session, state))[1],
    )
    later = log.session(store, every=4)
    close(later.query(["ann"], [2])[0], expected(window(19), 2))
    assert encoded == []  # The stored state got the three events that it lacked.


def test_a_state_of_a_log_that_another_has_written_is_right_and_is_stored_later() -> None:
    log, store = Log(), Counting()
    one, other = (log.session(store, every=1) for _ in range(2))
    log.take(one)
    close(other.query(["ann"], [0])[0], expected(history(1), 0))
    # Both have the state; the other one writes, and what the first one wants to replace is gone.
    log.let(other)
    log.take(one)
    assert store.written == 3
    for number in (2, 3, 4):
        close(one.query(["ann"], [1])[0], expected(history(number), 1))
        log.take(one)
    assert len(stored_items(store)) == 5


def test_a_stored_state_with_a_removed_event_is_replaced_at_once() -> None:
    """Not with the fourth event from then on: what was removed must not stay anywhere."""
    log, store = Log(), MemoryStore()
    session = log.session(store, every=4)
    for _ in range(4):
        log.take(session)
    assert stored_items(store) == [item for item, _ in log.events]
    log.remove(slice(1, 4))
    log.take(session)
    assert stored_items(store) == [item for item, _ in log.events]
    for _ in range(3):  # Then it goes on as before.
        log.take(session)
        assert len(stored_items(store)) == 2
    log.take(session)
    assert len(stored_items(store)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_one_log_take_turns(kind: str, tmp_path: Path) -> None:
    with place(kind, tmp_path) as folder:
        log, store = Log(), open_store(kind, folder)
        sessions = [log.session(store, every=3) for _ in range(2)]
        for number in range(30):
            log.take(sessions[number % 2])
            for domain, session in enumerate(sessions):
                close(session.query(["ann"], [domain])[0], expected(window(number + 1), domain))
        log.remove(slice(28, None))
        for session in sessions:
            close(session.query(["ann"], [0])[0], expected(window(28), 0))


def test_a_state_of_a_log_is_not_believed_without_it() -> None:
    """It may lack events, which nobody could tell."""
    log, store = Log(), MemoryStore()
    for _ in range(4):
        log.take(log.session(store, every=1))
    with pytest.raises(StoreError, match="user 'ann': the stored state cannot be used"):
        EncoderSession(MODEL, store=store).query(["ann"], [0])
    with pytest.raises(InputError, match="store_every is 0"):
        log.session(store, every=0)
