"""Packed sorting equals sorting rows, however many bits users, items and times need."""

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.encode import Events
from hstu_xd.data.order import sort_events

USERS, ITEMS = 37, 11  # 6 and 4 bits


@pytest.mark.parametrize("rows", [1, 2, 5000])
@pytest.mark.parametrize("time_bits", [0, 1, 40, 53, 54, 55, 56, 60, 61, 62])
def test_against_rows(time_bits: int, rows: int) -> None:
    """54 bits of time fill a key, up to 60 need buckets of users, 61 and more neither."""
    rng = np.random.default_rng(time_bits)
    user = rng.integers(0, USERS, rows, np.int32)
    item = rng.integers(0, ITEMS, rows, np.int32)
    low = 5 if time_bits < 62 else 0
    time = low + rng.integers(0, 1 << time_bits, rows)
    time[:2] = (low, low + (1 << time_bits) - 1)[: len(time)]
    expected = sorted(zip(user.tolist(), time.tolist(), item.tolist()))
    users = pl.Series([str(u) for u in range(USERS)])
    items = pl.DataFrame({"item": [str(i) for i in range(ITEMS)]})
    events = Events(users, items, user, item, time)
    user, item, time = sort_events(events)
    assert list(zip(user.tolist(), time.tolist(), item.tolist())) == expected
    assert (user.dtype, item.dtype, time.dtype) == (np.int32, np.int32, np.int64)
    assert not len(events.user)


def test_one_user_and_one_item_need_no_bits() -> None:
    time = np.array([5, 2, 9])
    zeros = np.zeros(3, np.int32)
    events = Events(pl.Series(["a"]), pl.DataFrame({"item": ["x"]}), zeros, zeros, time)
    user, item, time = sort_events(events)
    assert (user.tolist(), item.tolist(), time.tolist()) == ([0, 0, 0], [0, 0, 0], [2, 5, 9])
