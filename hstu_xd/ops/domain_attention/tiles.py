"""The walk of the eager implementation: tiles of query rows against the keys they may see.

Rows of all heads are gathered once a layer into one flat array in the order of the walk, so that
every tile is a contiguous view of it, and results leave by one gather through the inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.ops.domain_attention.buckets import Bucket, Buckets

# Rows of a query block: half a block of every row's keys is wasted on the causal diagonal.
_BLOCK_ROWS = 48
# Scores of one tile: the work that one round of operator calls is spent on. Larger tiles fall out
# of the processor's caches.
_TILE_SCORES = 400_000
# Pairs of a walk whose bias indices may be remembered, 4 bytes each: 128 MiB a batch and view.
_REMEMBERED_PAIRS = 2**25


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of query rows of some groups and all heads, against their leading keys.

    Attributes:
        groups: groups G.
        rows: query rows m of each.
        columns: leading keys n that the rows may see.
        width: keys that each group has in the walk, at least n.
        first_query: place of the tile's G * m queries in the walk.
        first_key: place of the groups' G * width keys in the walk.
        opens: the first tile to touch its keys, and it touches all of them.
        remembered: what is computed of its pairs may be kept for other layers.
    """

    groups: int
    rows: int
    columns: int
    width: int
    first_query: int
    first_key: int
    opens: bool
    remembered: bool

    def queries(self, flat: Tensor, heads: int) -> Tensor:
        """(S * H, d) flat queries, contiguous -> (H * G, m, d), a view."""
        shape = heads * self.groups, self.rows, flat.shape[1]
        return _view(flat, shape, self.rows, heads * self.first_query)

    def keys(self, flat: Tensor, heads: int) -> Tensor:
        """(S * H, d) flat keys, contiguous -> (H * G, n, d), a view."""
        shape = heads * self.groups, self.columns, flat.shape[1]
        return _view(flat, shape, self.width, heads * self.first_key)


def _view(flat: Tensor, shape: tuple[int, int, int], height: int, first: int) -> Tensor:
    """Blocks of ``height`` rows from row ``first`` on, cut to ``shape``, in one operation."""
    width = shape[2]
    return flat.as_strided(shape, (height * width, width, 1), first * width)


@dataclass(frozen=True, eq=False)
class Side:
    """The queries, or the keys, of a walk.

    Attributes:
        tokens: (S,) int64, batch tokens in the order of the walk; token ``L`` is padding.
        rows: (S * H,) int64, flat order (stretch by stretch, heads first) -> row of the (L * H, d)
            view; any row at padding.
        slots: (L * H,) int64, the inverse; S * H for rows that the walk never meets.
        heads: heads H.
    """

    tokens: Tensor
    rows: Tensor
    slots: Tensor
    heads: int

    @classmethod
    def of(cls, stretches: list[Tensor], num_tokens: int, heads: int) -> "Side":
        """From the tokens of each stretch (the queries of a tile, the keys of its groups)."""
        tokens = torch.cat([stretch.reshape(-1) for stretch in stretches])
        sizes = np.array([stretch.numel() for stretch in stretches])
        starts = np.cumsum(sizes) - sizes
        # Head h of place p in a stretch of z places from s on: slot s H + h z + p - s.
        place = np.arange(sizes.sum()) + np.repeat(starts * (heads - 1), sizes)
        slot = place + np.arange(heads)[:, None] * np.repeat(sizes, sizes)
        slot = torch.from_numpy(slot).to(tokens.device)
        row = tokens * heads + torch.arange(heads, device=tokens.device).unsqueeze(1)
        spare = num_tokens * heads
        slots = torch.full((spare + heads,), row.numel(), device=tokens.device)
        slots[row] = slot
        rows = torch.empty(row.numel(), dtype=torch.int64, device=tokens.device)
        rows[slot] = row.clamp_(max=spare - 1)
        return cls(tokens, rows, slots[:spare], heads)

    def gather(self, x: Tensor) -> Tensor:
        """(L, H, d) -> (S * H, d)."""
        return x.reshape(-1, x.shape[2]).index_select(0, self.rows)

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """(S * H + 1, d) zeros, to be filled in the flat order; the last row stays zero."""
        return like.new_zeros(self.rows.numel() + 1, like.shape[-1], dtype=dtype)

    def scatter(self, flat: Tensor) -> Tensor:
        """(S * H + 1, d) -> (L, H, d)."""
        return flat.index_select(0, self.slots).view(-1, self.heads, flat.shape[1])


@dataclass(frozen=True, eq=False)
class Walk:
    """All tiles of a batch, for one number of heads."""

    tiles: list[Tile]
    queries: Side
    keys: Side
    heads: int


def walk(buckets: Buckets, num_tokens: int, heads: int) -> Walk | None:
    """The walk over ``buckets``, built once a batch; None where no query sees any key."""
    key = ("walk", num_tokens, heads)
    if key not in buckets.memo:
        buckets.memo[key] = _walk(buckets, num_tokens, heads)
    return buckets.memo[key]


def _walk(buckets: Buckets, num_tokens: int, heads: int) -> Walk | None:
    tiles: list[Tile] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    first_query = first_key = pairs = 0
    for chunk in (chunk for bucket in buckets for chunk in _chunks(bucket, heads)):
        groups, width = chunk.key_tokens.shape
        for block, columns in _blocks(chunk):
            rows = block.stop - block.start
            pairs += groups * rows * columns
            tiles.append(
                Tile(
                    groups,
                    rows,
                    columns,
                    width,
                    first_query,
                    first_key,
                    opens=columns == width and block.stop == chunk.query_tokens.shape[1],
                    remembered=pairs <= _REMEMBERED_PAIRS,
                )
            )
            queries.append(chunk.query_tokens[:, block])
            first_query += groups * rows
        keys.append(chunk.key_tokens)
        first_key += groups * width
    if not tiles:
        return None
    return Walk(tiles, Side.of(queries, num_tokens, heads), Side.of(keys, num_tokens, heads), heads)


def _chunks(bucket: Bucket, heads: int) -> Iterator[Bucket]:
    """Runs of a bucket's groups, few enough for their tiles to stay small, each padded anew."""
    num_groups, num_rows = bucket.query_tokens.shape
    tile = heads * _block_height(num_rows) * bucket.key_tokens.shape[1]
    step = max(1, _TILE_SCORES // tile)
    for first in range(0, num_groups, step):
        groups = slice(first, first + step)
        query_lengths, key_lengths = bucket.query_lengths[groups], bucket.key_lengths[groups]
        yield Bucket(
            bucket.query_tokens[groups, : query_lengths.max()],
            bucket.key_tokens[groups, : key_lengths.max()],
            query_lengths,
            key_lengths,
            None if bucket.seen_keys is None else bucket.seen_keys[groups],
        )


def _blocks(chunk: Bucket) -> Iterator[tuple[slice, int]]:
    """Blocks of query rows, last first, with the number of leading keys that they may see."""
    num_rows = chunk.query_tokens.shape[1]
    height = _block_height(num_rows)
    for start in reversed(range(0, num_rows, height)):
        rows = slice(start, min(start + height, num_rows))
        columns = rows.stop if chunk.seen_keys is None else int(chunk.seen_keys[:, rows].max())
        if columns:
            yield rows, columns


def _block_height(num_rows: int) -> int:
    """Rows of the blocks that ``num_rows`` are cut into: equal ones, no narrow rest."""
    blocks = -(-num_rows // _BLOCK_ROWS)
    return -(-num_rows // blocks)
