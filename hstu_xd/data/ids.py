"""Ids that should meet: spellings of one id are made one, and what looks odd about ids is said.

All of it works on the distinct ids of a log, not on its events.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

LONGEST_ID = 4096
_DECIMAL = r"^-?\d+\.\d+$"
_WHOLE_DECIMAL = r"^(-?\d+)\.0+$"
_WHOLE = r"^-?\d+$"
_CONTROL = r"[\p{Cc}\p{Zl}\p{Zp}]"
_MISSING = ("nan", "none", "null", "\\n", "na", "n/a", "<na>", "nil", "nat", "undefined", "#n/a")
_EXAMPLES = 3


def tidy(tokens: "pl.Series", role: str) -> tuple["pl.Series", list[str]]:
    """Make spellings of one id equal: spaces at its ends, and 12.0 where there is a 12.

    A decimal without a fraction is a whole number where every decimal of the log is one and some
    other id is written as a whole number; then pandas or Parquet have added the fraction.

    Returns:
        The ids, and what was changed, in words.
    """
    notes = []
    stripped = tokens.str.strip_chars()
    spaced = tokens.filter(stripped != tokens)
    if len(spaced):
        notes.append(
            f"spaces at the ends of {len(spaced):,} {role} ids taken away ({_few(spaced)})"
        )
    whole = stripped.str.extract(_WHOLE_DECIMAL)
    decimals = stripped.str.contains(_DECIMAL)
    if whole.null_count() < len(whole) and whole.filter(decimals).null_count() == 0:
        shortened = whole.zip_with(whole.is_not_null(), stripped)
        if stripped.str.contains(_WHOLE).any() or shortened.n_unique() < stripped.n_unique():
            odd = stripped.filter(whole.is_not_null())
            notes.append(f"fractions of {len(odd):,} {role} ids taken away ({_few(odd)})")
            stripped = shortened
    return stripped, notes


def number_tokens(tokens: "pl.DataFrame") -> tuple["pl.DataFrame", NDArray[np.int32]]:
    """Sort tokens by their columns and make equal ones one.

    Returns:
        The distinct tokens in order, and the place of each row of ``tokens`` in them.
    """
    names = tokens.columns
    ordered = tokens.with_row_index("code").sort(*names)
    fresh = np.zeros(len(ordered), np.bool_)
    fresh[:1] = True
    for name in names:
        column = ordered[name]
        fresh[1:] |= column.ne_missing(column.shift(1)).to_numpy()[1:]
    ranks = np.empty(len(ordered), np.int32)
    ranks[ordered["code"].to_numpy()] = np.cumsum(fresh, dtype=np.int32) - 1
    return (ordered if fresh.all() else ordered.filter(fresh)).select(names), ranks


def check_domain_characters(domains: "pl.Series") -> None:
    """Refuse names of domains that hold control characters, which no file of a run can hold.

    Raises:
        InputError: names the domain.
    """
    odd = domains.filter(domains.str.contains(_CONTROL))
    if len(odd):
        raise InputError(
            f"domain {odd[0]!r} holds control characters, which tables and files of runs cannot "
            "hold; mend the column, or give the file its domain as NAME=PATH"
        )


def missing_as_text(tokens: "pl.Series", events: NDArray[np.int64], role: str) -> str | None:
    """Describe ids that look like missing values; None where there are none.

    Args:
        tokens: distinct ids.
        events: number of events of each.
        role: ``user``, ``item`` or ``domain``.
    """
    rows = np.flatnonzero(tokens.str.to_lowercase().is_in(_MISSING).to_numpy())
    if not rows.size:
        return None
    listed = ", ".join(f"{tokens[int(row)]!r} ({int(events[row]):,} events)" for row in rows)
    return (
        f"{role} ids that look like missing values count as {role}s: {listed}; remove their lines "
        "if they are missing"
    )


def alike_without_case(names: "pl.Series") -> str | None:
    """Describe domains whose names differ in case or inner spaces only; None where none do."""
    keys = names.str.to_lowercase().str.replace_all(r"[\s_\-]+", " ")
    twins = names.filter(keys.is_duplicated())
    if not len(twins):
        return None
    return f"domains {_few(twins)} look like one; write it in one way if it is"


def strangers(users: "pl.Series", examples: dict[str, str]) -> str:
    """Describe that nobody has events in two domains.

    Args:
        users: all ids of users.
        examples: domain -> an id of a user in it.
    """
    keys = users.str.to_lowercase().str.replace_all(r"[^a-z0-9]+", "").str.strip_chars_start("0")
    twins = users.filter(keys.is_duplicated() & (keys != ""))
    shown = ", ".join(f"{user!r} in {domain}" for domain, user in examples.items())
    alike = f"; {_few(twins)} look alike" if len(twins) else ""
    return (
        "no user has events in more than one domain, so nothing crosses domains; if they are the "
        f"same people, their ids differ ({shown}{alike})"
    )


def _few(tokens: "pl.Series") -> str:
    shown = ", ".join(repr(token) for token in tokens.head(_EXAMPLES))
    return shown + (", ..." if len(tokens) > _EXAMPLES else "")
