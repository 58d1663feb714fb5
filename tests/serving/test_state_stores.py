"""States in a store: found again, never mixed, never half there, whoever else writes."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from store_cases import KINDS, open_store, place, redis_server
from tiny_models import EVERYTHING, ITEMS_PER_DOMAIN, NORM_LENGTH, NUM_DOMAINS, tiny_model
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.codec import decode_state, encode_state, fingerprint, revision
from hstu_xd.serving.stores import MemoryStore, RedisStore, SQLiteStore, StoreError, Write

MODEL = tiny_model(**EVERYTHING).float().eval()
WINDOW = 12
History = tuple[Sequence[int], Sequence[int]]


def event(number: int) -> tuple[int, int]:
    """Item and time of a user's event."""
    return 1 + number * 7 % (NUM_DOMAINS * ITEMS_PER_DOMAIN), number * 1000


def history(events: int) -> History:
    items, times = zip(*map(event, range(events)))
    return items, times


def window(events: int) -> History:
    """What the model's window holds of them."""
    left = NORM_LENGTH // 4 * max(0, -((NORM_LENGTH - events) // (NORM_LENGTH // 4)))
    items, times = history(events)
    return items[left:], times[left:]


def expected(known: History, domain: int, net: CrossDomainHSTU = MODEL) -> Tensor:
    items, times = (torch.tensor([column]) for column in known)
    with torch.inference_mode():
        return net.encode(items, times, torch.tensor([domain]))[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def append(session: EncoderSession, user: str, first: int, last: int) -> None:
    for number in range(first, last):
        item, when = event(number)
        session.append([user], [item], [when])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Iterator[Path]:
    with place(kind, tmp_path) as there:
        yield there


def value_of(events: int) -> bytes:
    """A real value, of a user with some events."""
    store = MemoryStore()
    append(EncoderSession(MODEL, store=store), "ann", 0, events)
    (value,) = store.get(["ann"])
    assert value is not None
    return value


def test_a_value_takes_the_place_of_the_expected_one_only(kind: str, folder: Path) -> None:
    store = open_store(kind, folder)
    first, second, third = (value_of(events) for events in (1, 2, 3))
    assert store.get(["ann", "bob"]) == [None, None]
    assert store.revisions(["ann", "bob"]) == [b"", b""]
    assert store.put([Write("ann", first, b""), Write("bob", second, b"")]) == [True, True]
    assert store.put([Write("ann", third, b"")]) == [False]
    stale = Write("ann", third, revision(third))
    assert store.put([Write("bob", third, revision(second)), stale]) == [True, False]
    assert store.get(["ann", "bob", "eve"]) == [first, third, None]
    assert store.revisions(["bob", "ann"]) == [revision(third), revision(first)]
    assert store.delete("ann")
    assert not store.delete("ann")
    assert store.get(["ann"]) == [None]


def test_sessions_take_turns_with_a_user(kind: str, folder: Path) -> None:
    store = open_store(kind, folder)
    sessions = [EncoderSession(MODEL, store=store) for _ in range(2)]
    for number in range(20):
        append(sessions[number % 2], "ann", number, number + 1)
        asked = sessions[number % 3 % 2].query(["ann"], [[0, 2]])[0]
        close(asked[0], expected(history(number + 1), 0))
        close(asked[1], expected(history(number + 1), 2))
    later = EncoderSession(MODEL, store=store)
    close(later.query(["ann"], [1])[0], expected(history(20), 1))
    assert later.forget("ann")
    close(sessions[0].query(["ann"], [1])[0], EncoderSession(MODEL).query(["eve"], [1])[0])


def test_the_window_and_what_left_it_come_back(kind: str, folder: Path) -> None:
    store = open_store(kind, folder)
    append(EncoderSession(MODEL, window=WINDOW, store=store), "ann", 0, 20)
    (found,) = EncoderSession(MODEL, window=WINDOW, store=store).recommend(["ann"], [1], k=99)
    (wanted,) = EncoderSession(MODEL, window=WINDOW, history=lambda _: history(20)).recommend(
        ["ann"], [1], k=99
    )
    assert [item for item, _ in found] == [item for item, _ in wanted]
    assert [s for _, s in found] == pytest.approx([s for _, s in wanted], abs=1e-5)


class Raced(MemoryStore):
    """Another session stores an event between this one's reading and its writing."""

    def __init__(self, rival_events: list[int]) -> None:
        super().__init__()
        self._rival_events, self._racing = rival_events, False

    def put(self, writes: Sequence[Write]) -> list[bool]:
        if self._rival_events and not self._racing:
            self._racing = True
            number = self._rival_events.pop(0)
            append(EncoderSession(MODEL, store=self), "ann", number, number + 1)
            self._racing = False
        return super().put(writes)


def test_who_loses_a_race_reads_again_and_repeats() -> None:
    session = EncoderSession(MODEL, store=Raced([0, 1, 2]))
    append(session, "ann", 3, 4)
    close(session.query(["ann"], [1])[0], expected(history(4), 1))


def test_an_event_behind_the_one_it_lost_to_is_refused() -> None:
    store = Raced([5])
    session = EncoderSession(MODEL, store=store)
    with pytest.raises(InputError, match="an event at 4000 after one at 5000"):
        append(session, "ann", 4, 5)
    close(session.query(["ann"], [0])[0], expected(([event(5)[0]], [5000]), 0))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        session = EncoderSession(MODEL, store=SQLiteStore(tmp_path / "states.sqlite"))
        for number in range(first, first + 10):
            session.append(["ann"], [number], [7])

    threads = [Thread(target=write, args=(first,)) for first in (1, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session = EncoderSession(MODEL, store=SQLiteStore(tmp_path / "states.sqlite"))
    found = session.query(["ann"], [1])[0]
    items = session._cache.get("ann").item_ids.tolist()
    assert sorted(items) == list(range(1, 21))
    close(found, expected((items, [7] * 20), 1))


@pytest.mark.parametrize("place", [0, 5, 9, 20, 40, 60, 100, -1])
def test_damaged_bytes_are_refused_and_rebuilt(
    place: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    append(EncoderSession(MODEL, store=store), "ann", 0, 9)
    value = bytearray(store._values["ann"])
    value[place] ^= 16
    store._values["ann"] = bytes(value)
    with pytest.raises(StoreError, match="user 'ann': the stored state cannot be used"):
        EncoderSession(MODEL, store=store).query(["ann"], [0])
    session = EncoderSession(MODEL, store=store, history=lambda _: history(9))
    with caplog.at_level(logging.WARNING):
        close(session.query(["ann"], [0])[0], expected(history(9), 0))
    assert "a stored state" in caplog.text
    append(session, "ann", 9, 10)
    whole = EncoderSession(MODEL, store=store)
    close(whole.query(["ann"], [0])[0], expected(history(10), 0))


def test_a_value_that_was_cut_off_is_refused() -> None:
    store = MemoryStore()
    append(EncoderSession(MODEL, store=store), "ann", 0, 9)
    for length in (len(store._values["ann"]) - 1, 90, 71, 33):
        store._values["ann"] = store._values["ann"][:length]
        with pytest.raises(StoreError, match="cannot be used"):
            EncoderSession(MODEL, store=store).query(["ann"], [0])


def test_a_state_of_another_checkpoint_is_never_read() -> None:
    store, other = MemoryStore(), tiny_model(**EVERYTHING).float().eval()
    with torch.no_grad():
        other._hstu.layers[1]._o.bias[3] += 0.5
    append(EncoderSession(other, store=store), "ann", 0, 9)
    for options in ({}, {"window": WINDOW}, {"dtype": torch.float16}):
        with pytest.raises(StoreError, match="cannot be used"):
            EncoderSession(MODEL, store=store, **options).query(["ann"], [0])
    session = EncoderSession(MODEL, store=store, history=lambda _: history(9))
    close(session.query(["ann"], [0])[0], expected(history(9), 0))
    same = tiny_model(**EVERYTHING, impl="reference").float().eval()
    append(session, "ann", 9, 10)
    close(EncoderSession(same, store=store).query(["ann"], [0])[0], expected(history(10), 0))


def test_a_state_of_another_catalogue_is_never_read() -> None:
    """The same weights, sizes and names; two items have changed places between two domains."""
    domains = MODEL.catalog.item_domains.clone()
    domains[[1, 2]] = domains[[2, 1]]

    def twin(item_domains: Tensor) -> CrossDomainHSTU:
        catalog = DomainCatalog(item_domains, MODEL.catalog.domain_names)
        model = CrossDomainHSTU(catalog, MODEL.settings).eval()
        model.load_state_dict(MODEL.state_dict())
        return model

    same, other = twin(MODEL.catalog.item_domains), twin(domains)
    for writer, reader in ((MODEL, other), (other, MODEL)):
        store = MemoryStore()
        append(EncoderSession(writer, store=store), "ann", 0, 9)
        with pytest.raises(StoreError, match="cannot be used"):
            EncoderSession(reader, store=store).query(["ann"], [0])
        session = EncoderSession(reader, store=store, history=lambda _: history(9))
        close(session.query(["ann"], [0])[0], expected(history(9), 0, reader))
    store = MemoryStore()
    append(EncoderSession(same, store=store), "ann", 0, 9)
    close(EncoderSession(MODEL, store=store).query(["ann"], [0])[0], expected(history(9), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("events", [1, 2, 20])
def test_a_state_comes_back_bit_for_bit(dtype: torch.dtype, events: int) -> None:
    session = EncoderSession(MODEL, dtype=dtype, window=16)
    session.append(["ann"] * events, *history(events))
    session.query(["ann"], [0])
    state = session._cache.get("ann")
    assert state is not None
    value = encode_state(state, b"c" * 16)
    again = decode_state(value, b"c" * 16, MODEL.settings, dtype)
    assert again.revision == revision(value) != b""
    assert encode_state(again, b"c" * 16)[32:] == value[32:]
    assert torch.equal(again.memory, state.memory[..., : state.committed])
    assert torch.equal(again.state_memory, state.state_memory)
    assert torch.equal(again.forgotten, state.forgotten)
    assert again.timestamps.tolist() == list(history(events)[1][-again.length :])


@pytest.mark.parametrize("disk", ["sqlite", "redis"])
def test_a_killed_process_loses_no_stored_event(disk: str, tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("append_forever.py"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with place(disk, tmp_path) as there:
        process = subprocess.Popen(
            [sys.executable, program, disk, str(there)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert process.stdout is not None
        stored = 0
        while stored < 5:
            stored = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        # What it managed to say before it was gone.
        stored = max([stored, *map(int, process.stdout)])
        process.wait()
        store = open_store(disk, there)
        # One value an event: its counter says how many there are.
        kept = int.from_bytes(store.revisions(["ann"])[0][:8], "little")
        assert stored <= kept <= stored + 1
        session = EncoderSession(MODEL, store=store)
        close(session.query(["ann"], [1])[0], expected(window(kept), 1))
        append(session, "ann", kept, kept + 1)
        close(session.query(["ann"], [1])[0], expected(window(kept + 1), 1))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "states.sqlite")
    session = EncoderSession(MODEL, store=store)
    append(session, "ann", 0, 5)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        session.append(["ann"] * 15, *(column[5:20] for column in history(20)))
    close(session.query(["ann"], [0])[0], expected(history(5), 0))
    store._connection.execute("PRAGMA max_page_count = 100000")
    append(session, "ann", 5, 20)
    close(session.query(["ann"], [0])[0], expected(history(20), 0))


class Contended(sqlite3.Connection):
    """Another process is just making the file: the first attempts fail at once."""

    refusals = 3

    def execute(self, command: str, *arguments: Any) -> sqlite3.Cursor:
        if "journal_mode" in command and self.refusals:
            self.refusals -= 1
            raise sqlite3.OperationalError("database is locked")
        return super().execute(command, *arguments)


def test_a_file_that_another_process_is_making_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Contended))
    store = SQLiteStore(tmp_path / "states.sqlite")
    assert store._connection.refusals == 0
    append(EncoderSession(MODEL, store=store), "ann", 0, 2)
    assert store.revisions(["ann"])[0]


def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    path = tmp_path / "states.sqlite"
    path.write_text("nothing of the kind" * 99)
    with pytest.raises(StoreError, match=r"states\.sqlite: file is not a database"):
        SQLiteStore(path)


def test_users_of_a_store_are_strings() -> None:
    session = EncoderSession(MODEL, store=MemoryStore())
    with pytest.raises(InputError, match="user 7 is not a string"):
        session.append([7], [1], [1])


def test_redis_forgets_after_its_time_and_says_when_it_is_gone(tmp_path: Path) -> None:
    with redis_server(tmp_path) as socket:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        client = Redis(unix_socket_path=str(socket), retry=Retry(NoBackoff(), 0))
        session = EncoderSession(MODEL, store=RedisStore(client, prefix="p:", ttl=100))
        append(session, "ann", 0, 3)
        append(session, "ann", 3, 4)
        assert client.keys() == [b"p:ann"]
        assert 0 < client.ttl("p:ann") <= 100
        with pytest.raises(InputError, match="ttl is 0"):
            RedisStore(client, ttl=0)
    with pytest.raises(StoreError, match="Redis: "):
        append(session, "ann", 4, 5)
    with pytest.raises(StoreError, match="Redis: "):
        session.query(["ann"], [0])


@pytest.mark.parametrize(
    ("switches", "known"),
    [
        (EVERYTHING, "65cf6a30be5842c481662d1cf4e14afd"),
        (
            {"segment_by": "count", "segment_length": 4, "history_tokens": 2},
            "25dfcfe67fb677cc2c3052016f51f5bb",
        ),
        (
            {"domain_mask": True, "full_attention_layers": (1,)},
            "4e07c69db422e2564aad3e63d7dd73e5",
        ),
    ],
)
def test_states_that_version_0_1_0_stored_are_known_again(
    switches: dict[str, Any], known: str
) -> None:
    model = tiny_model(**switches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert fingerprint(model, Window(8), torch.float32).hex() == known
