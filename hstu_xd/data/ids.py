"""Number the ids of a log, and make spellings of one id meet.

Ids are numbered in order of first sight, a batch at a time, faster than by a general hash map. What
looks odd about ids is said. All of that works on the distinct ids of a log, not on its events.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

from hstu_xd.data.token_bytes import TokenBytes
from hstu_xd.errors import InputError

CHUNK = 1 << 16
ABSENT = np.int32(-1)
MULTIPLIER = 0x9E3779B97F4A7C15
WORD = 1 << 64


class HashIndex:
    """Finds the place of 64-bit hashes in a fixed set of them with a few array look-ups.

    Level k is a table of 2^b slots addressed by the top bits of hash * multiplier_k. Each hash
    sits in the first level where no other took its slot; at a load of at most a quarter, one or
    two levels settle nearly all.

    Args:
        hashes: (n,) uint64, all different.
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.hashes = hashes
        self.levels: list[tuple[np.uint64, np.uint64, NDArray[np.int32]]] = []
        left = np.arange(len(hashes), dtype=np.int32)
        multiplier = MULTIPLIER
        while left.size:
            bits = int(left.size).bit_length() + 2
            shift = np.uint64(64 - bits)
            factor = np.uint64(multiplier)
            table = np.full(1 << bits, ABSENT)
            slot = (hashes[left] * factor) >> shift
            table[slot] = left
            self.levels.append((factor, shift, table))
            left = left[table[slot] != left]
            multiplier = (multiplier * MULTIPLIER + 2) % WORD

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Place of each hash in the set, -1 where it is not in it: (m,) int32."""
        found = np.full(len(hashes), ABSENT)
        for start in range(0, len(hashes), CHUNK):
            part = slice(start, start + CHUNK)
            self._find_chunk(hashes[part], found[part])
        return found

    def _find_chunk(self, hashes: NDArray[np.uint64], found: NDArray[np.int32]) -> None:
        rows: NDArray[np.int64] | None = None
        for factor, shift, table in self.levels:
            slot = ((hashes * factor) >> shift).view(np.int64)
            # An empty slot (-1, clipped to 0) reads the first hash, which is never looked for in
            # this level: it was found in an earlier one, or its own slot here is taken.
            place = table.take(slot, mode="clip")
            right = self.hashes.take(place, mode="clip") == hashes
            if rows is None:
                np.copyto(found, place, where=right)
                rows = np.flatnonzero(~right)
                hashes = hashes[rows]
            else:
                found[rows[right]] = place[right]
                rows, hashes = rows[~right], hashes[~right]
            if not rows.size:
                return


class TokenDictionary:
    """Codes 0, 1, 2, ... for tokens told apart by a 64-bit hash.

    Two different tokens are taken for one when their hashes are equal: for ten million tokens the
    odds are about 3 in a million.

    Args:
        known: (n,) uint64, hashes of the tokens that have the codes 0 to n - 1 already.
    """

    def __init__(self, known: NDArray[np.uint64] | None = None) -> None:
        self._parts: list[pa.Table] = []
        known = np.empty(0, np.uint64) if known is None else known
        self.num_known = self._size = len(known)
        self._old = HashIndex(known)
        self._new = HashIndex(np.empty(0, np.uint64))

    def __len__(self) -> int:
        return self._size

    def encode(self, hashes: "pl.Series", tokens: "pl.DataFrame") -> NDArray[np.int32]:
        """Code of each row's token; tokens not seen before get the next codes.

        Args:
            hashes: (n,) uint64.
            tokens: n rows; kept for the first row of each new hash.

        Returns:
            (n,) int32.
        """
        values = hashes.to_numpy()
        codes = self._find(values)
        unseen = np.flatnonzero(codes < 0)
        if unseen.size:
            self._learn(values[unseen], tokens, unseen)
            codes[unseen] = self._find(values[unseen])
        return codes

    def tokens(self) -> "pl.DataFrame":
        """Return the columns of the tokens that were learnt, row r for code r beyond the known."""
        import polars as pl
        import pyarrow as pa

        if not self._parts:
            return pl.DataFrame()
        return pl.DataFrame(pa.concat_tables(self._parts))

    def _find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        codes = self._old.find(hashes)
        if self._new.levels:
            rest = np.flatnonzero(codes < 0)
            late = self._new.find(hashes[rest])
            codes[rest] = np.where(late < 0, late, late + np.int32(len(self._old.hashes)))
        return codes

    def _learn(
        self, hashes: NDArray[np.uint64], tokens: "pl.DataFrame", rows: NDArray[np.int64]
    ) -> None:
        """Give codes to the hashes of rows of tokens."""
        import polars as pl

        # In the order of their rows: gathered in that of their hashes, texts take five times as
        # long.
        first = np.sort(pl.Series(hashes).arg_unique().to_numpy())
        fresh = hashes[first]
        # As plain Arrow strings: polars' string views would keep the whole batch's text alive.
        self._parts.append(tokens[rows[first]].to_arrow())
        self._size += len(fresh)
        # Two indexes: rebuilding one large index for every few new tokens would be quadratic.
        recent = np.concatenate([self._new.hashes, fresh])
        if len(recent) * 4 > len(self._old.hashes):
            self._old = HashIndex(np.concatenate([self._old.hashes, recent]))
            recent = recent[:0]
        self._new = HashIndex(recent)


LONGEST_ID = 4096
_DECIMAL = r"^-?\d+\.\d+$"
_WHOLE_DECIMAL = r"^(-?\d+)\.0+$"
_WHOLE = r"^-?\d+$"


class _Pattern(NamedTuple):
    """A regular expression, and what every id that it fits has.

    Attributes:
        text: the expression.
        letters: all of them are in the id.
        begins: the id begins with one of them; empty: with anything.
    """

    text: str
    letters: str = ""
    begins: str = ""

    def fitting(self, look: TokenBytes) -> "pl.Series":
        """Return the ids that the expression fits."""
        if not look.have(self.letters):
            return look.tokens.clear()
        tokens = look.tokens
        if self.begins:
            begin = look.begin(self.begins)
            tokens = tokens.filter(begin) if begin.any() else tokens.clear()
        return tokens.filter(tokens.str.contains(self.text))


# Spellings that other ids may have too, and how they differ from those.
_TWINS = {
    _Pattern(_WHOLE_DECIMAL, letters="."): "a fraction of zeros",
    _Pattern(r"^0+(\d+)$", begins="0"): "leading zeros",
}
_SHORTENED = "look like numbers that a spreadsheet has shortened: different ids may have become one"
_QUOTED = r"""^('.+'|".+"|\x{201c}.+\x{201d})$"""
_ODD = {
    _Pattern(r"^-?\d\.\d+[eE]\+\d+$", letters=".+"): f"{_SHORTENED}; export them as text",
    _Pattern(_QUOTED, begins="'\"\u201c"): "hold their quotes; take them away if others have none",
}
# Characters that nobody sees, and that are no white space.
_UNSEEN = "\u200b\u2060\ufeff"
_CONTROL = r"[\p{Cc}\p{Zl}\p{Zp}]"
_MISSING = ("nan", "none", "null", "\\n", "na", "n/a", "<na>", "nil", "nat", "undefined", "#n/a")
_LONGEST_MISSING = max(map(len, _MISSING))
_BEGINS, _ENDS = ({t for word in _MISSING for t in (word[at], word[at].upper())} for at in (0, -1))
_EXAMPLES = 3
# Ids of more words than these are sorted as texts, which takes no longer then.
_SORTED_WORDS = 2


def tidy(tokens: "pl.Series", role: str) -> tuple["pl.Series", list[str]]:
    """Make spellings of one id equal: spaces at its ends, accents, and 12.0 where there is a 12.

    Accents are written in one way (Unicode's NFC), and unseen characters at the ends taken away,
    where ids become equal by that. A decimal without a fraction is a whole number where every
    decimal of the log is one and some other id is written as a whole number; then pandas or Parquet
    have added the fraction.

    Returns:
        The ids, and what was changed, in words.
    """
    if _is_plain(TokenBytes(tokens)):
        return tokens, []
    notes = []
    stripped = tokens.str.strip_chars()
    spaced = tokens.filter(stripped != tokens)
    if len(spaced):
        notes.append(
            f"spaces at the ends of {len(spaced):,} {role} ids taken away ({_few(spaced)})"
        )
    if (stripped.str.len_bytes() != stripped.str.len_chars()).any():
        plain = _plain(stripped)
        if plain.n_unique() < stripped.n_unique():
            odd = stripped.filter(plain != stripped)
            notes.append(
                f"accents and unseen characters of {len(odd):,} {role} ids written in one way "
                f"({_few(odd)})"
            )
            stripped = plain
    whole = stripped.str.extract(_WHOLE_DECIMAL)
    decimals = stripped.str.contains(_DECIMAL)
    if whole.null_count() < len(whole) and whole.filter(decimals).null_count() == 0:
        shortened = whole.zip_with(whole.is_not_null(), stripped)
        if stripped.str.contains(_WHOLE).any() or shortened.n_unique() < stripped.n_unique():
            odd = stripped.filter(whole.is_not_null())
            notes.append(f"fractions of {len(odd):,} {role} ids taken away ({_few(odd)})")
            stripped = shortened
    return stripped, notes


def _plain(tokens: "pl.Series") -> "pl.Series":
    """Write accents in one way, and take away unseen characters at the ends."""
    return tokens.str.normalize("NFC").str.strip_chars(_UNSEEN).str.strip_chars()


def _is_plain(look: TokenBytes) -> bool:
    """Whether there is nothing to make equal: no accents, no ends to take away, no decimals."""
    return look.is_printed_ascii and not look.have(".")


def respellable(look: TokenBytes) -> "pl.Series":
    """Return the ids that :func:`tidy` leaves or changes as the other ids of the log are."""
    tokens = look.tokens
    if _is_plain(look):
        return tokens.clear()
    # Printed ASCII holds no accents and no ends to take away; nearly all ids are of it.
    rare = tokens.filter(tokens.str.contains(f"[^!-~]|{_DECIMAL}"))
    stripped = rare.str.strip_chars()
    return rare.filter(stripped.str.contains(_DECIMAL) | (_plain(stripped) != stripped))


def number_tokens(tokens: "pl.DataFrame") -> tuple["pl.DataFrame", NDArray[np.int32]]:
    """Sort tokens by their columns and make equal ones one.

    Returns:
        The distinct tokens in order, and the place of each row of ``tokens`` in them.
    """
    names = tokens.columns
    order = _ascending(tokens)
    ordered = tokens[order]
    fresh = np.zeros(len(ordered), np.bool_)
    fresh[:1] = True
    for name in names:
        column = ordered[name]
        fresh[1:] |= column.ne_missing(column.shift(1)).to_numpy()[1:]
    ranks = np.empty(len(ordered), np.int32)
    ranks[order] = np.cumsum(fresh, dtype=np.int32) - 1
    return ordered if fresh.all() else ordered.filter(fresh), ranks


def _ascending(tokens: "pl.DataFrame") -> NDArray[np.integer]:
    """Return the rows of tokens in the order of their columns; short ids are sorted as numbers."""
    import polars as pl

    keys = []
    for name in tokens.columns:
        words = TokenBytes(tokens[name]).words(_SORTED_WORDS)
        if words is None:
            return tokens.select(pl.arg_sort_by(*tokens.columns)).to_series().to_numpy()
        keys += words
    return np.argsort(keys[0]) if len(keys) == 1 else np.lexsort(keys[::-1])


def repeated(tokens: "pl.Series") -> "pl.Series":
    """Return the ids that come more than once; their hashes tell that none does."""
    hashes = np.sort(tokens.hash().to_numpy())
    if (hashes[1:] != hashes[:-1]).all():
        return tokens.clear()
    return tokens.filter(tokens.is_duplicated())


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


def missing_as_text(
    look: TokenBytes, count_events: Callable[[], NDArray[np.int64]], role: str
) -> str | None:
    """Describe ids that look like missing values; None where there are none.

    Args:
        look: at distinct ids.
        count_events: counts the events of each, which is done where one looks so.
        role: ``user``, ``item`` or ``domain``.
    """
    tokens = look.tokens
    may_be = (look.lengths <= _LONGEST_MISSING) & look.begin(_BEGINS) & look.end(_ENDS)
    short = np.flatnonzero(may_be)
    rows = short[tokens.gather(short).str.to_lowercase().is_in(_MISSING).to_numpy()]
    if not rows.size:
        return None
    events = count_events()
    listed = ", ".join(f"{tokens[int(row)]!r} ({int(events[row]):,} events)" for row in rows)
    return (
        f"{role} ids that look like missing values count as {role}s: {listed}; remove their lines "
        "if they are missing"
    )


def odd_ids(look: TokenBytes, role: str) -> list[str]:
    """Describe ids that may not be what they were: twins, shortened numbers, quotes.

    Args:
        look: at distinct ids.
        role: ``user``, ``item`` or ``domain``.
    """
    found = []
    for pattern, difference in _TWINS.items():
        longer = pattern.fitting(look)
        if longer.is_empty():
            continue
        shorter = longer.str.extract(pattern.text)
        twins = longer.filter(shorter.is_in(look.tokens.implode()) & (shorter != longer))
        if len(twins):
            found.append(
                f"{len(twins):,} {role} ids differ from others by {difference} only "
                f"({_few(twins)}); write them in one way if they are the same"
            )
    for pattern, state in _ODD.items():
        odd = pattern.fitting(look)
        if len(odd):
            found.append(f"{len(odd):,} {role} ids ({_few(odd)}) {state}")
    return found


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
