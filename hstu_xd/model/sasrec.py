"""SASRec's layer: softmax attention and a feed-forward network, each behind a layer norm.

It stands in the place of :class:`hstu_xd.model.encoder.HSTULayer`, so that input, positions, loss,
negatives and evaluation are those of HSTU and only the layers differ.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from hstu_xd.model.asked_rows import AskedRows
from hstu_xd.model.inputs import dropout
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, View
from hstu_xd.ops import domain_attention

_EPS = 1e-8


class SASRecLayer(nn.Module):
    """``h = n + Wo Attn(n, x, x)`` and ``m + W2 relu(W1 m)``, ``n = LN(x)`` and ``m = LN(h)``.

    Queries are made of the normalised input and keys and values of the input itself, as in the
    paper's code; the feed-forward network is as wide as the model. Weights of the attention are not
    dropped.

    Args:
        settings: sizes; ``linear_dropout_rate`` is the dropout after attention and inside the
            feed-forward network.

    Source: arXiv 1808.09781.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        s = self._settings = settings
        width = s.embedding_dim
        self._attention_norm = nn.LayerNorm(width, eps=_EPS)
        self._query = nn.Linear(width, s.num_heads * s.dqk)
        self._key = nn.Linear(width, s.num_heads * s.dqk)
        self._value = nn.Linear(width, s.num_heads * s.dv)
        self._o = nn.Linear(s.num_heads * s.dv, width)
        self._ffn_norm = nn.LayerNorm(width, eps=_EPS)
        self._ffn_in, self._ffn_out = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (each for each in self.children() if isinstance(each, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        rows: EncoderRows,
        views: Sequence[View],
        caches: list[Any] | None = None,
        *,
        asked: AskedRows | None = None,
    ) -> Tensor:
        """Run the layer over the rows of a jagged batch.

        Args:
            x: (L, K) float, or (n, K) of the rows that are given, see :class:`AskedRows`.
            rows: their coordinates, which this layer does not read.
            views: what the heads read.
            caches: has to be None: a serving session refuses softmax.
            asked: the rows whose output is wanted; None: all.

        Returns:
            (L, K) float, or (Q, K) of the rows that are asked for.
        """
        assert caches is None
        normed = self._attention_norm(x if asked is None else asked.take(x))
        hidden = normed + self._drop(self._o(self._attend(normed, x, views, asked)))
        normed = self._ffn_norm(hidden)
        inner = self._drop(relu(self._ffn_in(normed)))
        return normed + self._drop(self._ffn_out(inner))

    def _attend(
        self, normed: Tensor, x: Tensor, views: Sequence[View], asked: AskedRows | None
    ) -> Tensor:
        s = self._settings
        q, k, v = (
            part.unflatten(1, (s.num_heads, -1))
            for part in (self._query(normed), self._key(x), self._value(x))
        )
        outputs = []
        for view in views if asked is None else asked.views:
            # Softmax reads one grouping a view: what would make it several is refused with it.
            (grouping,) = view.groupings
            keys, values = k[:, view.heads], v[:, view.heads]
            if asked is not None:
                keys, values = (asked.memory(grouping, part) for part in (keys, values))
            outputs.append(
                domain_attention(
                    q[:, view.heads],
                    keys,
                    values,
                    grouping,
                    norm_length=s.norm_length,
                    normalization="softmax",
                    impl=s.impl,
                )
            )
        return torch.cat(outputs, dim=1).flatten(1)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, rate=self._settings.linear_dropout_rate, training=self.training)
