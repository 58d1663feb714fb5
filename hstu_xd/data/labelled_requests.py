"""Requests that are given: a table of impressions, a row for each candidate shown and its label.

Rows of one user, time and goal are one request. As with requests made from purchases the log is cut
in time, for all users alike, here at shares of the requests themselves.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu_xd.data.cuts import TEST_SHARE, VALID_SHARE, cut_in_time
from hstu_xd.data.requests import ANY_GOAL, SPLITS, check_requests_output, save_requests
from hstu_xd.data.sources.columns import ColumnOptions, find_column, missing_column
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.tables import id_column, read_table
from hstu_xd.data.times import check_time_unit, decide_kind
from hstu_xd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

_PROBE = 1000
_REQUEST = ("user", "time", "goal")


@dataclass(frozen=True)
class LabelOptions:
    """How a table of impressions is read.

    Attributes:
        label: column of the label.
        positive: its value where the candidate was taken; any other: it was not.
        goal: column whose values are goals; None: there is one goal.
        columns: names of the columns of user, item and time where they are unusual.
        time_unit: one of :data:`hstu_xd.data.times.TIME_UNITS`.
        valid_from: first second that validates; None: after 80 % of the requests.
        test_from: first second that tests; None: after 90 % of the requests.
    """

    label: str = "label"
    positive: str = "1"
    goal: str | None = None
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    time_unit: str = "auto"
    valid_from: int | None = None
    test_from: int | None = None


def write_labelled_requests(
    store: InteractionStore, path: Path, out: Path, options: LabelOptions, *, force: bool = False
) -> dict[str, Any]:
    """Read a table of impressions and write its requests.

    Args:
        store: the log; users and items of the table are called as there.
        path: Parquet or CSV.
        out: the folder to write; appears whole or not at all.
        options: how the table is read.
        force: replace requests that are there.

    Returns:
        The manifest; ``left_out`` counts rows whose user or item is not in the store.

    Raises:
        InputError: a column that is not there, a time or label that cannot be read, one candidate
            with two labels, cuts that leave a split without requests, or a folder that may not be
            written.
    """
    check_requests_output(out, force=force)
    check_time_unit(options.time_unit)
    rows, goals = _rows(path, options)
    known, left = _known(store, rows, path)
    requests = _requests(known, path)
    cuts = _cuts(requests, options)
    splits = np.searchsorted(np.array(cuts), requests["time"].to_numpy(), side="right")
    for number, split in enumerate(SPLITS):
        if not (splits == number).any():
            raise InputError(
                f"{path}: no request in the {split.value} split; move --valid-from and --test-from"
            )
    table = requests.with_columns(split=splits.astype(np.int8)).sort("split", *_REQUEST)
    facts = {
        "options": {"label": options.label, "positive": options.positive, "goal": options.goal},
        "impressions": str(path.resolve()),
        "left_out": left,
    }
    return save_requests(store, out, table, goals, cuts=cuts, facts=facts, force=force)


def _rows(path: Path, options: LabelOptions) -> "tuple[pl.DataFrame, list[str]]":
    """Read user, item, time, goal and label of every impression; return the goals' names, too."""
    import polars as pl

    table = read_table(path, "FILE")
    if table.is_empty():
        raise InputError(f"{path}: has no rows; give one for each candidate that was shown")
    ids = {role: id_column(path, table, role, options.columns) for role in ("user", "item")}
    rows = table.select(
        **ids, time=_times(path, table, options), taken=_taken(path, table, options)
    )
    for role in ids:
        empty = rows[role].is_null() | (rows[role] == "")
        if empty.any():
            raise InputError(f"{path}: row {_first(empty)}: no {role}; fill it in")
    if options.goal is None:
        return rows.with_columns(goal=pl.lit(0, pl.Int64)), [ANY_GOAL]
    goals = _column(path, table, options.goal, "--goal-col").cast(pl.String)
    if goals.null_count():
        raise InputError(
            f"{path}: row {_first(goals.is_null())}: no {options.goal}; fill it in, or leave such "
            "rows out"
        )
    names = goals.unique().sort()
    numbers = goals.cast(pl.Enum(names)).to_physical().cast(pl.Int64)
    return rows.with_columns(goal=numbers), [f"{options.goal}={name}" for name in names]


def _column(path: Path, table: "pl.DataFrame", name: str, option: str) -> "pl.Series":
    if name not in table.columns:
        raise InputError(
            f"{path}: no column {name!r}{did_you_mean(name, table.columns)}; it has "
            f"{', '.join(table.columns)[:200]}; name one with {option}"
        )
    return table[name]


def _first(is_so: "pl.Series") -> int:
    """Return the first row, from 1, of which something is so."""
    return 1 + (is_so.arg_max() or 0)


def _times(path: Path, table: "pl.DataFrame", options: LabelOptions) -> "pl.Series":
    """Return the seconds of a table's times."""
    import polars as pl

    at = find_column(path, table.columns, "time", options.columns, line=None)
    if at is None:
        raise missing_column(path, table.columns, "time", options.columns, line=None)
    texts = table.to_series(at).cast(pl.String)
    try:
        kind = decide_kind(texts.head(_PROBE).drop_nulls().to_list(), options.time_unit)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    seconds = kind.read(texts).seconds
    unread = seconds.is_null()
    if unread.any():
        row = _first(unread)
        problem = kind.problem_of(texts[row - 1]) if texts[row - 1] else "no time"
        raise InputError(f"{path}: row {row}: {problem}; every impression needs its time")
    return seconds


def _taken(path: Path, table: "pl.DataFrame", options: LabelOptions) -> "pl.Series":
    """Tell where the label is the positive one."""
    import polars as pl

    labels = _column(path, table, options.label, "--label-col")
    if labels.null_count():
        raise InputError(
            f"{path}: row {_first(labels.is_null())}: no {options.label}; fill it in, or leave "
            "such rows out"
        )
    texts = labels.cast(pl.String).str.strip_chars()
    if labels.dtype.is_float():  # pandas makes floats of integers
        texts = texts.str.strip_suffix(".0")
    taken = texts == options.positive
    if not taken.any() or taken.all():
        values = ", ".join(texts.unique().sort().head(5))
        raise InputError(
            f"{path}: {'every' if taken.all() else 'no'} row has {options.label} "
            f"{options.positive!r} (values: {values}); --positive names the value of candidates "
            "that were taken, and there must be others"
        )
    return taken.cast(pl.Int8)


def _known(
    store: InteractionStore, rows: "pl.DataFrame", path: Path
) -> "tuple[pl.DataFrame, dict[str, Any]]":
    """Give users and items their numbers in the store; rows without one are left out."""
    import polars as pl

    tokens = store.catalog.item_tokens
    assert tokens is not None, "a prepared store keeps the tokens"
    items = pl.DataFrame({"item": pl.Series(tokens, dtype=pl.String)}).with_columns(
        item_id=np.arange(1, len(tokens) + 1), used=store.catalog.item_domains[1:].numpy() >= 0
    )
    both = rows.with_columns(user_id=store.users_at(rows["user"].to_list())).join(
        items.filter("used"), on="item", how="left", maintain_order="left"
    )
    is_known = (both["user_id"] >= 0) & both["item_id"].is_not_null()
    strange = both.filter(~is_known)
    first = strange.row(0, named=True) if len(strange) else {}
    if not is_known.any():
        raise InputError(
            f"{path}: user {first['user']!r} or item {first['item']!r} is not in {store.path}, and "
            f"so it is with every row (it has user {store.user_token(0)!r}); give impressions of "
            "the same ids"
        )
    left = {"rows": len(strange), "user": first.get("user"), "item": first.get("item")}
    return both.filter(is_known), left


def _requests(rows: "pl.DataFrame", path: Path) -> "pl.DataFrame":
    """Put the candidates of a request side by side, by their numbers, so that no label shows."""
    import polars as pl

    key = [*_REQUEST, "item"]
    rows = rows.unique([*key, "taken"])
    clash = rows.filter(pl.struct(key).is_duplicated())
    if len(clash):
        first = clash.sort(key).row(0, named=True)
        raise InputError(
            f"{path}: user {first['user']!r} at {first['time']} has item {first['item']!r} with "
            "two labels; keep one of them"
        )
    return (
        rows.select(
            pl.col("user_id").alias("user"),
            "time",
            "goal",
            pl.col("item_id").cast(pl.Int32).alias("candidates"),
            pl.col("taken").alias("labels"),
        )
        .sort(*_REQUEST, "candidates")
        .group_by(_REQUEST, maintain_order=True)
        .agg("candidates", "labels")
    )


def _cuts(requests: "pl.DataFrame", options: LabelOptions) -> tuple[int, int]:
    given = (options.valid_from, options.test_from)
    shares = (VALID_SHARE, TEST_SHARE)
    valid, test = (y if x is None else x for x, y in zip(given, shares, strict=True))
    told = (f"--valid-from {valid}", f"--test-from {test}")
    cuts = cut_in_time(requests["time"].to_numpy(), valid, test, told=told)
    return cuts.valid_from, cuts.test_from
