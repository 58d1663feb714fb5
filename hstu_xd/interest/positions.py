"""Vectors of place and time that events and candidates carry, by goal where that is wanted."""

import torch
from torch import Tensor, nn

GAP_BUCKETS = 40


def gap_buckets(gaps: Tensor) -> Tensor:
    """Put times since an event on a scale of powers of two.

    Args:
        gaps: any shape, int64 seconds, at least 1: an event is strictly before its request.

    Returns:
        The same shape, int64 in 1..40; 0 is the request's own place.

    Example:
        >>> gap_buckets(torch.tensor([1, 2, 3, 86_400]))
        tensor([ 1,  1,  2, 16])
    """
    return torch.log2(gaps.double() + 1).long().clamp(1, GAP_BUCKETS)


class Positions(nn.Module):
    """Tables of places (0 is the candidate's, 1 the first event that was found) and of gaps.

    ``p[g, b] = p[b] + delta[g, b]``, where delta is zero in the beginning: a model with goal-wise
    places starts as the one without. A request of unknown goal, -1, has no delta.

    Args:
        width: of the vectors.
        places: most events.
        goals: number of goals with tables of their own; 0: none.
        rank: whether places count.
        gap: whether times count.
        std: of the tables' beginning.
    """

    def __init__(
        self, width: int, places: int, *, goals: int, rank: bool, gap: bool, std: float
    ) -> None:
        super().__init__()
        self._goals = goals
        self.tables = nn.ParameterDict()
        self.deltas = nn.ParameterDict()
        for name, rows, wanted in (("rank", places + 1, rank), ("gap", GAP_BUCKETS + 1, gap)):
            if wanted:
                self.tables[name] = nn.Parameter(std * torch.randn(rows, width))
                if goals:
                    self.deltas[name] = nn.Parameter(torch.zeros(goals, rows, width))

    def forward(self, vectors: Tensor, buckets: Tensor, goals: Tensor) -> Tensor:
        """Add places to events.

        Args:
            vectors: (N, K, d).
            buckets: (N, K) int64 of :func:`gap_buckets`.
            goals: (N,) int64; -1: unknown.
        """
        # All groups have the same places: no row is looked up for them.
        places = slice(1, vectors.shape[1] + 1)
        return self._add(vectors, {"rank": places, "gap": buckets}, goals)

    def of_targets(self, vectors: Tensor, goals: Tensor) -> Tensor:
        """Add the candidates' own place to them: (N, C, d), (N,) -> (N, C, d)."""
        return self._add(vectors, dict.fromkeys(("rank", "gap"), slice(0, 1)), goals)

    def _add(self, vectors: Tensor, rows: dict[str, slice | Tensor], goals: Tensor) -> Tensor:
        looked_up = False
        for name in ("gap", "rank"):
            if name not in self.tables:
                continue
            table, own, goal = self.tables[name], rows[name], goals.clamp(min=0)
            if isinstance(own, Tensor):
                # What was looked up is nobody else's and takes the sum: the vectors are long.
                vectors, looked_up = nn.functional.embedding(own, table).add_(vectors), True
                goal = goal[:, None]
            else:
                vectors = vectors.add_(table[own]) if looked_up else vectors + table[own]
            if name in self.deltas:
                of_goal = self.deltas[name][goal, own]
                vectors = vectors + of_goal * (goals >= 0)[:, None, None]
        return vectors
