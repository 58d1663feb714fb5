"""Codes of tokens: dense, in order of first sight, the same however the log is cut in batches."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.data.ids import HashIndex, TokenDictionary

words = st.integers(0, (1 << 64) - 1)


@given(st.sets(words, max_size=60), st.lists(words, max_size=20))
def test_index(known: set[int], others: list[int]) -> None:
    hashes = list(known)
    asked = [*hashes[::-1], *others, *hashes]
    found = HashIndex(np.array(hashes, np.uint64)).find(np.array(asked, np.uint64))
    assert found.tolist() == [hashes.index(h) if h in known else -1 for h in asked]


def encode(batches: Sequence[Sequence[str]]) -> tuple[list[str], int]:
    dictionary = TokenDictionary()
    codes: list[int] = []
    for batch in batches:
        tokens = pl.Series("token", batch, dtype=pl.String)
        codes += dictionary.encode(tokens.hash(), tokens.to_frame()).tolist()
    names = dictionary.tokens()["token"].to_list()
    assert sorted(set(codes)) == list(range(len(dictionary)))
    return [names[code] for code in codes], len(dictionary)


@pytest.mark.parametrize("number", [0, 1, 500])
def test_known_tokens_have_the_first_codes(number: int) -> None:
    tokens = pl.Series("token", [f"t{n}" for n in range(1000)])
    known = tokens[:number]
    dictionary = TokenDictionary(known.hash().to_numpy())
    shuffled = tokens.sample(fraction=1, shuffle=True, seed=1)
    for batch in (shuffled[:600], shuffled):
        codes = dictionary.encode(batch.hash(), batch.to_frame())
        names = [*known, *dictionary.tokens()["token"]]
        assert [names[code] for code in codes] == batch.to_list()
    assert len(dictionary) == 1000


@pytest.mark.parametrize("size", [1, 7, 100, 100_000])
def test_codes_name_their_tokens(size: int) -> None:
    draw = np.random.default_rng(0)
    tokens = [f"t{n}" for n in draw.zipf(1.3, 3000) % 2000]
    batches = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    assert encode(batches) == (tokens, len(set(tokens)))
