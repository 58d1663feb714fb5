"""Requests as tensors: candidates in a row a request, with the events that are read for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_xd.data.requests import RequestSet
from hstu_xd.interest.positions import gap_buckets
from hstu_xd.ranking.histories import HistoryIndex, Questions
from hstu_xd.ranking.settings import RankingSettings


class Histories(NamedTuple):
    """Events before each of R requests, oldest first, end to end.

    Attributes:
        items: (L,) int64 item ids.
        gaps: (L,) int64 seconds to the request, above 0.
        offsets: (R + 1,) int64.
        padded_length: events of every request where padding, item 0, was kept at its end; else
            None.
    """

    items: Tensor
    gaps: Tensor
    offsets: Tensor
    padded_length: int | None = None

    @classmethod
    def with_padding(cls, items: Tensor, gaps: Tensor) -> "Histories":
        """Keep the padding of (R, L) right-padded events: all sizes follow from shapes alone."""
        requests, columns = items.shape
        offsets = torch.arange(requests + 1) * columns
        return cls(items.flatten(), gaps.flatten(), offsets, columns)

    @property
    def lengths(self) -> Tensor:
        """Return how many events each request has: (R,) int64."""
        if self.padded_length is None:
            return self.offsets.diff()
        return (self.items.view(-1, self.padded_length) > 0).sum(1)

    @property
    def latest(self) -> Tensor:
        """Return the latest event of each request, -1 without events: (R,) int64."""
        lengths = self.lengths
        return torch.where(lengths > 0, self.offsets[:-1] + lengths - 1, -1)


@dataclass(frozen=True)
class RequestBatch:
    """R requests of up to C candidates. Events are found for N = R groups, or for N = R C.

    Attributes:
        candidates: (R, C) int64 item ids; 0 pads.
        labels: (R, C) float32.
        goals: (R,) int64.
        counts: (R, C, W) float32; W is 0 where counts are not asked for.
        events: (N, K) int64 item ids; 0 pads.
        buckets: (N, K) int64 of :func:`hstu_xd.interest.positions.gap_buckets`.
        histories: all events, for soft search; None where there is none.
        latest: the latest events, for the domain branch; None where there is none.
    """

    candidates: Tensor
    labels: Tensor
    goals: Tensor
    counts: Tensor
    events: Tensor
    buckets: Tensor
    histories: Histories | None
    latest: Histories | None

    @property
    def mask(self) -> Tensor:
        """(R, C) bool, False for padding."""
        return self.candidates > 0


class RequestData:
    """Makes batches of requests.

    Args:
        index: of the histories.
        requests: of all splits.
        settings: which events are read and whether counts are.

    Raises:
        InputError: the settings name a level that the store does not have.
    """

    def __init__(
        self, index: HistoryIndex, requests: RequestSet, settings: RankingSettings
    ) -> None:
        self._index, self.requests, self._settings = index, requests, settings
        index.levels.searched(settings.search.levels, settings.search.quotas)
        counts = np.diff(requests.offsets)
        request = np.repeat(np.arange(len(counts)), counts)
        self.asked = Questions(
            requests.users[request], requests.candidates, requests.times[request]
        )
        width = len(requests.candidates) if settings.interest.counts else 0
        self._counts = index.counts(Questions(*(column[:width] for column in self.asked)))

    @property
    def counts_width(self) -> int:
        """How many counts a candidate has; 0 where they are not asked for."""
        return self._index.levels.counts_width if self._settings.interest.counts else 0

    def batch(self, chosen: NDArray[np.int64]) -> RequestBatch:
        """Make the batch of some requests.

        Args:
            chosen: (R,) int64 numbers of requests.
        """
        requests, rows = self.requests, self.requests.rows(chosen)
        sizes = np.diff(requests.offsets)[chosen]
        inside = np.arange(sizes.max(initial=0)) < sizes[:, None]
        events, times = self._events(chosen, rows, inside)
        at = requests.times[chosen]
        if len(events) != len(chosen):
            at = np.repeat(at, inside.shape[1])
        gaps = np.maximum(at[:, None] - times, 1)
        return RequestBatch(
            candidates=torch.from_numpy(_laid_out(requests.candidates[rows], inside)),
            labels=torch.from_numpy(_laid_out(requests.labels[rows], inside)),
            goals=torch.from_numpy(requests.goals[chosen]),
            counts=torch.from_numpy(
                _laid_out(self._counts[rows], inside)
                if self.counts_width
                else np.zeros((*inside.shape, 0), np.float32)
            ),
            events=torch.from_numpy(events),
            buckets=gap_buckets(torch.from_numpy(gaps)),
            histories=self._histories(chosen) if self._settings.search.soft != "none" else None,
            latest=self._histories(chosen, most) if (most := self._settings.latest) else None,
        )

    def _histories(self, chosen: NDArray[np.int64], most: int | None = None) -> Histories:
        """Read the events before some requests, all of them or the latest."""
        at = self.requests.times[chosen]
        events, offsets = self._index.before(self.requests.users[chosen], at, most)
        items, times = self._index.read(events)
        gaps = np.repeat(at, np.diff(offsets)) - times
        given, before, ends = map(torch.from_numpy, (items, gaps, offsets))
        return Histories(given, before, ends)

    def _events(
        self, chosen: NDArray[np.int64], rows: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the events that are read: item ids and times, (N, K) each."""
        search, requests = self._settings.search, self.requests
        if self._settings.interest.kind == "none":
            nothing = np.zeros((len(chosen), 0), np.int64)
            return nothing, nothing
        if search.kind == "recent":
            users, times = requests.users[chosen], requests.times[chosen]
            return self._index.read(
                self._index.recent(Questions(users, np.zeros_like(users), times), search.k)
            )
        found = self._index.hard(
            Questions(*(column[rows] for column in self.asked)),
            search.k,
            levels=search.levels,
            quotas=search.quotas,
            skip_recent=search.skip_recent,
            fill=search.fill,
            within_domain=search.scope == "target_domain",
        )
        whole = np.full((inside.size, search.k), -1, np.int64)
        whole[inside.ravel()] = found
        return self._index.read(whole)


def joined(parts: Sequence[RequestBatch]) -> RequestBatch:
    """Make one batch of several by the same settings, whose histories may be of other indices."""
    width = max(part.candidates.shape[1] for part in parts)
    per_candidate = any(len(part.events) != len(part.candidates) for part in parts)

    def wide(values: Tensor, candidates: int) -> Tensor:
        """Put zeros behind the candidates of each request."""
        padded = values.new_zeros(len(values), width, *values.shape[2:])
        padded[:, :candidates] = values
        return padded

    def of_candidates(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([wide(value, value.shape[1]) for value in values])

    def of_groups(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        if per_candidate:
            shapes = [part.candidates.shape for part in parts]
            values = [
                wide(value.view(*shape, -1), shape[1]).flatten(0, 1)
                for value, shape in zip(values, shapes, strict=True)
            ]
        return torch.cat(values)

    return RequestBatch(
        candidates=of_candidates("candidates"),
        labels=of_candidates("labels"),
        goals=torch.cat([part.goals for part in parts]),
        counts=of_candidates("counts"),
        events=of_groups("events"),
        buckets=of_groups("buckets"),
        histories=_end_to_end([part.histories for part in parts]),
        latest=_end_to_end([part.latest for part in parts]),
    )


def _end_to_end(given: Sequence[Histories | None]) -> Histories | None:
    parts = [part for part in given if part is not None]
    if not parts:
        return None
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return Histories(
        torch.cat([part.items for part in parts]),
        torch.cat([part.gaps for part in parts]),
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    )


def _laid_out(values: NDArray, inside: NDArray[np.bool_]) -> NDArray:
    """Lay values of candidates side by side out in a row a request, zeros behind."""
    whole = np.zeros((*inside.shape, *values.shape[1:]), values.dtype)
    whole[inside] = values
    return whole
