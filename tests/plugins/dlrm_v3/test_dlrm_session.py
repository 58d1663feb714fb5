"""A session over the production path's model: every answer equals that of the whole model."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from session_cases import VARIANTS, count_rows, logged, session_and_whole

from hstu_xd.data.store import InteractionStore
from hstu_xd.plugins.dlrm_v3 import incremental
from hstu_xd.plugins.dlrm_v3 import session as session_module
from hstu_xd.plugins.dlrm_v3.user_memory import num_equal


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the first layer computes, call by call."""
    return count_rows(monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_the_whole_models(tiny_store: Path, variant: str, seed: int) -> None:
    follow(tiny_store, variant, seed)


def follow(store_path: Path, variant: str, seed: int) -> None:
    """Append and score in any order, now and then at the same time as before."""
    draw = random.Random(seed)
    with session_and_whole(store_path, variant) as (session, whole, store):
        numbers = draw.sample(range(store.num_users), 3)
        events = {number: logged(store, number) for number in numbers}
        spread = set()
        for _ in range(30):
            number = draw.choice(numbers)
            user, last = store.user_token(number), events[number][-1][1]
            if draw.random() < 0.4:
                new = [
                    (draw.randint(1, store.num_items), last + step * draw.choice((0, 50, 90_000)))
                    for step in range(draw.randint(1, 3))
                ]
                new.sort(key=lambda event: event[1])
                session.append([user] * len(new), *map(list, zip(*new)))
                events[number] += new
                continue
            if draw.random() < 0.1:
                session.release([user])
            time = last + draw.choice((0, 0, 30, 40_000, 10**8))
            asked = [draw.randint(1, store.num_items) for _ in range(draw.randint(1, 40))]
            if draw.random() < 0.5:
                domain = draw.randrange(3)
                asked = draw.choices(store.catalog.items_of(domain).tolist(), k=5)
            (found,) = session.score([user], torch.tensor([asked]), [time])
            parts = [asked[at : at + 10] for at in range(0, len(asked), 10)]
            expected = torch.cat([whole.scores(number, events[number], p, time) for p in parts])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            spread.update(found.tolist())
        assert max(spread) - min(spread) > 0.05


def a_long_user(store: InteractionStore) -> int:
    """One who has the latest twelve events in all three domains."""
    for number in range(store.num_users):
        domains = store.catalog.item_domains[
            torch.from_numpy(store.history(number)[0][-12:]).long()
        ]
        if len(domains) == 12 and len(domains.unique()) == 3:
            return number
    raise AssertionError


def test_only_the_domain_that_is_asked_for_is_computed(
    tiny_store: Path, computed: list[int]
) -> None:
    with session_and_whole(tiny_store, "mask+tape") as (session, _, store):
        number = a_long_user(store)
        user, catalog = store.user_token(number), store.catalog
        items, times = store.history(number)
        sizes = np.bincount(catalog.item_domains.numpy()[items[-12:]], minlength=3).tolist()
        first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
        session.score([user], first)
        session.score([user], first + 1)  # the same events: candidates alone
        session.score([user], second)
        session.score([user], torch.cat([first, second], dim=1))
        # Later than the last event, so that times and positions of all events are others.
        session.append([user], [int(catalog.items_of(2)[0])], [int(times[-1]) + 10**7])
        left = int(catalog.item_domains[int(items[-12])])
        session.score([user], first)
        session.release([user])
        session.score([user], second)
        changed = [sizes[0] - (left == 0), sizes[1] - (left == 1)]
        assert computed == [sizes[0] + 4, 4, sizes[1] + 4, 8, changed[0] + 4, changed[1] + 4]


def test_in_order_of_events_an_append_costs_its_own_rows(
    tiny_store: Path, computed: list[int]
) -> None:
    for variant, expected in (("order", [0, 0, 1, 0]), ("order+all", [2, 0, 2, 0])):
        with session_and_whole(tiny_store, variant) as (session, _, store):
            number = a_short_user(store)
            user, catalog = store.user_token(number), store.catalog
            last = int(store.history(number)[1][-1])
            first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
            both = torch.cat([first, second], dim=1)
            session.score([user], both)
            del computed[:]
            session.append([user], [int(catalog.items_of(2)[0])], [last + 10**7])
            # With states the event itself, and the one before it, which knows the next one's time.
            session.score([user], first)
            session.score([user], both, [last + 2 * 10**7])
            session.append([user], [int(catalog.items_of(0)[0])], [last + 3 * 10**7])
            session.score([user], first)
            session.score([user], second)
            assert [rows - asked for rows, asked in zip(computed, (4, 8, 4, 4))] == expected


def a_short_user(store: InteractionStore) -> int:
    """One whose window has room, of three domains."""
    for number in range(store.num_users):
        items = torch.from_numpy(store.history(number)[0]).long()
        if len(items) < 9 and len(store.catalog.item_domains[items].unique()) == 3:
            return number
    raise AssertionError


def test_rows_that_read_states_are_computed_once_for_an_event(
    tiny_store: Path, computed: list[int]
) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        number = a_long_user(store)
        user, catalog = store.user_token(number), store.catalog
        first, second = (catalog.items_of(domain)[:4].unsqueeze(0) for domain in (0, 1))
        session.score([user], first)
        session.score([user], second)
        # Twelve events, and the user's token in each of the three domains.
        assert computed == [12 + 3 + 4, 4]


def test_the_same_rows_at_other_times_are_other_rows(tiny_store: Path) -> None:
    the_same_item_again_and_again(tiny_store)


def the_same_item_again_and_again(store_path: Path) -> None:
    """A full window slides, and what the layers are given of each place stays what it was."""
    with session_and_whole(store_path, "ddsr") as (session, whole, store):
        user, events = store.user_token(0), logged(store, 0)
        new = [(5, events[-1][1] + 10 * step) for step in range(12)]
        # Of another age, but of the same time before a request that is a year later.
        new += [(5, new[-1][1] + 700)]
        later = new[-1][1] + 365 * 86_400
        session.append([user] * 12, *map(list, zip(*new[:12])))
        for count in (12, 13):
            found = session.score([user], torch.tensor([[5, 40, 80]]), [later])
            expected = whole.scores(0, [*events, *new[:count]], [5, 40, 80], later)
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
            if count == 12:
                session.append([user], [5], [new[12][1]])


@pytest.mark.parametrize("variant", ["stock", "mask", "order", "all", "order+all"])
def test_users_of_one_call_are_answered_as_each_alone(
    tiny_store: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_USERS_AT_ONCE", 4)
    with session_and_whole(tiny_store, variant) as (session, whole, store):
        numbers = [0, 7, 1, 7, 2, 3]  # one of them twice, and a second batch
        users = [store.user_token(number) for number in numbers]
        events = {number: logged(store, number) for number in numbers}
        times = [events[number][-1][1] + 100 * row for row, number in enumerate(numbers)]
        draw = torch.Generator().manual_seed(1)
        for step in range(3):
            asked = torch.randint(1, store.num_items + 1, (6, 11), generator=draw)
            found = session.score(users, asked, times)
            for row, number in enumerate(numbers):
                expected = whole.scores(number, events[number], asked[row].tolist(), times[row])
                torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
            new = 5 + step, events[7][-1][1] + 50
            session.append([users[1]], [new[0]], [new[1]])
            events[7].append(new)
        assert len(session) == 5
        assert session.num_bytes == sum(each.num_bytes for each in session._memories.values())
        assert session.score([], torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
        assert session.score(users[:1], torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0)


def everything_holds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        incremental,
        "num_equal",
        lambda kept, given: 0 if kept is None else min(len(kept), len(given)),
    )


@pytest.mark.parametrize("variant", ["mask+tape", "all"])
def test_that_check_kills_what_keeps_too_much(
    tiny_store: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_holds(monkeypatch)
    with pytest.raises(AssertionError):
        follow(tiny_store, variant, seed=0)


def test_that_check_kills_rows_known_by_their_inputs_alone(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        incremental, "_num_kept", lambda kept, given, _: num_equal(kept and kept.inputs, given)
    )
    with pytest.raises(AssertionError):
        the_same_item_again_and_again(tiny_store)


def test_the_least_recently_asked_are_dropped_and_computed_anew(tiny_store: Path) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        users = [store.user_token(number) for number in range(4)]
        asked = torch.arange(1, 6).expand(4, -1)
        expected = session.score(users, asked)
        assert len(session) == 4
        each = session.num_bytes // 4
        assert session.num_bytes == sum(
            tensor.nbytes
            for memory in session._memories.values()
            for part in memory.parts()
            for tensor in part.tensors()
        )
    with session_and_whole(tiny_store, "all", max_bytes=2 * each) as (session, _, store):
        found = session.score(users, asked)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert 1 <= len(session) < 4
        assert users[3] in session
        assert users[0] not in session
        assert session.num_bytes <= 2 * each
        torch.testing.assert_close(session.score(users, asked), expected, rtol=0, atol=1e-5)
        session.release(users)
        assert session.num_bytes == len(session) == 0
