"""A session with history tokens: exact, and rid of what nobody reads any more."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import close, encode, follow, log
from tiny_models import EVERYTHING, NUM_DOMAINS, tiny_model
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession, codec
from hstu_xd.serving.state import UserState, expected_bytes
from hstu_xd.serving.stores import MemoryStore, StoreError

COUNT = {"segment_by": "count", "segment_length": 3}
# Pauses of which some, but not all, pauses of a drawn log are longer.
GAP = {"segment_gap": 4000}
CASES: dict[str, dict[str, Any]] = {
    "per_user": COUNT | {"history_tokens": 2},
    "recent_only": COUNT,
    "everything": EVERYTHING | COUNT | {"history_tokens": 2},
    "lookback": EVERYTHING | COUNT | {"history_tokens": 1, "segment_lookback": 1},
    "time_gap": EVERYTHING | GAP | {"segment_by": "time_gap", "history_tokens": 1},
    "session": EVERYTHING | GAP | {"segment_by": "session", "history_tokens": 1},
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def model(**switches: Any) -> CrossDomainHSTU:
    return tiny_model(**switches).float().eval()


def known(session: EncoderSession, user: str = "ann") -> UserState:
    state = session._cache.get(user)
    assert state is not None
    return state


def num_kept(net: CrossDomainHSTU, events: list[tuple[int, int]]) -> int:
    """Rows that a next event may read."""
    items, times = (torch.tensor(column) for column in zip(*events))
    nothing = torch.zeros_like(items)
    batch = JaggedBatch(items, times, nothing, nothing, torch.tensor([0, len(items)]))
    return net.rows(batch).num_readable


def drawn(seed: int, events: int) -> list[tuple[int, int]]:
    return [(item, time) for _, item, time in log(seed, events, users=1)]


def append(session: EncoderSession, events: list[tuple[int, int]], *, one_by_one: bool) -> None:
    """Leave no event uncommitted but the last."""
    if one_by_one:
        for item, time in events:
            session.append(["ann"], [item], [time])
            session.query(["ann"], [0])
    else:
        session.append(["ann"] * len(events), *zip(*events))


def tensors(state: UserState) -> list[Tensor]:
    return [value for value in vars(state).values() if isinstance(value, Tensor)]


@given(
    segments=st.fixed_dictionaries(
        {
            "segment_by": st.sampled_from(["count", "time_gap", "session"]),
            "segment_length": st.sampled_from([1, 2, 4]),
            "segment_gap": st.sampled_from([3000, 9000]),
            "segment_lookback": st.sampled_from([0, 1]),
            "history_tokens": st.sampled_from([0, 1, 3]),
        }
    ),
    views=st.sampled_from(
        [{}, {"domain_mask": True}, {"domain_mask": True, "target_view_heads": 2}]
    ),
    ddsr=st.booleans(),
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 23), min_size=1, max_size=6),
)
@settings(max_examples=60)
def test_every_prefix_equals_the_full_encoder_however_the_events_arrive(
    segments: dict[str, Any], views: dict[str, Any], ddsr: bool, seed: int, cuts: list[int]
) -> None:
    follow(model(**segments, **views, ddsr=ddsr, tape=True), seed, cuts)


@pytest.mark.parametrize(
    "switches",
    [
        {"target_view_heads": 4},
        {"segment_lookback": 2, "history_tokens": 0},
        {"state_from": "output"},
        {"combine": "after_gate"},
        {"states_per_domain": 1, "state_age_bias": False, "enable_relative_attention_bias": False},
        {"concat_ua": True, "linear_activation": "none"},
        {"domain_mask": False, "target_view_heads": 0},
    ],
)
def test_other_switches_beside_tokens(switches: dict[str, Any]) -> None:
    follow(model(**CASES["everything"] | switches), seed=1, cuts=[1, 1, 2, 1, 17, 1, 1, 3, 1])


@every_case
def test_many_events_at_once(name: str) -> None:
    net, events = model(**CASES[name]), drawn(9, 24)
    session = EncoderSession(net)
    append(session, events[:18], one_by_one=False)
    for number in range(18, 24):
        for domain in range(NUM_DOMAINS):
            close(session.query(["ann"], [domain])[0], encode(net, events[:number], domain))
        append(session, [events[number]], one_by_one=True)


@every_case
@pytest.mark.parametrize("window", [4, 9, 20])
def test_what_has_left_the_window_is_gone(name: str, window: int) -> None:
    net = model(**CASES[name])
    session, events = EncoderSession(net, window=window), []
    for event in drawn(3, 60):
        append(session, [event], one_by_one=True)
        events.append(event)
        if len(events) > window:
            events = events[max(1, window // 4) :]
        close(session.query(["ann"], [1])[0], encode(net, events, 1))


@every_case
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_holds_what_can_be_read_and_no_more(
    name: str, one_by_one: bool, dtype: torch.dtype
) -> None:
    net, events = model(**CASES[name]), drawn(4, 23)
    session = EncoderSession(net, dtype=dtype)
    append(session, events, one_by_one=one_by_one)
    state, rows = known(session), num_kept(net, events) - 1
    assert state.num_rows == rows < len(events) - 1
    wanted = expected_bytes(net.settings, len(events), dtype, rows=rows)
    assert len(codec.encode_state(state, b"c" * 16)) == 80 + wanted
    # Nothing is a view of a larger array; places to spare are few.
    assert session.num_bytes == sum(x.untyped_storage().nbytes() for x in tensors(state))
    spare = 16 + net.settings.history_tokens if one_by_one else 0
    s = net.settings
    row = s.num_blocks * s.num_heads * (s.dqk + s.dv) * dtype.itemsize + 16
    assert wanted <= session.num_bytes <= wanted + spare * (row + 24)


def test_memory_is_freed_when_a_segment_closes() -> None:
    """One domain, segments of three: with the pending event a fourth event closes the first."""
    net = model(**EVERYTHING | COUNT, history_tokens=1)
    session = EncoderSession(net)
    kept = []
    for number in range(8):
        append(session, [(1 + NUM_DOMAINS * number, number)], one_by_one=True)
        kept.append(known(session).num_rows)
    # The pending event's keys and values are never kept.
    assert kept == [0, 1, 2, 1, 2, 3, 2, 3]


def test_half_precision_stays_close() -> None:
    net, events = model(**CASES["everything"]), drawn(12, 23)
    session = EncoderSession(net, dtype=torch.float16)
    append(session, events, one_by_one=True)
    difference = session.query(["ann"], [1])[0] - encode(net, events, 1)
    assert 0 < float(difference.norm()) < 5e-3


@every_case
def test_sessions_take_turns_with_a_stored_user(name: str) -> None:
    net, store = model(**CASES[name]), MemoryStore()
    sessions = [EncoderSession(net, store=store) for _ in range(2)]
    events = drawn(5, 20)
    for number, event in enumerate(events):
        append(sessions[number % 2], [event], one_by_one=True)
        asked = sessions[number % 3 % 2].query(["ann"], [[0, 2]])[0]
        for found, domain in zip(asked, (0, 2)):
            close(found, encode(net, events[: number + 1], domain))


@every_case
def test_a_state_comes_back_bit_for_bit(name: str) -> None:
    net = model(**CASES[name])
    session = EncoderSession(net)
    append(session, drawn(6, 20), one_by_one=True)
    state = known(session)
    value = codec.encode_state(state, b"c" * 16)
    again = codec.decode_state(value, b"c" * 16, net.settings, torch.float32)
    assert codec.encode_state(again, b"c" * 16)[32:] == value[32:]
    assert torch.equal(again.rows, state.rows[:, : state.num_rows])
    assert torch.equal(again.memory, state.memory[..., : state.num_rows])


def test_a_state_of_an_earlier_layout_is_refused_and_rebuilt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, store, events = model(**CASES["everything"]), MemoryStore(), drawn(7, 9)
    with monkeypatch.context() as earlier:
        earlier.setattr(codec, "_FORMAT", codec._FORMAT - 1)
        append(EncoderSession(net, store=store), events, one_by_one=True)
    with pytest.raises(StoreError, match="cannot be used"):
        EncoderSession(net, store=store).query(["ann"], [0])
    session = EncoderSession(net, store=store, history=lambda _: tuple(zip(*events)))
    close(session.query(["ann"], [0])[0], encode(net, events, 0))
