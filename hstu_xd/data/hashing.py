"""Stable 64-bit hashes of ids: the same numbers on every machine, version and numbering."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

WORD = 8
CHUNK = 1 << 20
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer: a bijection of 64-bit integers whose bits look independent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_tokens(tokens: "pl.Series") -> NDArray[np.uint64]:
    """Hash of each id's UTF-8 bytes.

    h = length; for each 8-byte little-endian word w (the last one padded with zeros):
    h = mix((h ^ w) + golden).

    Args:
        tokens: text without nulls.

    Returns:
        (len(tokens),) uint64.
    """
    parts = [_hash_chunk(tokens.slice(at, CHUNK)) for at in range(0, len(tokens), CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _hash_chunk(tokens: "pl.Series") -> NDArray[np.uint64]:
    import pyarrow as pa

    array = tokens.rechunk().to_arrow().cast(pa.large_binary())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    _, offset_buffer, data_buffer = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(offset_buffer, np.int64)[window]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    hashes = lengths.astype(np.uint64)
    within = np.arange(WORD)
    for start in range(0, int(lengths.max(initial=0)), WORD):
        active = np.flatnonzero(lengths > start)
        places = offsets[active, None] + start + within
        inside = places < offsets[active + 1, None]
        letters = np.where(inside, data[np.minimum(places, data.size - 1)], 0).astype(np.uint8)
        words = letters.view("<u8")[:, 0].astype(np.uint64)
        hashes[active] = mix((hashes[active] ^ words) + GOLDEN)
    return hashes


def hash_pairs(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of each (left, right) pair of hashes: mix(mix(left) + golden * right), (n,) uint64."""
    return mix(mix(left) + GOLDEN * right)
