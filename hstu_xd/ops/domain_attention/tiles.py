"""The walk of the eager implementation: tiles of query rows against the keys they may see.

Groups of similar length are padded and computed together, so one long run does not pad all. Where
to cut the sorted lengths is a small shortest-path problem: padded pairs against a fixed cost per
bucket (the launches of its kernels). Buckets then are cut into tiles that fit the caches.

Rows of all heads are gathered once a layer into one flat array in the order of the walk, so that
every tile is a contiguous view of it, and results leave by one gather through the inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from hstu_xd.ops.grouping import DomainGrouping, seen_keys

# Positions that stand for padding: a query before all keys, a key after all queries.
PADDING_QUERY, PADDING_KEY = -(2**29), 2**29
# Launching one more bucket costs about as much as this many query-key pairs (measured on CPU).
_PAIRS_PER_BUCKET = 10_000
# More distinct lengths than this are first rounded up, which bounds the planning time.
_MAX_DISTINCT = 96
# Rows of a query block: half a block of every row's keys is wasted on the causal diagonal.
_BLOCK_ROWS = 48
# Scores of one tile: the work that one round of operator calls is spent on. Larger tiles fall out
# of the processor's caches.
_TILE_SCORES = 400_000
# Pairs of a walk whose bias indices may be remembered, 4 bytes each: 128 MiB a batch and view.
_REMEMBERED_PAIRS = 2**25


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups padded to one size, shortest first. Padding slots hold token ``L``.

    Where some tokens alone are queries, query tokens are places among them.

    Attributes:
        query_tokens: (G, m) int64, batch tokens of the queries.
        key_tokens: (G, n) int64, batch tokens of the keys.
        query_lengths: (G,) lengths without padding, in memory of the host.
        key_lengths: (G,) likewise.
        seen_keys: (G, m) number of leading keys that each query may see, on the host; None where
            queries and keys are the same tokens, so that row ``i`` sees columns ``0..i``.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    query_lengths: np.ndarray
    key_lengths: np.ndarray
    seen_keys: np.ndarray | None


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
        is_first: the first tile to touch its keys, and it touches all of them.
        remembered: what is computed of its pairs may be kept for other layers.
    """

    groups: int
    rows: int
    columns: int
    width: int
    first_query: int
    first_key: int
    is_first: bool
    remembered: bool

    def queries(self, flat: Tensor, heads: int) -> Tensor:
        """View the tile's queries: (S * H, d) flat and contiguous -> (H * G, m, d)."""
        shape = heads * self.groups, self.rows, flat.shape[1]
        return _view(flat, shape, self.rows, heads * self.first_query)

    def keys(self, flat: Tensor, heads: int) -> Tensor:
        """View the tile's keys: (S * H, d) flat and contiguous -> (H * G, n, d)."""
        shape = heads * self.groups, self.columns, flat.shape[1]
        return _view(flat, shape, self.width, heads * self.first_key)


def _view(flat: Tensor, shape: tuple[int, int, int], height: int, first: int) -> Tensor:
    """View blocks of ``height`` rows from row ``first`` on, cut to ``shape``, in one operation."""
    width = shape[2]
    return flat.as_strided(shape, (height * width, width, 1), first * width)


@dataclass(frozen=True, eq=False)
class WalkRows:
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
    def build(cls, stretches: list[Tensor], num_tokens: int, heads: int) -> "WalkRows":
        """Lay out the tokens of each stretch (the queries of a tile, the keys of its groups)."""
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
        """Gather rows into the flat order: (L, H, d) -> (S * H, d)."""
        return x.reshape(-1, x.shape[2]).index_select(0, self.rows)

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (S * H + 1, d) zeros, to be filled in the flat order; the last row stays zero."""
        return like.new_zeros(self.rows.numel() + 1, like.shape[-1], dtype=dtype)

    def scatter(self, flat: Tensor) -> Tensor:
        """Bring rows back into the order of the batch: (S * H + 1, d) -> (L, H, d)."""
        return flat.index_select(0, self.slots).view(-1, self.heads, flat.shape[1])


@dataclass(frozen=True, eq=False)
class Walk:
    """All tiles of a batch, for one number of heads.

    Attributes:
        tiles: in the order in which they are computed.
        queries: rows of the queries.
        keys: rows of the keys.
        heads: heads ``H``.
        memo: what all layers of a model share about the pairs, by whatever it depends on.
    """

    tiles: list[Tile]
    queries: WalkRows
    keys: WalkRows
    heads: int
    memo: dict[tuple[int, ...], Any] = field(default_factory=dict)


# Of every grouping in use, its walks by number of heads: all layers of a model share them.
_walks = WeakIdKeyDictionary()


def walk(grouping: DomainGrouping, heads: int) -> Walk | None:
    """Return the walk over a batch, built once for all layers; None where no query sees a key."""
    known = _walks.setdefault(grouping, {})
    if heads not in known:
        known[heads] = _walk(grouping, heads)
    return known[heads]


def _walk(grouping: DomainGrouping, heads: int) -> Walk | None:
    tiles: list[Tile] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    first_query = first_key = pairs = 0
    for chunk in (chunk for bucket in _buckets(grouping) for chunk in _chunks(bucket, heads)):
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
                    is_first=columns == width and block.stop == chunk.query_tokens.shape[1],
                    remembered=pairs <= _REMEMBERED_PAIRS,
                )
            )
            queries.append(chunk.query_tokens[:, block])
            first_query += groups * rows
        keys.append(chunk.key_tokens)
        first_key += groups * width
    if not tiles:
        return None
    return Walk(
        tiles,
        WalkRows.build(queries, grouping.num_tokens, heads),
        WalkRows.build(keys, grouping.keys.num_tokens, heads),
        heads,
    )


def _chunks(bucket: Bucket, heads: int) -> Iterator[Bucket]:
    """Cut a bucket into runs of groups whose tiles stay small, each padded anew."""
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
    """Cut the query rows into blocks, last first, each with the leading keys that they may see."""
    num_rows = chunk.query_tokens.shape[1]
    height = _block_height(num_rows)
    for start in reversed(range(0, num_rows, height)):
        rows = slice(start, min(start + height, num_rows))
        columns = rows.stop if chunk.seen_keys is None else int(chunk.seen_keys[:, rows].max())
        if columns:
            yield rows, columns


def _block_height(num_rows: int) -> int:
    """Choose the rows of the blocks that ``num_rows`` are cut into: equal, no narrow rest."""
    blocks = -(-num_rows // _BLOCK_ROWS)
    return -(-num_rows // blocks)


def _buckets(grouping: DomainGrouping) -> list[Bucket]:
    """Cut the non-empty groups into buckets of similar length, longest last."""
    keys = grouping.keys
    seen = None if keys is grouping else seen_keys(grouping)
    query_lengths, key_lengths = (x.lengths.numpy(force=True) for x in (grouping, keys))
    sizes = np.maximum(query_lengths, key_lengths)
    live = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    order = live[np.argsort(sizes[live], kind="stable")]
    buckets = []
    for start, end in pairwise(_cut(sizes[order])):
        groups = order[start:end]
        index = torch.from_numpy(groups).to(grouping.offsets.device)
        key_tokens = _pad(keys, index, int(key_lengths[groups].max()))
        query_tokens, prefixes = key_tokens, None
        if seen is not None:
            query_tokens = _pad(grouping, index, int(query_lengths[groups].max()))
            prefixes = at_tokens(seen, query_tokens, 0).numpy(force=True)
        buckets.append(
            Bucket(query_tokens, key_tokens, query_lengths[groups], key_lengths[groups], prefixes)
        )
    return buckets


def _pad(grouping: DomainGrouping, groups: Tensor, width: int) -> Tensor:
    lengths = grouping.lengths[groups].unsqueeze(1)
    column = torch.arange(width, device=lengths.device)
    padding = column >= lengths
    slot = (grouping.offsets[groups].unsqueeze(1) + column).masked_fill_(padding, 0)
    return grouping.permutation[slot].masked_fill_(padding, grouping.num_tokens)


def at_tokens(values: Tensor, tokens: Tensor, padding: int) -> Tensor:
    """Look up values (L,) of ``tokens``, with ``padding`` at token ``L``."""
    return pad(values, (0, 1), value=padding)[tokens]


def _cut(sizes: np.ndarray) -> list[int]:
    """Cut the ascending ``sizes`` where padded pairs plus the cost of buckets are least."""
    distinct = np.unique(sizes)
    if distinct.size > _MAX_DISTINCT:
        kept = np.linspace(0, distinct.size - 1, _MAX_DISTINCT).round().astype(np.int64)
        distinct = distinct[kept]
    ends = np.searchsorted(sizes, distinct, side="right")
    starts = np.concatenate([[0], ends])
    best = np.zeros(distinct.size + 1)
    cut_before = np.zeros(distinct.size + 1, np.int64)
    for i, size in enumerate(distinct):
        padded = (ends[i] - starts[: i + 1]) * float(size) ** 2
        total = best[: i + 1] + padded + _PAIRS_PER_BUCKET
        cut_before[i + 1] = int(total.argmin())
        best[i + 1] = total.min()
    cuts, i = [], distinct.size
    while i > 0:
        cuts.append(int(starts[i]))
        i = int(cut_before[i])
    return [0, *reversed(cuts)]
