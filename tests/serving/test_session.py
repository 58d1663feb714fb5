"""A session answers as the full encoder does on the same window, whatever the way to get there."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ITEMS_PER_DOMAIN, NORM_LENGTH, NUM_DOMAINS, SWITCHES, tiny_model
from torch import Tensor

from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.state import UserState

ITEMS = NUM_DOMAINS * ITEMS_PER_DOMAIN
SERVED = sorted(SWITCHES)
MODELS: dict[str, CrossDomainHSTU] = {}


def model(name: str) -> CrossDomainHSTU:
    if name not in MODELS:
        MODELS[name] = tiny_model(**SWITCHES[name]).float().eval()
    return MODELS[name]


def encode(
    net: CrossDomainHSTU, events: Sequence[tuple[int, int]], domain: int, when: int | None = None
) -> Tensor:
    items, times = (torch.tensor([column]) for column in zip(*events))
    request = None if when is None else torch.tensor([when])
    with torch.inference_mode():
        return net.encode(items, times, torch.tensor([domain]), request)[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def log(seed: int, events: int, users: int) -> list[tuple[int, int, int]]:
    """(user, item, time) in order of time, ties included."""
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> list[int]:
        return torch.randint(high, (events,), generator=random).tolist()

    times = torch.randint(0, 5000, (events,), generator=random).cumsum(0).tolist()
    return [(u, 1 + i, t) for u, i, t in zip(draw(users), draw(ITEMS), times)]


def follow(net: CrossDomainHSTU, seed: int, cuts: Sequence[int]) -> None:
    """Two users' events in appends of some sizes, compared with the full encoder after each."""
    events = log(seed, sum(cuts), users=2)
    session = EncoderSession(net)
    done: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for size in cuts:
        some, events = events[:size], events[size:]
        for user, item, time in some:
            done[user].append((item, time))
        if max(map(len, done.values())) > NORM_LENGTH:
            return
        session.append(*(list(column) for column in zip(*some)))
        users = [user for user in (0, 1) if done[user]]
        domains = [list(range(NUM_DOMAINS)) for _ in users]
        found = session.query(users, domains)
        late = session.query(users, [0] * len(users), [10**6] * len(users))
        for row, user in enumerate(users):
            for domain in range(NUM_DOMAINS):
                close(found[row, domain], encode(net, done[user], domain))
            close(late[row], encode(net, done[user], 0, 10**6))


@given(
    name=st.sampled_from(SERVED),
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 23), min_size=1, max_size=6),
)
@settings(max_examples=60)
def test_every_prefix_equals_the_full_encoder_however_the_events_arrive(
    name: str, seed: int, cuts: list[int]
) -> None:
    follow(model(name), seed, cuts)


@pytest.mark.parametrize(
    "name", ["everything", "hstu", "ddsr_reads_output", "history_tokens_and_everything"]
)
@pytest.mark.parametrize("window", [4, 9, 20])
def test_a_sliding_window_equals_the_full_encoder_on_the_window(name: str, window: int) -> None:
    net = model(name)
    session = EncoderSession(net, window=window)
    known: list[tuple[int, int]] = []
    for _, item, time in log(3, 60, users=1):
        session.append(["ann"], [item], [time])
        known.append((item, time))
        if len(known) > window:
            known = known[max(1, window // 4) :]
        assert len(known) >= window - max(1, window // 4) or len(known) < window
        close(session.query(["ann"], [1])[0], encode(net, known, 1))


def test_many_events_at_once_slide_too() -> None:
    net = model("everything")
    session = EncoderSession(net, window=8)
    _, items, times = zip(*log(5, 50, users=1))
    session.append(["ann"] * 50, items, times)
    state = session._cache.get("ann")
    assert state is not None
    assert 6 <= len(state.item_ids) <= 8
    window = list(zip(state.item_ids.tolist(), state.timestamps.tolist()))
    assert window == list(zip(items, times))[-len(window) :]
    close(session.query(["ann"], [2])[0], encode(net, window, 2))


def test_one_step_serves_users_of_different_lengths() -> None:
    net = model("everything")
    session = EncoderSession(net)
    done: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in log(9, 60, users=7):
        session.append([user], [item], [time])
        done.setdefault(user, []).append((item, time))
    found = session.query(list(done), [u % NUM_DOMAINS for u in done])
    for row, (user, events) in enumerate(done.items()):
        close(found[row], encode(net, events, user % NUM_DOMAINS))


def test_a_user_may_be_asked_for_twice_in_one_call_and_beside_an_unknown_one() -> None:
    net = model("everything")
    session = EncoderSession(net)
    known = [(item, time) for _, item, time in log(11, 12, users=1)]
    for item, time in known:
        session.append(["ann"], [item], [time])
    nobody = session.query(["nobody"], [[0, 2]])[0]
    found = session.query(["ann", "nobody", "ann"], [[0, 2], [0, 2], [1, 1]], [10**6, 0, 10**5])
    close(found[0, 0], encode(net, known, 0, 10**6))
    close(found[0, 1], encode(net, known, 2, 10**6))
    close(found[1], nobody)
    close(found[2, 0], encode(net, known, 1, 10**5))
    close(found[2, 0], found[2, 1])
    session.append(["ann"], [2], [10**6])
    close(session.query(["ann"], [1])[0], encode(net, [*known, (2, 10**6)], 1))


def test_what_is_kept_in_half_precision_stays_close() -> None:
    net = model("everything")
    session = EncoderSession(net, dtype=torch.float16)
    known = [(item, time) for _, item, time in log(12, 24, users=1)]
    session.append(["ann"] * 20, *zip(*known[:20]))
    for item, time in known[20:]:
        session.append(["ann"], [item], [time])
        session.query(["ann"], [0])
    difference = session.query(["ann"], [1])[0] - encode(net, known, 1)
    assert 0 < float(difference.norm()) < 5e-3


def test_answers_can_be_differentiated_through() -> None:
    session = EncoderSession(model("everything"))
    session.append(["ann"], [1], [5])
    weights = torch.ones(16, requires_grad=True)
    (session.query(["ann"], [0])[0] @ weights).backward()
    assert weights.grad is not None


def test_recommendations_are_the_best_unseen_items() -> None:
    net = model("everything")
    session = EncoderSession(net, window=6)
    _, items, times = zip(*log(4, 20, users=1))
    session.append(["ann"] * 20, items, times)
    vector = session.query(["ann"], [1])[0]
    with torch.no_grad():
        scores = {int(i): float(vector @ net.item_vectors(i)) for i in net.catalog.items_of(1)}
    unseen = sorted((i for i in scores if i not in items), key=lambda i: -scores[i])
    (found,) = session.recommend(["ann"], [1], k=3)
    assert [item for item, _ in found] == unseen[:3]
    assert [score for _, score in found] == pytest.approx([scores[i] for i in unseen[:3]], abs=1e-6)
    (everything,) = session.recommend(["ann"], [1], k=99, exclude_seen=False)
    assert len(everything) == ITEMS_PER_DOMAIN
    given_items = torch.tensor([[item for item, _ in found]])
    close(session.score(["ann"], given_items, [1])[0], torch.tensor([s for _, s in found]))


@pytest.mark.parametrize("name", SERVED)
def test_unknown_user_gets_an_answer_that_is_a_unit_vector(name: str) -> None:
    session = EncoderSession(model(name))
    vectors = session.query(["nobody"], [[0, 1, 2]])
    close(vectors.norm(dim=2), torch.ones(1, 3))
    assert "nobody" not in session
    assert session.recommend(["nobody"], [0], k=2)


def test_forgotten_user_is_unknown_again() -> None:
    session = EncoderSession(model("everything"))
    before = session.query(["ann"], [0])
    session.append(["ann"], [1], [5])
    assert session.forget("ann")
    assert not session.forget("ann")
    assert session.num_bytes == 0
    assert torch.equal(session.query(["ann"], [0]), before)


def test_the_least_recent_users_leave_and_come_back_from_their_history() -> None:
    net, events = model("everything"), log(8, 40, users=4)
    done: dict[Any, list[tuple[int, int]]] = {user: [] for user in range(4)}
    session = EncoderSession(net, max_bytes=7_000, history=lambda user: list(zip(*done[user])))
    for user, item, time in events:
        if not done[user]:
            done[user].append((item, time))
            continue
        session.append([user], [item], [time])
        done[user].append((item, time))
        assert session.num_bytes <= 7_000
    assert 0 < len(session) < 4
    for user in range(4):
        close(session.query([user], [0])[0], encode(net, done[user], 0))


def test_nothing_is_kept_of_strangers() -> None:
    # The state of nobody takes no counted bytes without DDSR, so no bound would ever drop it.
    session = EncoderSession(model("hstu"), max_bytes=1_000, history=lambda user: ([], []))
    session.query([f"stranger {number}" for number in range(99)], [0] * 99)
    assert len(session) == 0


def test_asking_for_dropped_users_keeps_to_the_bound() -> None:
    events = {user: log(user, 20, users=1) for user in range(5)}
    session = EncoderSession(
        model("everything"), max_bytes=12_000, history=lambda user: list(zip(*events[user]))[1:]
    )
    session.query(list(range(5)), [0] * 5)
    assert 0 < session.num_bytes <= 12_000
    session.recommend(list(range(5)), [0] * 5, k=2)
    assert 0 < session.num_bytes <= 12_000
    with pytest.raises(InputError):
        session.append(list(range(5)), [1] * 5, [10**6] * 4 + [0])
    assert 0 < session.num_bytes <= 12_000


@pytest.mark.parametrize("events", [0, 8, 9, 10, 11, 12, 30, 31])
@pytest.mark.parametrize("window", [4, 8, 9])
def test_the_window_follows_from_the_number_of_events_alone(window: int, events: int) -> None:
    net, quarter = model("everything"), window // 4
    known = [(item, time) for _, item, time in log(6, events, users=1)]
    one_by_one, at_once, rebuilt = (
        EncoderSession(net, window=window),
        EncoderSession(net, window=window),
        EncoderSession(net, window=window, history=lambda _: tuple(zip(*known)) or ((), ())),
    )
    for item, time in known:
        one_by_one.append(["ann"], [item], [time])
    at_once.append(["ann"] * events, *(tuple(zip(*known)) or ((), ())))
    left = quarter * max(0, -((window - events) // quarter))
    for session in (one_by_one, at_once, rebuilt):
        found = session.query(["ann"], [1])[0]
        if events:
            close(found, encode(net, known[left:], 1))
        unseen = {item for item, _ in session.recommend(["ann"], [1], k=99)[0]}
        gone = {item for item, _ in known}
        assert unseen == {int(item) for item in net.catalog.items_of(1)} - gone
    rebuilt.append(["ann"], [1], [10**7])
    known.append((1, 10**7))
    left = quarter * max(0, -((window - events - 1) // quarter))
    close(rebuilt.query(["ann"], [1])[0], encode(net, known[left:], 1))


def test_bytes_follow_the_documented_formula() -> None:
    net = model("everything")
    s = net.settings
    session = EncoderSession(net, dtype=torch.float16)
    _, items, times = zip(*log(2, 21, users=1))
    session.append(["ann"] * 21, items, times)
    width = s.num_blocks * s.num_heads * (s.dqk + s.dv) * 2
    states = s.num_domains * s.states_per_domain
    expected = 20 * width + 21 * 24 + states * width + 8 * (states + s.num_domains)
    assert session.num_bytes == expected


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((["ann"], [1], [4]), "at 4 after one at 5"),
        ((["bob", "bob"], [1, 2], [9, 8]), "at 8 after one at 9"),
        ((["ann"], [ITEMS + 1], [9]), f"unknown item {ITEMS + 1}"),
        ((["ann"], [0], [9]), "unknown item 0"),
        ((["ann"], [1, 2], [9, 9]), "1 users, 2 items and 2 timestamps"),
    ],
)
def test_bad_events_change_nothing(events: Any, message: str) -> None:
    session = EncoderSession(model("everything"))
    session.append(["ann"], [3], [5])
    before = session.query(["ann"], [0])
    with pytest.raises(InputError, match=message):
        session.append(*events)
    assert torch.equal(session.query(["ann"], [0]), before)
    assert len(session) == 1


def test_bad_requests_name_the_value() -> None:
    session = EncoderSession(model("everything"))
    with pytest.raises(InputError, match="unknown domain 3"):
        session.query(["ann"], [3])
    with pytest.raises(InputError, match=r"target_domains has shape \(2,\)"):
        session.query(["ann"], [0, 1])
    with pytest.raises(InputError, match="k is 0"):
        session.recommend(["ann"], [0], k=0)
    with pytest.raises(InputError, match=r"model is torch\.float64 on cpu; .*model\.float"):
        EncoderSession(tiny_model().double())
    with pytest.raises(InputError, match=r"model is torch\.float32 on meta"):
        EncoderSession(tiny_model().to("meta"))
    with pytest.raises(InputError, match="window is 3"):
        EncoderSession(model("everything"), window=3)


class SharedHistory:
    """A user's events that several sessions read and anybody may change, with their version."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.version = b"0"

    def change(self, events: list[tuple[int, int]]) -> None:
        self.events, self.version = events, self.version + b"0"

    def all_of(self, user: Any) -> tuple[Sequence[int], Sequence[int]]:
        return tuple(zip(*self.events)) or ((), ())

    def present(self, user: str) -> bytes:
        return self.version

    def following(self, user: str) -> bytes:
        return self.version + b"0"


@pytest.mark.parametrize("name", SERVED)
def test_a_state_that_is_behind_takes_what_others_have_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has is not encoded again, unless it is not what the history begins with."""
    net, window, made = model(name), 8, list[None]()
    empty = UserState.empty
    monkeypatch.setattr(UserState, "empty", lambda *args: made.append(None) or empty(*args))
    known = [(item, time) for _, item, time in log(8, 40, users=1)]
    history = SharedHistory()
    session = EncoderSession(net, window=window, history=history.all_of, versions=history)

    def is_right() -> None:
        events = history.events
        left = 2 * max(0, -((window - len(events)) // 2))
        close(session.query(["ann"], [1])[0], encode(net, events[left:], 1))
        unseen = {item for item, _ in session.recommend(["ann"], [1], k=99)[0]}
        gone = {item for item, _ in events}
        assert unseen == {int(item) for item in net.catalog.items_of(1)} - gone

    # From 9 events on the window slides.
    for count in (*range(1, 13), 16, 17, 30):
        history.change(known[:count])
        is_right()
    # Own events and those of others, in turns.
    session.append(["ann"], *([column] for column in known[30]))
    history.change(known[:31])
    is_right()
    history.change(known[:32])
    is_right()
    assert len(made) == 1
    # An event of the window is gone, then one that had left it, then the last one.
    for gone in (28, 3, len(history.events) - 3):
        before = len(made)
        history.change(history.events[:gone] + history.events[gone + 1 :])
        is_right()
        assert len(made) > before
    history.change([])
    close(session.query(["ann"], [1]), EncoderSession(net).query(["nobody"], [1]))


def test_a_state_of_other_events_lacks_nothing_that_can_be_added() -> None:
    net, window = model("everything"), Window(8)
    known = [(item, time) for _, item, time in log(9, 30, users=1)]
    for count in (1, 7, 8, 9, 10, 11, 20):
        session = EncoderSession(net, window=window)
        session.append(["ann"] * count, *zip(*known[:count]))
        state = session._cache.get("ann")
        assert state is not None
        items, times = torch.tensor(known).T
        history = torch.stack([items, times, net.catalog.domain_of(items)])
        lacked = state.lacked(history, window)
        assert lacked is not None
        assert torch.equal(lacked, history[:, count:])
        assert state.lacked(history[:, 1:], window) is None
        assert state.lacked(history[:, : count - 1], window) is None
        if count > 8:
            # The window is the same, but another item has left it.
            other = history.clone()
            other[0, 0] = other[0, 0] % ITEMS + 1
            seen = set(other[0, : count - state.length].tolist())
            expected = seen == set(history[0, : count - state.length].tolist())
            assert (state.lacked(other, window) is not None) == expected
