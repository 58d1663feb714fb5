"""Numbers ids in order of first sight, a batch at a time, faster than a general hash map."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

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
    """

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._size = 0
        self._old = HashIndex(np.empty(0, np.uint64))
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
            self._learn(values[unseen], tokens[unseen])
            codes[unseen] = self._find(values[unseen])
        return codes

    def tokens(self) -> "pl.DataFrame":
        """Return the token columns, row r for code r."""
        import polars as pl
        import pyarrow as pa

        return pl.DataFrame(pa.concat_tables(self._parts))

    def _find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        codes = self._old.find(hashes)
        if self._new.levels:
            rest = np.flatnonzero(codes < 0)
            late = self._new.find(hashes[rest])
            codes[rest] = np.where(late < 0, late, late + np.int32(len(self._old.hashes)))
        return codes

    def _learn(self, hashes: NDArray[np.uint64], tokens: "pl.DataFrame") -> None:
        fresh, first = np.unique(hashes, return_index=True)
        # As plain Arrow strings: polars' string views would keep the whole batch's text alive.
        self._parts.append(tokens[first].to_arrow())
        self._size += len(fresh)
        # Two indexes: rebuilding one large index for every few new tokens would be quadratic.
        recent = np.concatenate([self._new.hashes, fresh])
        if len(recent) * 4 > len(self._old.hashes):
            self._old = HashIndex(np.concatenate([self._old.hashes, recent]))
            recent = recent[:0]
        self._new = HashIndex(recent)
