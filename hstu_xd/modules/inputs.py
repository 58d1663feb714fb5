"""Item table and input features, named as upstream names them so that its checkpoints load."""

import math

from torch import Tensor, nn
from torch.nn.functional import dropout


class ItemEmbedding(nn.Module):
    """The table of item vectors: row 0 is padding.

    Args:
        num_items: items ``1..num_items``.
        embedding_dim: model width ``K``.
    """

    def __init__(self, num_items: int, embedding_dim: int) -> None:
        super().__init__()
        self._item_emb = nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)
        nn.init.trunc_normal_(self._item_emb.weight, std=0.02)

    def forward(self, item_ids: Tensor) -> Tensor:
        """(...) int64 -> (..., K) float."""
        return self._item_emb(item_ids)


class PositionalInput(nn.Module):
    """``sqrt(K) e + p``, then dropout: upstream's input features with learned absolute positions.

    Args:
        max_length: the padded length ``N``.
        embedding_dim: model width ``K``.
        dropout_rate: dropout on the sum.
    """

    def __init__(self, max_length: int, embedding_dim: int, dropout_rate: float) -> None:
        super().__init__()
        self._pos_emb = nn.Embedding(max_length, embedding_dim)
        self._dropout_rate = dropout_rate
        nn.init.trunc_normal_(self._pos_emb.weight, std=math.sqrt(1 / embedding_dim))

    def forward(self, items: Tensor, positions: Tensor, extra: Tensor | None) -> Tensor:
        """(..., K) item vectors, (...) int64 positions, (..., K) signals or None -> (..., K)."""
        x = items * math.sqrt(items.shape[-1]) + self._pos_emb(positions)
        if extra is not None:
            x = x + extra
        return dropout(x, p=self._dropout_rate, training=self.training)
