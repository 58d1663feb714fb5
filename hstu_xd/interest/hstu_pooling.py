"""HSTU's attention as a control of TIN: no softmax, and a gate where TIN multiplies."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from hstu_xd.interest.positions import Positions
from hstu_xd.interest.settings import InterestSettings

_EPS = 1e-6


class HSTUPooling(nn.Module):
    """Reads events as a layer of HSTU does, without a softmax: the result is ``[o, c]``.

    ``o = W (U(q) * LN(sum_k SiLU(<Q(q), K(k)>) / N V(k)))``, where q and k are candidate and events
    with their places, U, Q, K and V linear maps of the normalised vectors, then SiLU, and N the
    number of places. The candidate is not added, so that a user without events gets zeros.

    Args:
        width: of candidates and events.
        settings: switches.
        places: most events.
        std: of the tables' beginning.

    Attributes:
        out_features: width of the result.

    Source: arXiv 2402.17152.
    """

    def __init__(self, width: int, settings: InterestSettings, *, places: int, std: float) -> None:
        super().__init__()
        self._places = places
        self.positions = Positions(
            width,
            places,
            goals=0,
            rank=settings.rank_encoding,
            gap=settings.gap_encoding,
            std=std,
        )
        self.of_target = nn.Linear(width, 2 * width, bias=False)
        self.of_event = nn.Linear(width, 2 * width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        self.out_features = 2 * width

    def forward(
        self, candidates: Tensor, events: Tensor, mask: Tensor, buckets: Tensor, goals: Tensor
    ) -> Tensor:
        """Return what the events say of each candidate, see :meth:`TIN.forward`."""
        targets = self.positions.of_targets(candidates, goals)
        placed = self.positions(events, buckets, goals)
        gate, query = silu(self.of_target(_normed(targets))).chunk(2, -1)
        keys, values = silu(self.of_event(_normed(placed))).chunk(2, -1)
        weights = silu(query @ keys.transpose(1, 2)) / self._places * mask[:, None]
        return torch.cat([self.last(gate * _normed(weights @ values)), candidates], -1)


def _normed(vectors: Tensor) -> Tensor:
    return layer_norm(vectors, vectors.shape[-1:], eps=_EPS)
