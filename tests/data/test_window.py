"""Which events are read, against a slow reading of the rule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.data import batches
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError

HELD_OUT = {Split.TRAIN: 2, Split.VALID: 1, Split.TEST: 0}


def read_by(window: Window, domains: list[int]) -> list[int]:
    """Return the places of the events that are read, by the definition alone."""
    first = max(0, len(domains) - window.latest)
    older = [
        place
        for place in range(first)
        if domains[place:first].count(domains[place]) <= window.older
    ]
    return older + list(range(first, len(domains)))


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=5),
    st.integers(1, 6),
    st.integers(0, 4),
)
def test_the_latest_events_and_of_each_domain_the_latest_before_them(
    histories: list[list[int]], latest: int, older: int
) -> None:
    window = Window(latest, older)
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in histories])], dtype=torch.int64)
    domains = torch.tensor([d for one in histories for d in one], dtype=torch.int64)
    kept = window.kept(domains, offsets)
    for one, start, end in zip(histories, offsets.tolist(), offsets[1:].tolist()):
        found = kept[start:end].nonzero().flatten().tolist()
        assert found == read_by(window, one)
        assert len(found) <= window.size(4)


def test_what_is_no_window_is_refused() -> None:
    for latest, older in ((0, 0), (3, -1)):
        with pytest.raises(InputError, match=f"latest={latest}, older={older}"):
            Window(latest, older)
    assert Window.of(3) == Window.of(Window(3)) == Window(3, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path: Path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=60, domains=3, items_per_domain=20, mean_length=20))
    return InteractionStore.open(path)


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
@pytest.mark.parametrize("split", list(Split))
def test_batches_hold_what_is_read_and_what_follows_it_there(
    store: InteractionStore, split: Split, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_OLDER_AT_ONCE", at_once)
    window = Window(4, 2)
    data = SequenceData(store, split, window)
    users = np.random.default_rng(0).permutation(data.users)[:30]
    batch, targets = data.batch(users)
    assert batch.offsets.diff().tolist() == data.lengths(users).tolist()
    assert max(data.lengths(users)) > window.latest
    domains = store.catalog.item_domains
    for row, user in enumerate(users):
        items, times = store.history(int(user))
        last = len(items) - 1 - HELD_OUT[split]
        read = read_by(window, domains[torch.tensor(items[:last].astype(np.int64))].tolist())
        follows = [*read[1:], last]
        tokens = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        assert batch.item_ids[tokens].tolist() == items[read].tolist()
        assert batch.timestamps[tokens].tolist() == times[read].tolist()
        assert targets[tokens].tolist() == items[follows].tolist()
        assert batch.next_timestamps[tokens].tolist() == times[follows].tolist()
        assert torch.equal(batch.target_domains[tokens], domains[targets[tokens]])


@pytest.mark.parametrize("context", [0, 3])
def test_a_continued_run_reads_older_events_before_its_news(
    store: InteractionStore, context: int
) -> None:
    latest, both = (SequenceData(store, Split.TRAIN, window) for window in (8, Window(8, 1)))
    assert (both.lengths(both.users) > 8).any()  # Counted before the windows begin elsewhere.
    middle = int(np.median(np.asarray(store.timestamps)))
    users = latest.begin_at_news(middle, context)
    assert np.array_equal(both.begin_at_news(middle, context), users)
    domains = store.catalog.item_domains
    for user in users.tolist():
        one = np.array([user])
        news = latest.batch(one)[0].item_ids
        items = torch.from_numpy(store.history(user)[0].astype(np.int64))[:-3]
        before = items[: len(items) - news.numel()]
        read = read_by(Window(1, 1), [*domains[before].tolist(), 0])[:-1]
        assert torch.equal(both.batch(one)[0].item_ids, torch.cat([before[read], news]))
