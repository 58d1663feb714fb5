"""The temporal interest network, and stacks of it that cross candidate and history again.

TIN is of arXiv 2308.08487: keys, values and the candidate carry semantic and temporal vectors, and
the interest is multiplied with the candidate. arXiv 2510.21714 states that layers of it stack up to
the fourth order; how is not public, and both forms here are this project's own.
"""

import torch
from torch import Tensor, nn

from hstu_xd.interest.positions import Positions
from hstu_xd.interest.settings import InterestSettings


def target_attention(
    query: Tensor, values: Tensor, mask: Tensor, columns: Tensor | None = None
) -> Tensor:
    """Weigh events by their likeness to each candidate: softmax(<q, v> / sqrt d) v.

    Args:
        query: (N, C, d).
        values: (N, K, d), or (N, C, K, d) where they differ by candidate; keys and values are one.
        mask: (N, K) bool, False for padding.
        columns: of the d that likeness is told by; None: all. What is read is whole.

    Returns:
        (N, C, d); zeros where no event is there.
    """
    asked, keys = query, values
    if columns is not None:
        asked, keys = query[..., columns], values[..., columns]
    if values.dim() == query.dim():
        scores = asked @ keys.transpose(1, 2)
    else:
        scores = (keys @ asked.unsqueeze(-1)).squeeze(-1)
    scores = scores / asked.shape[-1] ** 0.5
    there = mask[:, None]
    weights = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1) * there
    if values.dim() == query.dim():
        return weights @ values
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


class TIN(nn.Module):
    """Reads found events in the light of each candidate.

    With order 1: ``u = attention(q, k)``, result ``[u, u * q, c]``, where q and k are candidate and
    events with their places. Higher orders, as ``form`` says, add ``[u, u * q]`` each:

    - hop: ``q' = LN(q + W (u * q))`` asks the same events again.
    - dense: the events ``v' = LN(v * q) W`` are asked again, order by order.

    Args:
        width: of candidates and events.
        settings: switches.
        places: most events.
        goals: number of goals.
        std: of the tables' beginning.

    Attributes:
        out_features: width of the result.
    """

    def __init__(
        self, width: int, settings: InterestSettings, *, places: int, goals: int, std: float
    ) -> None:
        super().__init__()
        self._settings = settings
        self.positions = Positions(
            width,
            places,
            goals=goals if settings.goal_positions == "additive" else 0,
            rank=settings.rank_encoding,
            gap=settings.gap_encoding,
            std=std,
        )
        above = settings.order - 1
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(above))
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) if settings.norm else nn.Identity() for _ in range(above)
        )
        self.out_features = width * (1 + settings.order * (1 + settings.target_product))

    def forward(
        self, candidates: Tensor, events: Tensor, mask: Tensor, buckets: Tensor, goals: Tensor
    ) -> Tensor:
        """Return what the events say of each candidate.

        Args:
            candidates: (N, C, d).
            events: (N, K, d).
            mask: (N, K) bool, False for padding.
            buckets: (N, K) int64 of :func:`hstu_xd.interest.positions.gap_buckets`.
            goals: (N,) int64; -1: unknown.

        Returns:
            (N, C, out_features).
        """
        query = self.positions.of_targets(candidates, goals)
        values = self.positions(events, buckets, goals)
        parts = []
        for order in range(self._settings.order):
            if order:
                query, values = self._next(order - 1, query, values, parts[-1])
            found = target_attention(query, values, mask)
            parts += [found, found * query]
        if not self._settings.target_product:
            parts = parts[::2]
        return torch.cat([*parts, candidates], -1)

    def _next(
        self, layer: int, query: Tensor, values: Tensor, crossed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return candidate and events as the next order reads them."""
        linear, norm = self.maps[layer], self.norms[layer]
        if self._settings.form == "hop":
            return norm(query + linear(crossed)), values
        if values.dim() == query.dim():
            values = values.unsqueeze(1)
        return query, linear(norm(values * query.unsqueeze(2)))
