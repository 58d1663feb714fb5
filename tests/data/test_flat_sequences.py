"""The flat layout of TAAC 2026, on made rows: which events they give, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu_xd.data.store import InteractionStore

Call = Callable[..., str]
T = 1_772_000_000
# Two users, the first with two rows; their pasts overlap. 0 stands for nothing.
ROWS = pl.DataFrame(
    {
        "user_id": [7, 7, 8],
        "item_id": [500, 501, 500],
        "label_type": pl.Series([1, 2, 1], dtype=pl.Int32),
        "label_time": [T + 170, T + 270, T + 370],
        "timestamp": [T + 100, T + 200, T + 300],
        "user_int_feats_1": [3, 3, None],
        "user_dense_feats_61": [[0.5, 0.25], [0.5, 0.25], [0.0, 1.0]],
        "item_int_feats_9": [4, 5, 4],
        "domain_a_seq_38": [[11, 12], [13, 11, 12], [11, 0]],
        "domain_a_seq_39": [[T + 2, T + 1], [T + 150, T + 2, T + 1], [T + 250, 0]],
        "domain_a_seq_40": [[1, 0], [2, 1, 0], [1, 0]],
        "domain_b_seq_67": [[T + 3], [T + 3], None],
        "domain_b_seq_68": [[9], [9], None],
        "domain_b_seq_69": [[11], [11], None],
    }
)
BOTH = ("--item-col", "domain_a_seq_38,domain_b_seq_69")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS.write_parquet("rows.parquet")


def events(store: InteractionStore) -> list[tuple[str, str, int]]:
    """User, item and time since T of every event, in the order of the store."""
    users = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    return [
        (store.user_token(int(user)), store.catalog.token(int(item)), int(time) - T)
        for user, item, time in zip(users, store.item_ids, store.timestamps, strict=True)
    ]


def test_rows_and_their_pasts_become_events(call: Call) -> None:
    said = call("prepare", "rows.parquet", "--out", "store", *BOTH, "--drop-repeats", "exact")
    store = InteractionStore.open("store", verify=True)
    assert store.catalog.domain_names == ("a", "b", "target")
    assert events(store) == [
        ("7", "a:12", 1),
        ("7", "a:11", 2),
        ("7", "b:11", 3),
        ("7", "500", 100),
        ("7", "a:13", 150),
        ("7", "501", 200),
        ("8", "a:11", 250),
        ("8", "500", 300),
    ]
    assert "target: item_id at timestamp; a: domain_a_seq_38 at domain_a_seq_39; b: " in said
    assert "1 without user, item and time left out" in said


def test_a_past_that_is_in_several_rows_is_told(call: Call) -> None:
    said = call("prepare", "rows.parquet", "--out", "store", *BOTH)
    assert "3 of 11 events repeat the event before them" in said
    assert "--drop-repeats exact drops them" in said


def test_columns_of_a_domain_are_fields_of_its_events(call: Call) -> None:
    fields = ("--event-cols", "domain_a_seq_40,domain_b_seq_68")
    call("prepare", "rows.parquet", "--out", "store", *BOTH, *fields, "--drop-repeats", "exact")
    store = InteractionStore.open("store")
    texts = [
        [None if code == 0 else values[code - 1] for code in codes]
        for codes, values in zip(store.fields.codes, store.fields.values, strict=True)
    ]
    assert texts[0] == [None, "1", None, None, "2", None, "1", None]
    assert texts[1] == [None, None, "9", None, None, None, None, None]


def test_a_domain_that_is_not_named_is_left_out_and_told(call: Call) -> None:
    said = call("prepare", "rows.parquet", "--out", "store", "--item-col", "domain_b_seq_69")
    assert "left out for want of an --item-col: a" in said
    assert InteractionStore.open("store").catalog.domain_names == ("b", "target")


def test_times_elsewhere(call: Call) -> None:
    moved = ROWS.rename({"domain_b_seq_67": "domain_b_seq_99"})
    moved.write_parquet("moved.parquet")
    said = call("prepare", "moved.parquet", "--out", "store", *BOTH, code=2)
    assert "no column domain_b_seq_67 in domain b; name it with --time-col" in said
    call(
        *("prepare", "moved.parquet", "--out", "store", *BOTH, "--drop-repeats", "exact"),
        *("--time-col", "domain_b_seq_99"),
    )
    assert ("7", "b:11", 3) in events(InteractionStore.open("store"))


def test_the_rows_alone(call: Call) -> None:
    call("prepare", "target=rows.parquet", "--out", "store", "--item-col", "item_id")
    assert len(events(InteractionStore.open("store"))) == 3


def test_lists_of_different_lengths_are_named(call: Call) -> None:
    broken = ROWS.with_columns(
        pl.Series("domain_a_seq_39", [[T + 2, T + 1], [T + 150], [T + 250, 0]])
    )
    broken.write_parquet("broken.parquet")
    said = call("prepare", "broken.parquet", "--out", "store", *BOTH, code=2)
    assert (
        "broken.parquet: row 2: lists of different lengths in domain a (domain_a_seq_38 3, "
        "domain_a_seq_39 1)" in said
    )
    assert not Path("store").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "has sequences of the domains a, b, and which column of a domain is its item is"),
        (("--item-col", "domain_a_seq_48"), "; did you mean 'domain_a_seq_"),
        (("--item-col", "domain_a_seq_38,domain_a_seq_40"), "both of domain a; name one"),
        ((*BOTH, "--domain-col", "user_int_feats_1"), "--domain-col is not for the flat layout"),
        ((*BOTH, "--event-cols", "user_int_feats_1"), "give columns of the domains that are read"),
        ((*BOTH, "--user-col", "nobody"), "no user column 'nobody'"),
    ],
)
def test_faults_are_named(call: Call, words: tuple[str, ...], said: str) -> None:
    assert said in call("prepare", "rows.parquet", "--out", "store", *words, code=2)
    assert not Path("store").exists()


def test_a_domain_for_the_whole_file_is_refused(call: Call) -> None:
    said = call("prepare", "ads=rows.parquet", "--out", "store", *BOTH, code=2)
    assert "NAME= is not for the flat layout" in said


def test_columns_of_other_types_are_refused(call: Call) -> None:
    ROWS.with_columns(pl.lit("x").alias("domain_a_seq_38")).write_parquet("text.parquet")
    said = call("prepare", "text.parquet", "--out", "store", *BOTH, code=2)
    assert "column 'domain_a_seq_38' is String; the flat layout has lists of integers" in said


def test_rows_give_the_items_features_too(call: Call) -> None:
    items = ("--item-features", "rows.parquet", "--levels", "item_int_feats_9")
    call("prepare", "rows.parquet", "--out", "store", *BOTH, *items)
    taxonomy = InteractionStore.open("store").taxonomy
    assert taxonomy is not None
    assert taxonomy.values == (["4", "5"],)
    ROWS.with_columns(item_int_feats_9=pl.Series([4, 5, 6])).write_parquet("changed.parquet")
    items = ("--item-features", "changed.parquet", "--levels", "item_int_feats_9")
    said = call("prepare", "rows.parquet", "--out", "other", *BOTH, *items, code=2)
    assert "item '500' has more than one row" in said
