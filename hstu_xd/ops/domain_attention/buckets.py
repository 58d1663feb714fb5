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
from torch.nn.functional import pad

if TYPE_CHECKING:
    from hstu_xd.ops.grouping import DomainGrouping

# Positions that stand for padding: a query before all keys, a key after all queries.
PADDING_QUERY, PADDING_KEY = -(2**29), 2**29
# Launching one more bucket costs about as much as this many query-key pairs (measured on CPU).
_PAIRS_PER_BUCKET = 10_000
# More distinct lengths than this are first rounded up, which bounds the planning time.
_MAX_DISTINCT = 96


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups padded to one size, shortest first. Padding slots hold token ``L``.

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
    query_lengths, key_lengths = (x.lengths.numpy(force=True) for x in (grouping, keys))
    sizes = np.maximum(query_lengths, key_lengths)
    live = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    order = live[np.argsort(sizes[live], kind="stable")]
    buckets = []
    for start, end in pairwise(_cut(sizes[order])):
        groups = order[start:end]
        index = torch.from_numpy(groups).to(grouping.offsets.device)
        key_tokens = _pad(keys, index, int(key_lengths[groups].max()))
        query_tokens, seen_keys = key_tokens, None
        if keys is not grouping:
            query_tokens = _pad(grouping, index, int(query_lengths[groups].max()))
            seen_keys = _seen_keys(grouping, query_tokens, key_tokens)
        buckets.append(
            Bucket(query_tokens, key_tokens, query_lengths[groups], key_lengths[groups], seen_keys)
        )
    return Buckets(buckets)


def _pad(grouping: "DomainGrouping", groups: Tensor, width: int) -> Tensor:
    lengths = grouping.lengths[groups].unsqueeze(1)
    column = torch.arange(width, device=lengths.device)
    padding = column >= lengths
    slot = (grouping.offsets[groups].unsqueeze(1) + column).masked_fill_(padding, 0)
    return grouping.permutation[slot].masked_fill_(padding, grouping.num_tokens)


def _seen_keys(grouping: "DomainGrouping", queries: Tensor, keys: Tensor) -> np.ndarray:
    """(G, m) keys at or before each query; 0 at padding."""
    query_positions = at_tokens(grouping.positions, queries, PADDING_QUERY)
    key_positions = at_tokens(grouping.keys.positions, keys, PADDING_KEY)
    return torch.searchsorted(key_positions, query_positions, right=True).numpy(force=True)


def at_tokens(values: Tensor, tokens: Tensor, padding: int) -> Tensor:
    """Values (L,) of ``tokens``, and ``padding`` at token ``L``."""
    return pad(values, (0, 1), value=padding)[tokens]


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
