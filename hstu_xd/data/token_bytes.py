"""Look at the bytes of ids, all at once: most logs hold no id that needs a second look.

Whether an id of a million holds a point is seen in less than a thousandth of a second. A regular
expression for each id takes many times as long.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

# Printed ASCII but for the space.
_FIRST_PRINTED, _LAST_PRINTED = ord("!"), ord("~")
_WORD, _LONGEST_SKIPPED = 8, 64


class TokenBytes:
    """The UTF-8 bytes of ids, one after the other.

    Args:
        tokens: text without nulls.

    Attributes:
        offsets: (n + 1,) int64, where each id begins in ``data``.
        data: (at least ``offsets[-1]``,) uint8; not empty.
    """

    def __init__(self, tokens: "pl.Series") -> None:
        import polars as pl

        self.tokens = tokens
        # The oldest level is the one that has a buffer of offsets and one of bytes.
        array = tokens.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
        _, offsets, data = array.buffers()
        self.offsets = np.frombuffer(offsets, np.int64)[array.offset :][: len(array) + 1]
        has_data = data is not None and data.size
        self.data = np.frombuffer(data, np.uint8) if has_data else np.zeros(1, np.uint8)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of bytes of each id: (n,)."""
        return np.diff(self.offsets)

    @cached_property
    def is_printed_ascii(self) -> bool:
        """Whether all ids are of printed ASCII characters, and none holds a space."""
        used = self._used
        return not used.size or bool(used.min() >= _FIRST_PRINTED and used.max() <= _LAST_PRINTED)

    def have(self, letters: str) -> bool:
        """Whether each of some ASCII characters is in an id, not all of them in the same."""
        return all((self._used == ord(letter)).any() for letter in letters)

    def begin(self, characters: Iterable[str]) -> NDArray[np.bool_]:
        """Whether each id may begin with one of some characters: its first byte does; (n,)."""
        firsts = self.data.take(self.offsets[:-1], mode="clip")
        return _table({character.encode()[0] for character in characters})[firsts]

    def end(self, characters: Iterable[str]) -> NDArray[np.bool_]:
        """Whether each id may end with one of some characters: its last byte does; (n,)."""
        lasts = self.data.take(self.offsets[1:] - 1, mode="clip")
        return _table({character.encode()[-1] for character in characters})[lasts]

    def words(self, most: int) -> list[NDArray[np.uint64]] | None:
        """Return the ids as numbers of eight bytes, in the order of which the ids are in order.

        What all ids begin with is left out.

        Args:
            most: number of words.

        Returns:
            Words (n,), the first the most significant; None where an id needs more than ``most``,
            or holds characters that may be less than what ends an id.
        """
        begins = self._begins_that_differ()
        width = int((self.offsets[1:] - begins).max(initial=0))
        if width > most * _WORD or not self.is_printed_ascii:
            return None
        padded = np.concatenate([self.data[: self.offsets[-1]], np.zeros(_WORD, np.uint8)])
        at_each = np.ndarray((len(padded) - _WORD + 1,), ">u8", padded.data, strides=(1,))
        found = []
        for start in range(0, max(width, 1), _WORD):
            left = np.clip(self.offsets[1:] - begins - start, 0, _WORD)
            # Not by take, which would copy all of these overlapping numbers first.
            word = at_each[np.minimum(begins + start, len(at_each) - 1)].astype(np.uint64)
            # What follows an id is the next one: all of it is shifted out, in two steps as a shift
            # by 64 bits is none.
            shift = (4 * (_WORD - left)).astype(np.uint64)
            found.append((word >> shift >> shift) << shift << shift)
        return found

    def _begins_that_differ(self) -> NDArray[np.int64]:
        """Return where each id begins but for what all of them begin with."""
        begins, skipped = self.offsets[:-1], 0
        shortest = int(self.lengths.min()) if begins.size else 0
        while skipped < min(shortest, _LONGEST_SKIPPED):
            letters = self.data.take(begins + skipped)
            if (letters != letters[0]).any():
                break
            skipped += 1
        return begins + skipped

    @property
    def _used(self) -> NDArray[np.uint8]:
        return self.data[self.offsets[0] : self.offsets[-1]]


def _table(values: set[int]) -> NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)
    table[list(values)] = True
    return table
