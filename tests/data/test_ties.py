"""Events of one user at one time are ordered by a hash of their ids and by nothing else."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_files import write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.order import hash_pairs, hash_tokens
from hstu_xd.data.prepare import prepare_logs

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


HASHES = [0, 7075883509774426401, 4930176031373770303, 12509045474446263540]
PAIRS = [7012600684978114182, 6974766344283919169, 554812949664365036, 1946804359481996721]


def mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def token_hash(token: str) -> int:
    data = token.encode()
    value = len(data)
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little")
        value = mix(((value ^ word) + GOLDEN) & MASK)
    return value


def pair_hash(user: str, item: str) -> int:
    return mix((mix(token_hash(user)) + GOLDEN * token_hash(item)) & MASK)


def histories(rows: list[tuple[str, str, str, int]]) -> dict[str, list[tuple[str, int]]]:
    """What prepare makes of the rows: per user the item tokens with their times."""
    with TemporaryDirectory() as folder:
        log = write_log(Path(folder) / "log.csv", rows)
        prepare_logs([str(log)], Path(folder) / "out")
        store = InteractionStore.open(Path(folder) / "out")
        tokens = pl.read_parquet(store.path / "catalog.parquet")["item"].to_list()
        found = {}
        for user in range(store.num_users):
            items, times = store.history(user)
            named = [tokens[item - 1] for item in items]
            found[store.user_token(user)] = list(zip(named, times.tolist()))
        return found


@given(st.lists(st.text(max_size=20), min_size=1, max_size=30))
def test_token_hash(tokens: list[str]) -> None:
    hashes = hash_tokens(pl.Series(tokens, dtype=pl.String))
    assert hashes.tolist() == [token_hash(token) for token in tokens]


def test_hashes_never_change() -> None:
    """A changed hash would reorder every log: these values are part of the store's format."""
    tokens = pl.Series(["", "a", "B00AGABISW", "user with a rather long id"])
    hashes = hash_tokens(tokens)
    assert hashes.tolist() == HASHES
    assert hash_pairs(hashes, hashes[::-1]).tolist() == PAIRS


def test_hash_of_a_slice() -> None:
    tokens = pl.Series([f"token {n}" for n in range(50)])
    np.testing.assert_array_equal(hash_tokens(tokens[10:20]), hash_tokens(tokens)[10:20])


event = st.tuples(
    st.sampled_from(["u", "v", "user-three"]),
    st.integers(0, 11),
    st.integers(0, 3),
)


@settings(max_examples=40)
@given(
    st.lists(event, min_size=1, max_size=40),
    st.permutations(["a", "b", "c"]),
    st.randoms(use_true_random=False),
)
def test_order_matches_brute_force(events: list, names: list[str], draw: object) -> None:
    rows = [(user, f"item{item}", names[item % 3], time) for user, item, time in events]
    expected: dict[str, list[tuple[str, int]]] = {}
    for user, item, _, time in sorted(rows, key=lambda r: (r[3], pair_hash(r[0], r[1]))):
        expected.setdefault(user, []).append((item, time))
    draw.shuffle(rows)  # type: ignore[attr-defined]
    # ``names`` renames the domains and with them renumbers all items: the order must not care.
    assert histories(rows) == expected


def test_many_ties_in_a_long_history() -> None:
    rows = [("u", f"i{n}", f"d{n % 7}", n % 3) for n in range(5000)]
    expected = sorted(rows, key=lambda r: (r[3], pair_hash(r[0], r[1])))
    assert histories(rows)["u"] == [(item, time) for _, item, _, time in expected]


def test_hashes_that_share_their_leading_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the run's number only leading bits fit in the sort key; the rest must still count."""

    def low_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return hash_pairs(left, right) >> np.uint64(58)

    monkeypatch.setattr("hstu_xd.data.order.hash_pairs", low_bits)
    rows = [(f"u{n % 3}", f"i{n}", "d", n % 5) for n in range(400)]
    found = histories(rows)
    assert sum(len(items) for items in found.values()) == len(rows)
    for user, items in found.items():
        keys = [(time, pair_hash(user, item) >> 58, item) for item, time in items]
        assert [key[:2] for key in keys] == sorted(key[:2] for key in keys)
        # Equal hashes fall back on the order of the catalogue.
        assert keys == sorted(keys)


def test_ties_tell_nothing_about_the_next_domain() -> None:
    """In tied pairs the later event lies in the higher domain half of the time."""
    rows = [(f"u{n // 2}", f"{n % 2}-{n}", f"d{n % 2}", 0) for n in range(4000)]
    later = [items[1][0][0] == "1" for items in histories(rows).values()]
    assert abs(np.mean(later) - 0.5) < 4 * 0.5 / np.sqrt(len(later))
