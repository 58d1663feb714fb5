"""What attention costs a user of a split: pairs to compute, bytes to keep for the next event."""

from dataclasses import dataclass

import numpy as np

from hstu_xd.data.batches import SequenceData
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.views import EncoderRows
from hstu_xd.ops.grouping import num_pairs

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class AttentionCost:
    """Means over the users of a split.

    Attributes:
        pairs: query-key pairs of one layer and head, averaged over both.
        state_bytes: float32 keys and values, in all layers, of what a next event may read: events,
            or the tokens of closed segments and the events of open ones and of those looked back
            at; and DDSR's states. A serving session keeps these but for the last event's, which
            it computes afresh for every request.
    """

    pairs: float
    state_bytes: float


def attention_cost(
    model: CrossDomainHSTU, data: SequenceData, *, batch_size: int = 256
) -> AttentionCost:
    """Count, without running the model.

    Args:
        model: whose settings count.
        data: the split.
        batch_size: users counted at once.
    """
    s = model.settings
    pairs = rows = 0.0
    for start in range(0, data.users.size, batch_size):
        batch, _ = data.batch(data.users[start : start + batch_size])
        batch = batch.to(model.catalog.item_domains.device)
        laid = model.rows(batch)
        rows += laid.num_readable
        pairs += float(np.mean([_pairs(laid, layer) for layer in range(s.num_blocks)]))
    of_layer = s.num_heads * (s.dqk + s.dv) * _FLOAT_BYTES
    states = s.num_domains * s.states_per_domain * len(s.state_layers)
    kept = rows / data.users.size * s.num_blocks + states
    return AttentionCost(pairs / data.users.size, kept * of_layer)


def _pairs(rows: EncoderRows, layer: int) -> float:
    """Count the pairs of a layer, averaged over its heads."""
    total = sum(
        (view.heads.stop - view.heads.start) * sum(map(num_pairs, view.groupings))
        for view in rows.views(layer)
    )
    return total / rows.settings.num_heads
