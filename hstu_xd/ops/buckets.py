"""Groups of similar length are padded and computed together, so one long run does not pad all.

Where to cut the sorted lengths is a small shortest-path problem: padded pairs against a fixed cost
per bucket (the launches of its kernels).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hstu_xd.grouping import DomainGrouping

# Launching one more bucket costs about as much as this many query-key pairs (measured on CPU).
_PAIRS_PER_BUCKET = 10_000
# More distinct lengths than this are first rounded up, which bounds the planning time.
_MAX_DISTINCT = 96
# Position of a padding key: later than any query.
_NEVER = 2**62


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups padded to one size, shortest first. Padding slots point at token ``L``.

    Attributes:
        query_tokens: (G, m) int64, batch tokens of the queries.
        key_tokens: (G, n) int64, batch tokens of the keys.
        query_positions: (G, m) int64, original positions, rising; -1 at padding, before any key.
        key_positions: (G, n) int64, likewise; at padding later than any query.
        query_lengths: (G,) lengths without padding, in memory of the host.
        key_lengths: (G,) likewise.
        aligned: queries and keys are the same tokens, so that row ``i`` sees columns ``0..i``.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    query_positions: Tensor
    key_positions: Tensor
    query_lengths: np.ndarray
    key_lengths: np.ndarray
    aligned: bool


class Buckets(list[Bucket]):
    """The buckets of a grouping, with what an implementation remembers about them.

    Attributes:
        memo: plans that all layers of a model share, by whatever they depend on.
    """

    def __init__(self, buckets: list[Bucket]) -> None:
        super().__init__(buckets)
        self.memo: dict[tuple[str | int, ...], Any] = {}


def build_buckets(grouping: "DomainGrouping") -> Buckets:
    """Cut the non-empty groups into buckets of similar length, longest last."""
    keys = grouping.keys
    aligned = keys is grouping
    query_lengths, key_lengths = (x.lengths.numpy(force=True) for x in (grouping, keys))
    sizes = np.maximum(query_lengths, key_lengths)
    live = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    order = live[np.argsort(sizes[live], kind="stable")]
    cuts = _cut(sizes[order])
    buckets = []
    for start, end in pairwise(cuts):
        groups = order[start:end]
        index = torch.from_numpy(groups).to(grouping.offsets.device)
        key_tokens, key_positions = _pad(keys, index, int(key_lengths[groups].max()))
        query_tokens, query_positions = key_tokens, key_positions
        if not aligned:
            query_tokens, query_positions = _pad(grouping, index, int(query_lengths[groups].max()))
        buckets.append(
            Bucket(
                query_tokens,
                key_tokens,
                query_positions.masked_fill(query_tokens == grouping.num_tokens, -1),
                key_positions,
                query_lengths[groups],
                key_lengths[groups],
                aligned,
            )
        )
    return Buckets(buckets)


def _pad(grouping: "DomainGrouping", groups: Tensor, width: int) -> tuple[Tensor, Tensor]:
    lengths = grouping.lengths[groups].unsqueeze(1)
    column = torch.arange(width, device=lengths.device)
    padding = column >= lengths
    slot = (grouping.offsets[groups].unsqueeze(1) + column).masked_fill_(padding, 0)
    tokens = grouping.permutation[slot]
    positions = grouping.positions[tokens].masked_fill_(padding, _NEVER)
    return tokens.masked_fill_(padding, grouping.num_tokens), positions


def _cut(sizes: np.ndarray) -> list[int]:
    """Boundaries in the ascending ``sizes`` that minimise padded pairs plus the cost of buckets."""
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
