"""Edges of the logarithmic time buckets, so that a kernel finds a bucket by comparing integers.

A bucket depends on a difference only through its magnitude as float32, and the bits of positive
floats order like the numbers. So an edge is kept as the bits of the first float32 of a bucket.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hstu_xd.ops.relative_bias import time_bucket

# The last bucket that any int64 reaches: floor(ln(2^63) / 0.301).
LAST_BUCKET = 145
_LARGEST = 2**63 - 1
_BITS_OF_ONE = 0x3F800000


@lru_cache
def bucket_edges(device: torch.device) -> Tensor:
    """(LAST_BUCKET + 2,) int32, bits of the smallest float32 of each bucket or a later one.

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
