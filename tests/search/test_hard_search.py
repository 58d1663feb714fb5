"""Hard search against its definition, which sorts all events of a user."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import Log, by_definition, draw_log, draw_queries, pairs

from hstu_xd.errors import InputError
from hstu_xd.search import HardIndex, directory, hard, search_recent

LEVELS = st.none() | st.sets(st.integers(0, 3), min_size=1).map(sorted)


@st.composite
def options(draw: Any) -> dict[str, Any]:
    levels = draw(LEVELS)
    quotable = range(4) if levels is None else levels
    return {
        "levels": levels,
        "quotas": draw(st.none() | st.dictionaries(st.sampled_from(quotable), st.integers(0, 4))),
        "skip_recent": draw(st.sampled_from([0, 0, 1, 3, 200])),
        "fill": draw(st.sampled_from(["none", "recent"])),
        "scope": draw(st.sampled_from(["all", "target_domain"])),
    }


def check(
    log: Log, index: HardIndex, rng: np.random.Generator, count: int, k: int, how: Any
) -> None:
    users, paths, times = draw_queries(rng, log, count)
    found = index.search(users, paths, times, k, **how)
    for q in range(count):
        expected = by_definition(log, int(users[q]), paths[q], int(times[q]), k, **how)
        assert pairs(found, q) == expected


@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([0, 1, 2, 7, 40, 150]), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([1, 3, 10, 300]),
    options(),
)
def test_equals_the_definition(
    seed: int, lengths: list[int], is_tree: bool, k: int, how: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    log = draw_log(rng, lengths, is_tree=is_tree)
    check(log, HardIndex.build(*log), rng, 60, k, how)


@pytest.mark.slow
@pytest.mark.parametrize("is_tree", [True, False])
def test_equals_the_definition_on_many_queries(is_tree: bool) -> None:
    rng = np.random.default_rng(7)
    log = draw_log(rng, rng.integers(0, 120, 500).tolist(), is_tree=is_tree, nodes=40)
    index = HardIndex.build(*log)
    check(log, index, rng, 40_000, 10, {})
    check(log, index, rng, 10_000, 10, {"quotas": {0: 2, 1: 3}, "fill": "recent"})


def test_blocks_of_users_and_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    log = draw_log(rng, [3, 0, 90, 0, 0, 7, 20], is_tree=False)
    whole = HardIndex.build(*log)
    monkeypatch.setattr(directory, "EVENTS_AT_ONCE", 8)
    parts = HardIndex.build(*log)
    monkeypatch.setattr(hard, "CELLS", 1)
    asked = draw_queries(rng, log, 50)
    for how in ({}, {"quotas": {1: 2}}):
        a, b = whole.search(*asked, 5, **how), parts.search(*asked, 5, **how)
        assert np.array_equal(a.events, b.events)
        assert np.array_equal(a.levels, b.levels)


def test_keys_too_wide_to_be_packed_are_sorted_by_columns() -> None:
    rng = np.random.default_rng(2)
    log = draw_log(rng, [40, 30], is_tree=False)
    wide = log._replace(paths=np.where(log.paths < 0, -1, log.paths + (1 << 58)))
    index = HardIndex.build(*wide)
    users, paths, times = draw_queries(rng, log, 50)
    found = index.search(users, np.where(paths < 0, -1, paths + (1 << 58)), times, 5)
    plain = HardIndex.build(*log).search(users, paths, times, 5)
    assert np.array_equal(found.events, plain.events)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 5]), st.booleans(), options())
def test_appending_equals_building_again(
    seed: int, kept: int, is_tree: bool, how: dict[str, Any]
) -> None:
    """Every user's events after the first few come one by one, users mixed."""
    rng = np.random.default_rng(seed)
    log = draw_log(rng, [0, 1, 9, 60, 3], is_tree=is_tree)
    starts = log.offsets[:-1]
    user_of = np.repeat(np.arange(len(starts)), np.diff(log.offsets))
    number = np.arange(len(log.times)) - starts[user_of]
    built = np.flatnonzero((number < kept) & (user_of < 4))
    lengths = np.bincount(user_of[built], minlength=4)[:4]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = HardIndex.build(log.paths[built], offsets, log.times[built])
    later = np.setdiff1d(np.arange(len(log.times)), built)
    later = later[np.argsort(log.times[later] * 1000 + number[later], kind="stable")]
    rows = [index.append(int(user_of[i]), log.paths[i], int(log.times[i])) for i in later]
    assert rows == list(range(len(built), len(log.times)))
    users, paths, times = draw_queries(rng, log, 60)
    users = np.minimum(users, index.num_users - 1)
    row_of = np.append(np.concatenate([built, later]), -1)
    counted, counted_at_once = (
        each.count(users, paths, times) for each in (index, HardIndex.build(*log))
    )
    assert np.array_equal(counted[0], counted_at_once[0])
    assert np.array_equal(row_of[counted[1]], counted_at_once[1])
    for k in (1, 4, 100):
        a, b = (
            index.search(users, paths, times, k, **how),
            HardIndex.build(*log).search(users, paths, times, k, **how),
        )
        assert np.array_equal(row_of[a.events], b.events)
        assert np.array_equal(a.levels, b.levels)


def test_never_an_event_at_or_after_the_request() -> None:
    rng = np.random.default_rng(3)
    log = draw_log(rng, [200] * 50, is_tree=True)
    users, paths, times = draw_queries(rng, log, 20_000)
    found = HardIndex.build(*log).search(users, paths, times, 50, fill="recent")
    there = found.events >= 0
    assert there.sum() > 500_000
    assert (np.where(there, log.times[found.events], -1) < times[:, None]).all()


def test_saved_and_opened(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    log = draw_log(rng, [0, 30, 5], is_tree=False)
    index = HardIndex.build(*log)
    index.save(tmp_path / "index")
    opened = HardIndex.open(tmp_path / "index")
    asked = draw_queries(rng, log, 40)
    assert np.array_equal(opened.search(*asked, 5).events, index.search(*asked, 5).events)
    assert opened.nbytes == index.nbytes
    with pytest.raises(InputError, match="exists; add --force"):
        index.save(tmp_path / "index")
    index.save(tmp_path / "index", force=True)
    opened.append(0, [1, 1, 1, 1], 1)
    with pytest.raises(InputError, match="1 appended events, which are not saved"):
        opened.save(tmp_path / "other")
    (tmp_path / "index" / "keys.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"keys\.npy: cannot be read"):
        HardIndex.open(tmp_path / "index")
    np.save(tmp_path / "index" / "keys.npy", np.zeros(3))
    with pytest.raises(InputError, match="entries belong there"):
        HardIndex.open(tmp_path / "index")
    (tmp_path / "index" / "hard_index.json").write_text('{"format_version": 0}')
    with pytest.raises(InputError, match="of version 0, this package reads 1"):
        HardIndex.open(tmp_path / "index")
    with pytest.raises(InputError, match="no hard index there"):
        HardIndex.open(tmp_path)


def test_recent_is_the_fill_of_a_search_without_matches() -> None:
    rng = np.random.default_rng(5)
    log = draw_log(rng, [0, 1, 70, 8], is_tree=True)
    users, paths, times = draw_queries(rng, log, 200)
    recent = search_recent(log.offsets, log.times, users, times, 9)
    index = HardIndex.build(*log)
    filled = index.search(users, np.full_like(paths, -1), times, 9, fill="recent")
    assert np.array_equal(recent.events, filled.events)
    assert set(recent.levels.ravel().tolist()) == {0, -1}


GOOD: dict[str, Any] = {
    "paths": np.array([[0, 0], [1, 0], [2, 1]]),
    "offsets": np.array([0, 2, 3]),
    "times": np.array([5, 6, 1]),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"paths": np.array([0, 1, 2])}, "paths have shape"),
        ({"paths": np.zeros((3, 2))}, "paths are float64"),
        ({"paths": np.zeros((2, 2), int)}, "paths are int64 of shape"),
        ({"paths": np.full((3, 2), -2)}, "paths hold node -2"),
        ({"offsets": np.array([0, 2])}, "do not lead from 0 to the 3 events"),
        ({"offsets": np.array([0, 4, 3])}, "offsets descend at user 1"),
        ({"times": np.array([5.0, 6.0, 7.0])}, "times are float64"),
        ({"times": np.array([6, 5, 1])}, "event 1 of user 0 at 5 follows one at 6"),
        ({"paths": np.full((3, 2), 1 << 62)}, "more than 63 bits"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HardIndex.build(**(GOOD | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"users": np.array([2])}, r"users are 2\.\.2; the log has users 0\.\.1"),
        ({"users": np.array([-1])}, r"users are -1"),
        ({"users": np.array([0, 1])}, "one of each is needed"),
        ({"paths": np.array([[0]])}, "paths of candidates have shape"),
        ({"k": 0}, "k is 0"),
        ({"levels": [2]}, r"levels are \[2\]"),
        ({"levels": []}, r"levels are \[\]"),
        ({"quotas": {1: -1}}, "quotas hold 1: -1"),
        ({"levels": [0], "quotas": {1: 1}}, "quotas hold 1: 1"),
        ({"skip_recent": -1}, "skip_recent is -1"),
        ({"fill": "recnt"}, "did you mean 'recent'"),
        ({"scope": "domain"}, "scope is 'domain'"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    asked = {"users": np.array([0]), "paths": np.array([[0, 0]]), "times": np.array([9]), "k": 2}
    with pytest.raises(InputError, match=message):
        HardIndex.build(**GOOD).search(**(asked | wrong))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ((-1, [0, 0], 9), "user -1 with path"),
        ((0, [0], 9), "a path has 2 nodes"),
        ((0, [0, -2], 9), "cannot be appended"),
        ((0, [0, 0], 5), "is before the latest one, at 6"),
    ],
)
def test_an_event_that_cannot_be_appended_is_refused(event: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HardIndex.build(**GOOD).append(*event)
