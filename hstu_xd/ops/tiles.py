"""The walk of the eager implementation: tiles of query rows against the keys they may see.

Rows of all heads are gathered once a layer into one flat array in the order of the walk, so that
every tile is a contiguous view of it, and results leave by one gather through the inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.ops.buckets import Bucket, Buckets

# Rows of a query block: half a block of every row's keys is wasted on the causal diagonal.
_BLOCK_ROWS = 32
# Scores of one tile, so that the few tiles alive at once stay in the processor's cache.
_TILE_SCORES = 200_000
# Pairs of a walk whose bias indices may be remembered, 4 bytes each: 128 MiB a batch and view.
_REMEMBERED_PAIRS = 2**25


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of query rows of G groups and all heads, against their leading ``n`` keys.

    Attributes:
        query_tokens: (G, m) int64, batch tokens; token ``L`` is padding.
        key_tokens: (G, n) int64, likewise.
        query_positions: (G, m) int64, -1 at padding.
        key_positions: (G, n) int64, later than any query at padding.
        query_rows: first and stop of the tile in the flat queries, H * G * m rows, heads first.
        key_rows: likewise of these groups' keys, all H * G * width of them.
        width: keys a group has in the flat keys, at least n.
        opens: the first tile to touch its keys, and it touches all of them.
        remembered: what is computed of its pairs may be kept for other layers.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    query_positions: Tensor
    key_positions: Tensor
    query_rows: tuple[int, int]
    key_rows: tuple[int, int]
    width: int
    opens: bool
    remembered: bool

    def visible(self) -> Tensor:
        """(G, m, n) bool: neither later than the query nor padding on either side."""
        return self.key_positions.unsqueeze(1) <= self.query_positions.unsqueeze(2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups G, query rows m, keys n."""
        groups, rows = self.query_tokens.shape
        return groups, rows, self.key_tokens.shape[1]

    def queries(self, flat: Tensor) -> Tensor:
        """(S, d) flat queries, contiguous -> (H * G, m, d), a view."""
        m, d = self.query_tokens.shape[1], flat.shape[1]
        first, stop = self.query_rows
        return flat.as_strided(((stop - first) // m, m, d), (m * d, d, 1), first * d)

    def keys(self, flat: Tensor) -> Tensor:
        """(S, d) flat keys, contiguous -> (H * G, n, d), a view."""
        n, width, d = self.key_tokens.shape[1], self.width, flat.shape[1]
        first, stop = self.key_rows
        return flat.as_strided(((stop - first) // width, n, d), (width * d, d, 1), first * d)


@dataclass(frozen=True, eq=False)
class Side:
    """Where the rows of queries, or of keys, go in the flat order of the walk, and come from.

    Attributes:
        rows: (S,) int64, flat order -> row of the (L * H, d) view; any row at padding.
        slots: (L * H,) int64, the inverse; S for rows that no tile holds.
    """

    rows: Tensor
    slots: Tensor
    heads: int

    @classmethod
    def of(cls, tokens: list[Tensor], num_tokens: int, heads: int) -> "Side":
        """From the tokens (G, m) of each stretch of the flat order."""
        head = torch.arange(heads, device=tokens[0].device).view(-1, 1)
        rows = torch.cat([(x.reshape(1, -1) * heads + head).view(-1) for x in tokens])
        slots = rows.new_full(((num_tokens + 1) * heads,), rows.numel())
        slots[rows] = torch.arange(rows.numel(), device=rows.device)
        spare = num_tokens * heads
        return cls(rows.clamp(max=spare - 1), slots[:spare], heads)

    def gather(self, x: Tensor) -> Tensor:
        """(L, H, d) -> (S, d)."""
        return x.reshape(-1, x.shape[2]).index_select(0, self.rows)

    def zeros(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(S + 1, d) zeros to fill in the flat order, d as of ``x``; the last row stays zero."""
        return x.new_zeros(self.rows.numel() + 1, x.shape[-1], dtype=dtype)

    def scatter(self, flat: Tensor) -> Tensor:
        """(S + 1, d) -> (L, H, d)."""
        return flat.index_select(0, self.slots).view(-1, self.heads, flat.shape[1])


@dataclass(frozen=True, eq=False)
class Walk:
    """All tiles of a batch, for one number of heads."""

    tiles: list[Tile]
    queries: Side
    keys: Side


def walk(buckets: Buckets, num_tokens: int, heads: int) -> Walk:
    """The walk over non-empty ``buckets``, built once a batch."""
    key = ("walk", num_tokens, heads)
    if key not in buckets.memo:
        chunks = [chunk for bucket in buckets for chunk in _chunks(bucket, heads)]
        tiles: list[Tile] = []
        query_start = key_start = pairs = 0
        for chunk in chunks:
            chunk_keys = key_start, key_start + heads * chunk.key_tokens.numel()
            key_start = chunk_keys[1]
            for rows, columns in _blocks(chunk):
                stop = query_start + heads * chunk.query_tokens[:, rows].numel()
                pairs += chunk.query_tokens[:, rows].numel() * columns
                tiles.append(
                    Tile(
                        chunk.query_tokens[:, rows],
                        chunk.key_tokens[:, :columns],
                        chunk.query_positions[:, rows],
                        chunk.key_positions[:, :columns],
                        (query_start, stop),
                        chunk_keys,
                        chunk.key_tokens.shape[1],
                        rows.stop == chunk.query_tokens.shape[1]
                        and columns == chunk.key_tokens.shape[1],
                        pairs <= _REMEMBERED_PAIRS,
                    )
                )
                query_start = stop
        buckets.memo[key] = Walk(
            tiles,
            Side.of([tile.query_tokens for tile in tiles], num_tokens, heads),
            Side.of([chunk.key_tokens for chunk in chunks], num_tokens, heads),
        )
    return buckets.memo[key]


def _chunks(bucket: Bucket, heads: int) -> Iterator[Bucket]:
    """Runs of a bucket's groups, few enough for their tiles to stay small, each padded anew."""
    num_groups, num_rows = bucket.query_tokens.shape
    tile = heads * min(num_rows, _BLOCK_ROWS) * bucket.key_tokens.shape[1]
    step = max(1, _TILE_SCORES // tile)
    for first in range(0, num_groups, step):
        groups = slice(first, first + step)
        m, n = bucket.query_lengths[groups].max(), bucket.key_lengths[groups].max()
        yield Bucket(
            bucket.query_tokens[groups, :m],
            bucket.key_tokens[groups, :n],
            bucket.query_positions[groups, :m],
            bucket.key_positions[groups, :n],
            bucket.query_lengths[groups],
            bucket.key_lengths[groups],
            bucket.aligned,
        )


def _blocks(chunk: Bucket) -> Iterator[tuple[slice, int]]:
    """Blocks of query rows, last first, with the number of leading keys that they may see."""
    num_rows = chunk.query_tokens.shape[1]
    for start in reversed(range(0, num_rows, _BLOCK_ROWS)):
        rows = slice(start, min(start + _BLOCK_ROWS, num_rows))
        columns = rows.stop
        if not chunk.aligned:
            last = chunk.query_positions[:, rows].amax(1, keepdim=True)
            columns = int((chunk.key_positions <= last).sum(1).max())
        if columns:
            yield rows, columns
