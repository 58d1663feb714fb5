"""Ids as bytes: what no id holds is never missed, and numbers are in the order of the texts."""

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.data import ids as ids_module
from hstu_xd.data.ids import missing_as_text, number_tokens, odd_ids, respellable, tidy
from hstu_xd.data.token_bytes import TokenBytes

printed = st.text(st.characters(min_codepoint=ord("!"), max_codepoint=ord("~")), max_size=20)
ids = st.one_of(st.text(max_size=12), printed, st.sampled_from(["nan", "NULL", "007", "7", "2.0"]))


def series(tokens: list[str]) -> pl.Series:
    return pl.Series("user", tokens, dtype=pl.String)


@given(st.lists(ids, max_size=20), st.integers(0, 5))
def test_what_ids_hold(tokens: list[str], skipped: int) -> None:
    tokens = tokens[skipped:]
    look = TokenBytes(series(["left out", *tokens])[1:])
    assert look.lengths.tolist() == [len(token.encode()) for token in tokens]
    assert look.is_printed_ascii == all("!" <= letter <= "~" for letter in "".join(tokens))
    for letters in ("", ".", "nan", "0."):
        assert look.have(letters) == (set(letters) <= set("".join(tokens)))
    for characters in ("n0", "\u201c'"):
        begin, end = look.begin(characters), look.end(characters)
        for row, token in enumerate(tokens):
            assert begin[row] or not token.startswith(tuple(characters))
            assert end[row] or not token.endswith(tuple(characters))


@given(st.lists(printed, max_size=20), st.sampled_from(["", "d", "user-", "a" * 70]))
def test_words_are_in_the_order_of_the_ids(tokens: list[str], before: str) -> None:
    tokens = [before + token for token in tokens]
    words = TokenBytes(series(tokens)).words(12)
    assert words is not None
    rows = list(zip(*(word.tolist() for word in words)))
    assert sorted(range(len(rows)), key=rows.__getitem__) == sorted(
        range(len(tokens)), key=tokens.__getitem__
    )


@pytest.mark.parametrize("tokens", [["a" * 17, "b"], ["a b"], ["\u00e9"], ["a", "a\x00"]])
def test_ids_that_are_sorted_as_texts(tokens: list[str]) -> None:
    assert TokenBytes(series(tokens)).words(2) is None


@given(st.lists(st.tuples(st.sampled_from(["a", "ab", "\u00e9"]), ids), min_size=1, max_size=30))
def test_numbers_follow_the_order_of_all_columns(rows: list[tuple[str, str]]) -> None:
    table = pl.DataFrame(rows, {"domain": pl.String, "item": pl.String}, orient="row")
    expected = sorted(set(rows), key=lambda row: tuple(text.encode() for text in row))
    found, ranks = number_tokens(table)
    assert found.rows() == expected
    assert [expected[rank] for rank in ranks.tolist()] == rows


class _EveryLetter(TokenBytes):
    """Ids that may hold anything, so that each is looked at."""

    is_printed_ascii = False  # type: ignore[assignment]

    def have(self, letters: str) -> bool:
        return True

    def begin(self, characters: Any) -> np.ndarray:
        return np.ones(len(self.tokens), np.bool_)

    end = begin


@given(st.lists(ids, min_size=1, max_size=20, unique=True))
def test_what_is_said_of_ids_is_that_of_looking_at_each(tokens: list[str]) -> None:
    def told() -> list:
        text, notes = tidy(series(tokens), "user")
        odd = respellable(TokenBytes(series(tokens)))
        look = ids_module.TokenBytes(series(tokens))
        missing = missing_as_text(look, lambda: np.arange(len(tokens)), "user")
        return [text.to_list(), notes, odd.to_list(), missing, odd_ids(look, "user")]

    found = told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids_module, "TokenBytes", _EveryLetter)
        assert told() == found
