"""What the events that a request shows say of each of its candidates, for upstream's embeddings."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.interest import InterestSettings, interest_of
from hstu_xd.interest.positions import gap_buckets

# Of the tables of places and gaps, beside vectors whose numbers have a variance of 1.
_TABLE_STD = 0.5


class CandidateInterest(nn.Module):
    """Reads the events of a request in the light of each candidate: a vector to add to its own.

    Events and candidates are normalised by one layer first: upstream's tables begin so small that
    no likeness between two rows of them would be seen. The last map is zero at first, so that a
    model begins as the one without.

    Args:
        width: of the embeddings, ``E``.
        settings: how events are read; of a kind that candidates meet events by.
        most_events: of a request.
        num_goals: that requests tell of; 0: none.

    Source: after arXiv 2308.08487 (TIN) and 2510.21714; that it is added to upstream's embedding,
    and normalised, is this project's own decision.
    """

    def __init__(
        self, width: int, settings: InterestSettings, *, most_events: int, num_goals: int
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        read = interest_of(
            settings, {"item": width}, places=most_events, goals=max(num_goals, 1), std=_TABLE_STD
        )
        assert read is not None  # the settings were checked
        self.read = read
        self.last = nn.Linear(read.out_features, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        events: Tensor,
        event_times: Tensor,
        num_events: Tensor,
        candidates: Tensor,
        request_times: Tensor,
        num_candidates: Tensor,
        goals: Tensor | None = None,
    ) -> Tensor:
        """Return what is to be added to the candidates' embeddings.

        Args:
            events: (L, E) embeddings of the shown events, oldest first in each of B requests.
            event_times: (L,) int64 seconds.
            num_events: (B,) integers, events of each request.
            candidates: (T, E) embeddings, request by request.
            request_times: (T,) int64, of each candidate's request; that of its first one counts.
            num_candidates: (B,) integers, at least 1 each.
            goals: (B,) int64; None: unknown.

        Returns:
            (T, E); zeros in the beginning.
        """
        shown = _places(num_events, latest_first=True)
        asked = _places(num_candidates, latest_first=False)
        times = _rows_at(request_times, asked[:, :1]) - _rows_at(event_times, shown)
        if goals is None:
            goals = torch.full_like(num_events, -1, dtype=torch.int64)
        found = self.read(
            self.norm(_rows_at(candidates, asked)),
            self.norm(_rows_at(events, shown)),
            shown >= 0,
            gap_buckets(times.clamp(min=1)),
            goals,
        )
        return self.last(found[asked >= 0])


def _places(lengths: Tensor, *, latest_first: bool) -> Tensor:
    """Return the rows of a jagged table as a padded one has them: (B, n) int64, -1 pads.

    Example:
        >>> _places(torch.tensor([2, 0, 1]), latest_first=True).tolist()
        [[1, 0], [-1, -1], [2, -1]]
    """
    lengths = lengths.long()
    column = torch.arange(max(1, int(lengths.max())), device=lengths.device)
    ends = lengths.cumsum(0).unsqueeze(1)
    first = ends - lengths.unsqueeze(1)
    rows = ends - 1 - column if latest_first else first + column
    return rows.masked_fill(column >= lengths.unsqueeze(1), -1)


def _rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Return rows of a table, zeros where a place is -1: (n, ...), (B, m) -> (B, m, ...)."""
    return pad(table, (*(0, 0) * (table.ndim - 1), 0, 1))[places]
