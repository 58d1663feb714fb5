"""The learned tables of HSTU's relative position and time bias, named as upstream names them."""

import torch
from torch import Tensor, nn

from hstu_xd.ops.relative_bias import RelativeBias

NUM_TIME_BUCKETS = 128


class RelativeBucketedTimeAndPositionBias(nn.Module):
    """Tables over the position difference and the log-bucketed time difference.

    Args:
        max_length: the padded length ``N``; positions run from 0 to ``N - 1``.

    Source: arXiv 2402.17152; parameter names as in generative-recommenders.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._ts_w = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=0.02))
        self._pos_w = nn.Parameter(torch.empty(2 * max_length - 1).normal_(std=0.02))

    def forward(
        self, positions: Tensor, timestamps: Tensor, next_timestamps: Tensor
    ) -> RelativeBias:
        """Tie the tables to a batch's tokens: three (L,) int64 tensors."""
        return RelativeBias(self._pos_w, self._ts_w, positions, timestamps, next_timestamps)
