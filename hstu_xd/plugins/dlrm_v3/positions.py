"""Positions in the order of events, in the place of upstream's that count back from the request."""

import torch
from generative_recommenders.modules.positional_encoder import HSTUPositionalEncoder
from torch import Tensor

from hstu_xd.plugins.dlrm_v3.domain_groups import RequestLayout

_MINUTE = 60.0


class PositionsInOrder(HSTUPositionalEncoder):
    """Upstream's encoder, of the same parameters, that says of an event what never changes.

    A row's position counts from the oldest event on, and its time is the one since the event before
    it, in upstream's buckets; that of a target is the time since the last event. So neither later
    events nor the time of a request move what layers are given of an event.
    """

    def forward(
        self,
        max_seq_len: int,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor | None,
    ) -> Tensor:
        """Add positions and times to rows: (L, K) -> (L, K); the arguments are upstream's."""
        assert num_targets is not None
        layout = RequestLayout.build(seq_lengths, num_targets, self._contextual_seq_len)
        rows = torch.arange(layout.num_rows, device=seq_offsets.device)
        rows = torch.minimum(rows, layout.first_targets[layout.users])
        places = rows - layout.offsets[layout.users]
        minutes = (seq_timestamps - seq_timestamps[layout.previous]).clamp(min=0) / _MINUTE
        positions, times = self._position_embeddings_weight, self._timestamp_embeddings_weight
        told = positions[places.clamp(max=len(positions) - 1)]
        told = told + times[minutes.sqrt().long().clamp(max=len(times) - 1)]
        return seq_embeddings * self._embedding_dim**0.5 + told.to(seq_embeddings.dtype)
