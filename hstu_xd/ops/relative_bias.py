"""Relative position and time bias with the semantics of HSTU's research code.

The bias of query ``i`` on key ``j`` is ``position_weights[N - 1 + p_j - p_i]`` plus
``time_weights[bucket(t_{i+1} - t_j)]``, with ``bucket(x) = clamp(floor(ln(max(1, |x|)) / 0.301))``.
Positions and timestamps are those of the original history, whatever the regrouping.

A kernel finds a bucket by comparing integers with the edges of the buckets: a bucket depends on a
difference only through its magnitude as float32, and the bits of positive floats order like the
numbers. So an edge is kept as the bits of the first float32 of a bucket.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hstu_xd.errors import InputError

# Buckets of the time difference above the first, as upstream has them.
NUM_TIME_BUCKETS = 128
# One bucket per factor of exp(0.301), about 1.35, of the time difference (arXiv 2402.17152).
_BUCKET_WIDTH = 0.301


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """The two tables of HSTU's relative bias, with the coordinates of a batch's tokens.

    Attributes:
        position_weights: (2 N - 1,) float, indexed by ``N - 1 + p_key - p_query``.
        time_weights: (num_buckets + 1,) float, indexed by the bucketed time difference.
        positions: (L,) int64, position of each token in its user's history, from 0 to N - 1.
        timestamps: (L,) int64, time of each token, in the log's own unit.
        next_timestamps: (L,) int64, time of the event after each token (the event to predict).

    Raises:
        InputError: coordinates of different lengths or not int64, or a position table of even size.
    """

    position_weights: Tensor
    time_weights: Tensor
    positions: Tensor
    timestamps: Tensor
    next_timestamps: Tensor

    def __post_init__(self) -> None:
        length = self.positions.numel()
        for name in ("positions", "timestamps", "next_timestamps"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (length,) or tensor.dtype != torch.int64:
                raise InputError(
                    f"bias.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"torch.int64 of shape ({length},) is needed, one entry a token"
                )
        if self.position_weights.ndim != 1 or self.position_weights.numel() % 2 != 1:
            raise InputError(
                f"bias.position_weights has shape {tuple(self.position_weights.shape)}; "
                "(2 * N - 1,) is needed for histories of at most N tokens"
            )

    @property
    def max_length(self) -> int:
        """Longest history ``N`` the position table covers."""
        return (self.position_weights.numel() + 1) // 2

    def check_span(self) -> int:
        """Return how far apart the positions of two tokens can be.

        Raises:
            InputError: farther than the position table covers.
        """
        if not self.positions.numel():
            return 0
        span = int(self.positions.max() - self.positions.min())
        if span >= self.max_length:
            raise InputError(
                f"bias.positions span {span + 1} positions; bias.position_weights covers "
                f"{self.max_length}: make the table longer or cut the histories"
            )
        return span

    def position_index(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Find the row of the position table of pairs: (..., m), (..., n) -> (..., m, n) int64."""
        return key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1) + (self.max_length - 1)

    def time_index(self, query_next_times: Tensor, key_times: Tensor) -> Tensor:
        """Find the row of the time table of pairs: (..., m), (..., n) -> (..., m, n) int32."""
        difference = query_next_times.unsqueeze(-1) - key_times.unsqueeze(-2)
        return time_bucket(difference, self.time_weights.numel() - 1)

    def dense(self, query_tokens: Tensor, key_tokens: Tensor) -> Tensor:
        """Look up the bias of pairs of tokens: (..., m), (..., n) int64 -> (..., m, n) float."""
        position = self.position_index(self.positions[query_tokens], self.positions[key_tokens])
        time = self.time_index(self.next_timestamps[query_tokens], self.timestamps[key_tokens])
        return self.position_weights[position] + self.time_weights[time]


def time_bucket(difference: Tensor, num_buckets: int) -> Tensor:
    """Return the logarithmic bucket of time differences, int32 in ``0..num_buckets``, as upstream.

    Upstream takes the logarithm of an int64 in the default float type, float32; so do we, whatever
    the precision of the attention, or buckets would differ at their edges.
    """
    magnitude = difference.to(torch.float32).abs_().clamp_(min=1)
    return magnitude.log_().div_(_BUCKET_WIDTH).int().clamp_(max=num_buckets)


# The last bucket that any int64 reaches: floor(ln(2^63) / 0.301).
LAST_BUCKET = 145
_LARGEST = 2**63 - 1
_BITS_OF_ONE = 0x3F800000


@lru_cache
def bucket_edges(device: torch.device) -> Tensor:
    """Find the smallest float32 of each bucket or a later one: (LAST_BUCKET + 2,) int32, its bits.

    They are found by asking :func:`time_bucket` itself, on the CPU, so that comparing with them
    gives its answer for every int64. The last entry is beyond every float.
    """
    wanted = torch.arange(1, LAST_BUCKET + 1, device="cpu")
    below, reached = torch.ones_like(wanted), torch.full_like(wanted, _LARGEST)
    while bool((reached - below > 1).any()):
        middle = below + (reached - below) // 2
        enough = time_bucket(middle, LAST_BUCKET) >= wanted
        reached = torch.where(enough, middle, reached)
        below = torch.where(enough, below, middle)
    edges = reached.new_full((LAST_BUCKET + 2,), torch.iinfo(torch.int32).max, dtype=torch.int32)
    edges[0] = _BITS_OF_ONE
    edges[1:-1] = reached.to(torch.float32).view(torch.int32)
    return edges.to(device)
