"""Searching a history by level equals looking at every event of it."""

from pathlib import Path

import numpy as np
import pytest

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.ranking.histories import HistoryIndex, Questions


@pytest.fixture(scope="module")
def index(store: InteractionStore) -> HistoryIndex:
    return HistoryIndex.of(store)


@pytest.fixture(scope="module")
def asked(store: InteractionStore) -> Questions:
    """Questions at times of events and between them, before the first and after the last."""
    draw = np.random.default_rng(0)
    users = draw.integers(0, store.num_users, 400)
    times = np.array([int(draw.choice(store.history(int(user))[1])) for user in users])
    times += draw.integers(-1, 2, 400)
    times[:5], times[5:10] = 0, 4_000_000_000
    return Questions(users, draw.integers(1, store.num_items + 1, 400), times)


def lookup(
    index: HistoryIndex, store: InteractionStore, user: int, item: int, time: int, levels: list[int]
) -> list[tuple[int, int]]:
    """Every event before a time with the first level on which it is the item's."""
    found = []
    for event in range(store.offsets[user], store.offsets[user + 1]):
        if store.timestamps[event] < time:
            own, theirs = index.levels.paths[store.item_ids[event]], index.levels.paths[item]
            same = [p for p, at in enumerate(levels) if own[at] == theirs[at] != -1]
            found.append((min(same, default=len(levels)), event))
    return found


@pytest.mark.parametrize("names", [(), ("item",), ("type", "aisle"), ("aisle", "item", "domain")])
@pytest.mark.parametrize(("k", "fill", "skip"), [(7, True, 0), (7, False, 3), (500, True, 1)])
def test_hard_search_equals_a_sort(
    index: HistoryIndex,
    store: InteractionStore,
    asked: Questions,
    names: tuple[str, ...],
    k: int,
    fill: bool,
    skip: int,
) -> None:
    levels = sorted(index.levels.names.index(name) for name in names or index.levels.names)
    found = index.hard(asked, k, levels=names, fill=fill, skip_recent=skip)
    assert found.shape == (400, k)
    for row, (user, item, time) in enumerate(zip(*(x.tolist() for x in asked), strict=True)):
        events = lookup(index, store, user, item, time, levels)
        events = events[: len(events) - skip] if skip else events
        if not fill:
            events = [each for each in events if each[0] < len(levels)]
        wanted = [event for _, event in sorted(events, key=lambda each: (each[0], -each[1]))][:k]
        assert found[row].tolist() == wanted + [-1] * (k - len(wanted))


def test_recent_events_and_lengths(
    index: HistoryIndex, store: InteractionStore, asked: Questions
) -> None:
    found, lengths = index.recent(asked, 9), index.lengths(asked)
    for row, (user, item, time) in enumerate(zip(*(x.tolist() for x in asked), strict=True)):
        events = [event for _, event in lookup(index, store, user, item, time, [0])][::-1]
        assert lengths[row] == len(events)
        assert found[row].tolist() == events[:9] + [-1] * (9 - len(events[:9]))


def test_counts(index: HistoryIndex, store: InteractionStore, asked: Questions) -> None:
    found, levels = index.counts(asked), len(index.levels.names)
    assert found.shape == (400, 2 * levels)
    for row, (user, item, time) in enumerate(zip(*(x.tolist() for x in asked), strict=True)):
        for level in range(levels):
            events = [e for at, e in lookup(index, store, user, item, time, [level]) if at == 0]
            assert found[row, level] == pytest.approx(np.log1p(len(events)))
            recency = 0.0
            if events:
                days = max(1, time - store.timestamps[events[-1]]) / 86_400
                recency = max(0.0, 1 - np.log(days) / np.log(3_650))
            assert found[row, levels + level] == pytest.approx(recency, abs=1e-6)


def test_nothing_at_or_after_the_time_is_read(
    index: HistoryIndex, store: InteractionStore, asked: Questions
) -> None:
    for events in (index.recent(asked, 30), index.hard(asked, 30)):
        times = np.where(events >= 0, store.timestamps[events], -1)
        assert (times < asked.times[:, None]).all()
        users = np.searchsorted(store.offsets, events, side="right") - 1
        assert ((users == asked.users[:, None]) | (events < 0)).all()


def test_padding_reads_as_nothing(index: HistoryIndex) -> None:
    items, times = index.read(np.array([[-1, 0]]))
    assert (items[0, 0], times[0, 0]) == (0, 0)
    assert items[0, 1] > 0


def test_unknown_level_is_named(index: HistoryIndex, asked: Questions) -> None:
    with pytest.raises(InputError, match=r"names 'aisl'; the store has item, type, aisle, domain"):
        index.hard(asked, 3, levels=("aisl",))


def test_a_store_without_taxonomy_has_items_alone(tmp_path: Path) -> None:
    from hstu_xd.data.synthetic import SynthOptions, synthesize

    synthesize(tmp_path / "s", SynthOptions(users=20, domains=1, items_per_domain=30))
    assert HistoryIndex.of(InteractionStore.open(tmp_path / "s")).levels.names == ("item",)
