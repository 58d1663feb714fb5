"""The k-core filters against a brute-force definition."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_files import write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.filters import Filters, apply_filters
from hstu_xd.data.order import Histories
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.errors import InputError

USERS, ITEMS, DOMAINS = 6, 12, 3
Event = tuple[int, int]


def brute_force(events: list[Event], filters: Filters) -> list[Event]:
    """Drop one offending event after the other until none is left."""
    events = list(events)
    while True:
        items = Counter(item for _, item in events)
        pairs = Counter((user, item % DOMAINS) for user, item in events)
        users = Counter(user for user, _ in events)
        offender = next(
            (
                n
                for n, (user, item) in enumerate(events)
                if items[item] < filters.min_item
                or pairs[user, item % DOMAINS] < filters.min_user
                or users[user] < filters.min_user_total
            ),
            None,
        )
        if offender is None:
            return events
        del events[offender]


@given(
    st.lists(
        st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), min_size=1, max_size=80
    ),
    st.builds(Filters, st.integers(0, 4), st.integers(0, 4), st.integers(0, 8)),
)
def test_k_core(events: list[Event], filters: Filters) -> None:
    events = sorted(events)
    user, item = np.array(events, np.int32).T
    histories = Histories(user, item, np.arange(len(events)))
    item_domain = np.arange(ITEMS, dtype=np.int32) % DOMAINS
    expected = brute_force(events, filters)
    if not expected:
        with pytest.raises(InputError, match="leaves none"):
            apply_filters(histories, filters, item_domain, USERS, DOMAINS)
        return
    left, rounds = apply_filters(histories, filters, item_domain, USERS, DOMAINS)
    assert list(zip(left.user.tolist(), left.item.tolist())) == expected
    assert (rounds == 0) == (len(expected) == len(events))


def test_filters_in_the_manifest(tmp_path: Path) -> None:
    # u0 and u1 share four books; u2 read one of them, and a film no one else saw.
    rows = [(f"u{u}", f"b{i}", "books", i) for u in (0, 1) for i in range(4)]
    rows += [("u2", "b0", "books", 1), ("u2", "f0", "films", 2)]
    log = write_log(tmp_path / "log.csv", rows)
    filters = Filters(min_user=2, min_item=2)
    manifest = prepare_logs([str(log)], tmp_path / "out", filters=filters)
    assert manifest["filters"] == {
        "min_user": 2,
        "min_item": 2,
        "min_user_total": 0,
        "rounds": 1,
        "dropped": {"users": 1, "items": 1, "interactions": 2},
    }
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["users"], manifest["items"], manifest["interactions"]) == (2, 4, 8)
    assert list(manifest["domains"]) == ["books"]


def test_what_is_left_is_stored_as_if_it_were_all(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    rows = [
        (f"u{user}", f"i{item}", f"d{item % 3}", time)
        for user, item, time in zip(
            draw.zipf(1.5, 400) % 30, draw.zipf(1.4, 400) % 40, range(400), strict=True
        )
    ]
    everything = write_log(tmp_path / "all.csv", rows)
    manifest = prepare_logs([str(everything)], tmp_path / "filtered", filters=Filters(3, 3, 6))
    store = InteractionStore.open(tmp_path / "filtered")
    kept = set(store.timestamps.tolist())
    assert 0 < len(kept) < len(rows)
    part = write_log(tmp_path / "part.csv", [row for row in rows if row[3] in kept])
    expected = prepare_logs([str(part)], tmp_path / "expected")
    assert manifest["hashes"] == expected["hashes"]
    assert manifest["domains"] == expected["domains"]


def test_total_counts_all_domains(tmp_path: Path) -> None:
    rows = [("u0", "a", "books", 1), ("u0", "b", "films", 2), ("u1", "a", "books", 3)]
    log = write_log(tmp_path / "log.csv", rows)
    manifest = prepare_logs([str(log)], tmp_path / "out", filters=Filters(min_user_total=2))
    assert (manifest["users"], manifest["interactions"]) == (1, 2)
    manifest = prepare_logs([str(log)], tmp_path / "two", filters=Filters(min_item=2))
    assert (manifest["users"], manifest["interactions"]) == (2, 2)
