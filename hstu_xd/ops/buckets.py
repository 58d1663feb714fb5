"""Groups of similar length are padded and computed together, so one long run does not pad all.

Where to cut the sorted lengths is a small shortest-path problem: padded pairs against a fixed cost
per bucket (the launches of its kernels).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hstu_xd.grouping import DomainGrouping

# Launching one more bucket costs about as much as this many query-key pairs (measured on CPU).
_PAIRS_PER_BUCKET = 20_000
# More distinct lengths than this are first rounded up, which bounds the planning time.
_MAX_DISTINCT = 96


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups padded to one size. Padding slots point at token ``L``, one past the last.

    Attributes:
        query_tokens: (G, m) int64, batch tokens of the queries.
        key_tokens: (G, n) int64, batch tokens of the keys.
        query_positions: (G, m) int64, original positions, rising; padding repeats the last one.
        key_positions: (G, n) int64, likewise.
        aligned: queries and keys are the same tokens, so that row ``i`` sees columns ``0..i``.
        memo: what all layers of a model would compute again from tokens and times alone.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    query_positions: Tensor
    key_positions: Tensor
    aligned: bool
    memo: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def key_end(self, row_end: int) -> int:
        """Number of leading key columns that any query before ``row_end`` may see."""
        if self.aligned:
            return row_end
        last = self.query_positions[:, row_end - 1 : row_end]
        return int((self.key_positions <= last).sum(1).max())


def build_buckets(grouping: "DomainGrouping") -> list[Bucket]:
    """Cut the non-empty groups into buckets of similar length, longest last."""
    keys = grouping.keys
    aligned = keys is grouping
    sizes = torch.maximum(grouping.lengths, keys.lengths)
    live = torch.nonzero((grouping.lengths > 0) & (keys.lengths > 0)).squeeze(1)
    if live.numel() == 0:
        return []
    order = live[torch.argsort(sizes[live], stable=True)]
    cuts = _cut(sizes[order].numpy(force=True))
    buckets = []
    for start, end in zip(cuts[:-1], cuts[1:]):
        groups = order[start:end]
        key_tokens, key_positions = _pad(keys, groups)
        query_tokens, query_positions = (
            (key_tokens, key_positions) if aligned else _pad(grouping, groups)
        )
        buckets.append(
            Bucket(query_tokens, key_tokens, query_positions, key_positions, aligned)
        )
    return buckets


def _pad(grouping: "DomainGrouping", groups: Tensor) -> tuple[Tensor, Tensor]:
    lengths = grouping.lengths[groups].unsqueeze(1)
    column = torch.arange(int(lengths.max()), device=lengths.device)
    slot = grouping.offsets[groups].unsqueeze(1) + torch.minimum(column, lengths - 1)
    tokens = grouping.permutation[slot]
    positions = grouping.positions[tokens]
    return tokens.masked_fill(column >= lengths, grouping.num_tokens), positions


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
