"""Soft search: the events that a model scores highest for a candidate, with decoupled embeddings.

One set of tables decides what is read (attention), another what it says (representation), as in
DARE (arXiv 2410.02604, from which arXiv 2510.21714 is stated to take its soft search). Controls
differ by ``tables`` alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.search.found import check_count

TABLES = ("decoupled", "shared", "projection", "four")
# Scores of a request that are held at once: candidates x events.
SCORES_AT_ONCE = 1 << 18
# Events of a batch whose embeddings training keeps for the backward pass.
LEARNED_AT_ONCE = 1 << 18
_TIME_BUCKETS = 64


@dataclass(frozen=True)
class Requests:
    """B requests: the candidates of each, and the events before it.

    Attributes:
        events: (L, F) int64, id of every field of every event, oldest first in a request.
        gaps: (L,) int64, above 0: time from the event to its request.
        offsets: (B + 1,) int64, request ``b`` owns events ``offsets[b]:offsets[b + 1]``.
        candidates: (Q, F) int64, id of every field of every candidate.
        candidate_offsets: (B + 1,) int64, request ``b`` owns that slice of the candidates.
    """

    events: Tensor
    gaps: Tensor
    offsets: Tensor
    candidates: Tensor
    candidate_offsets: Tensor

    def parts(self, most: int) -> "list[Requests]":
        """Cut them into parts that have about so many events each, or one request."""
        ends = self.offsets[1:].tolist()
        cuts = [i for i in range(1, len(ends)) if ends[i] // most > ends[i - 1] // most]
        bounds = [0, *cuts, len(ends)]
        return [self._part(first, last) for first, last in pairwise(bounds)]

    def _part(self, first: int, last: int) -> "Requests":
        ends, asked = (x[first : last + 1] for x in (self.offsets, self.candidate_offsets))
        events, candidates = (slice(*x[[0, -1]].tolist()) for x in (ends, asked))
        return Requests(
            self.events[events],
            self.gaps[events],
            ends - ends[0],
            self.candidates[candidates],
            asked - asked[0],
        )

    def slices(self) -> list[tuple[slice, slice]]:
        """Return the slice of events and that of candidates of every request."""
        ends, asked = self.offsets.tolist(), self.candidate_offsets.tolist()
        return [(slice(*ends[i : i + 2]), slice(*asked[i : i + 2])) for i in range(len(ends) - 1)]


class SoftSearch(nn.Module):
    """Search a history by the dot product of embeddings, and read what was found.

    Args:
        sizes: number of ids of each of the F fields.
        width: of a field's representation, r.
        attention_width: of a field's attention embedding, a; with "shared" it is r.
        tables: "decoupled": a set for attention and one for representation; "shared": one for both;
            "projection": one, with a learned projection for attention; "four": both sets once for
            candidates and once for events.
        init_std: standard deviation of new tables. Dot products have to be of order 1 for an item
            to be recognised: 0.1 learns much slower than 0.5.

    Raises:
        InputError: an unknown ``tables``, or an attention width that it has no use for.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int,
        attention_width: int | None = None,
        tables: str = "decoupled",
        init_std: float = 0.5,
    ) -> None:
        super().__init__()
        if tables not in TABLES:
            raise InputError(
                f"tables is {tables!r}; {', '.join(TABLES)} are known{did_you_mean(tables, TABLES)}"
            )
        if tables == "shared" and attention_width not in (None, width):
            raise InputError(
                f"attention_width is {attention_width} with shared tables of width {width}; leave "
                "it out, or choose other tables"
            )
        self.width, self.attention_width = width, attention_width or width
        self.sides = 2 if tables == "four" else 1
        self._projects = tables == "projection"

        self.representation = _tables(sizes, width, self.sides, init_std)
        # Held once: a table under two names cannot be saved.
        self._is_shared = tables in ("shared", "projection")
        if not self._is_shared:
            self.attention = _tables(sizes, self.attention_width, self.sides, init_std)
        if self._projects:
            self.projection = nn.Linear(
                width * len(sizes), self.attention_width * len(sizes), False
            )
        self.times = nn.Embedding(_TIME_BUCKETS, self.attention_width)
        nn.init.normal_(self.times.weight, std=init_std)

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters that are looked up rather than multiplied, each once."""
        projected = set(map(id, self.projection.parameters())) if self._projects else set()
        return [each for each in self.parameters() if id(each) not in projected]

    def attend(self, ids: Tensor, *, is_candidate: bool) -> Tensor:
        """Return attention embeddings of (N, F) ids, whose products are scaled: (N, F a)."""
        tables = self.representation if self._is_shared else self.attention
        embedded = self._embedded(tables, ids, is_candidate)
        embedded = self.projection(embedded) if self._projects else embedded
        return embedded / embedded.shape[1] ** 0.25

    def represent(self, ids: Tensor, *, is_candidate: bool) -> Tensor:
        """Return representations of (N, F) ids: (N, F r)."""
        return self._embedded(self.representation, ids, is_candidate)

    def time_scores(self, gaps: Tensor) -> Tensor:
        """Return what the time from an event to its request adds to its score: (L,)."""
        # A double's exponent: one more than the logarithm to base 2, rounded down.
        buckets = torch.frexp(gaps.double()).exponent.long().clamp(0, _TIME_BUCKETS - 1)
        by_bucket = self.times.weight @ self.times.weight[0] / math.sqrt(self.attention_width)
        return by_bucket[buckets]

    @torch.no_grad()
    def search(self, requests: Requests, k: int, *, chunk: int | None = None) -> Tensor:
        """Find the K events of the highest score for every candidate, exactly.

        All candidates of a request share one pass over its events, chunk by chunk.

        Args:
            requests: what is asked.
            k: how many events to find.
            chunk: events of a chunk; by default what keeps the scores in a processor's cache.

        Returns:
            (Q, K) int64 rows of ``requests.events``, highest score first; -1 pads.

        Raises:
            InputError: ``k`` or ``chunk`` below 1.
        """
        check_count(k)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}; at least one event a chunk is needed")
        found = torch.full((len(requests.candidates), k), -1, device=requests.events.device)
        queries = self.attend(requests.candidates, is_candidate=True)
        for events, asked in requests.slices():
            query = queries[asked]
            size = chunk or max(k, SCORES_AT_ONCE // max(1, len(query)))
            best = query.new_empty(len(query), 0)
            rows = found.new_empty(len(query), 0)
            for start in range(events.start, events.stop, size):
                part = slice(start, min(start + size, events.stop))
                keys = self.attend(requests.events[part], is_candidate=False)
                scores = query @ keys.T + self.time_scores(requests.gaps[part])
                scores, here = scores.topk(min(k, scores.shape[1]), dim=1)
                scores, rows = torch.cat([best, scores], 1), torch.cat([rows, here + start], 1)
                best, kept = scores.topk(min(k, scores.shape[1]), dim=1)
                rows = rows.gather(1, kept)
            found[asked, : rows.shape[1]] = rows
        return found

    @torch.no_grad()
    def search_padded(self, requests: Requests, there: Tensor, k: int) -> Tensor:
        """Compute :meth:`search` by steps whose sizes follow from shapes alone: what is exported.

        All scores are held at once.

        Args:
            requests: what is asked, as many events and as many candidates of each.
            there: (B, N) bool, False for events that are padding.
            k: how many events to find.

        Returns:
            As :meth:`search`.
        """
        users, columns = there.shape
        queries = self.attend(requests.candidates, is_candidate=True)
        keys = self.attend(requests.events, is_candidate=False)
        queries, keys = (x.view(users, -1, x.shape[1]) for x in (queries, keys))
        scores = queries @ keys.mT + self.time_scores(requests.gaps).view(users, 1, columns)
        scores = scores.masked_fill(~there[:, None], -torch.inf)
        # So wide that there are K of them, however few events there are.
        scores, places = nn.functional.pad(scores, (0, k), value=-torch.inf).topk(k)
        rows = places + requests.offsets[:-1, None, None]
        return torch.where(scores > -torch.inf, rows, -1).flatten(0, 1)

    def forward(self, requests: Requests, found: Tensor) -> Tensor:
        """Read the events that were found.

        Args:
            requests: what was asked.
            found: (Q, K) int64 rows of ``requests.events``, -1 pads; of any search.

        Returns:
            (Q, 3 F r): the candidate, the softmax-weighted sum of the events, and their product.
            Gradients reach the attention tables through the weights.
        """
        there, rows = found >= 0, found.clamp(min=0)
        # One event more, which nobody reads, so that padding has one even where no history has.
        flat = nn.functional.pad(requests.events, (0, 0, 0, 1))[rows].flatten(0, 1)
        bias = self.time_scores(nn.functional.pad(requests.gaps, (0, 1)))[rows]
        query = self.attend(requests.candidates, is_candidate=True)
        keys = self.attend(flat, is_candidate=False).view(*found.shape, -1)
        scores = (keys @ query.unsqueeze(2)).squeeze(2) + bias
        weights = _softmax(scores, there)
        values = self.represent(flat, is_candidate=False).view(*found.shape, -1)
        candidates = self.represent(requests.candidates, is_candidate=True)
        return _features(candidates, (weights.unsqueeze(1) @ values).squeeze(1))

    def learn(self, requests: Requests, k: int) -> tuple[Tensor, Tensor]:
        """Read the K events of the highest score, and all of them, in one pass over the events.

        Args:
            requests: what is asked.
            k: how many events to find.

        Returns:
            The features of :meth:`forward` of what :meth:`search` finds, and those over all events,
            for the auxiliary loss: (Q, 3 F r) each.

        Raises:
            InputError: ``k`` below 1.
        """
        check_count(k)
        parts = requests.parts(LEARNED_AT_ONCE)
        if len(parts) == 1:
            return self._learn(requests, k)
        # Of so many events nothing is kept for the backward pass, which computes it again.
        again = partial(checkpoint, self._learn, use_reentrant=False, preserve_rng_state=False)
        of_found, of_all = zip(*(again(part, k) for part in parts), strict=True)
        return torch.cat(of_found), torch.cat(of_all)

    def _learn(self, requests: Requests, k: int) -> tuple[Tensor, Tensor]:
        query = self.attend(requests.candidates, is_candidate=True)
        keys = self.attend(requests.events, is_candidate=False)
        values = self.represent(requests.events, is_candidate=False)
        bias = self.time_scores(requests.gaps)
        events, asked = requests.offsets.diff().tolist(), requests.candidate_offsets.diff().tolist()
        # Each slice of its own would have a gradient of the size of the whole.
        parts = query.split(asked), keys.split(events), bias.split(events), values.split(events)
        of_found, of_all = [], []
        for q, key, b, value in zip(*parts, strict=True):
            scores = q @ key.T + b
            best = scores.detach().topk(min(k, scores.shape[1]), dim=1).indices
            weights = torch.zeros_like(scores).scatter(1, best, _softmax(scores.gather(1, best)))
            of_found.append(weights @ value)
            of_all.append(_softmax(scores) @ value)
        candidates = self.represent(requests.candidates, is_candidate=True)
        return _features(candidates, torch.cat(of_found)), _features(candidates, torch.cat(of_all))

    def _embedded(self, tables: nn.ModuleList, ids: Tensor, is_candidate: bool) -> Tensor:
        side = 0 if is_candidate else self.sides - 1
        fields = (
            cast(nn.ModuleList, copies)[side](column)
            for copies, column in zip(tables, ids.unbind(1))
        )
        return torch.cat(list(fields), 1)


def _features(candidates: Tensor, read: Tensor) -> Tensor:
    return torch.cat([candidates, read, read * candidates], 1)


def _tables(sizes: Sequence[int], width: int, sides: int, std: float) -> nn.ModuleList:
    """Return a list of fields with one table a side."""
    fields = nn.ModuleList()
    for size in sizes:
        copies = nn.ModuleList(nn.Embedding(size, width) for _ in range(sides))
        for table in copies.parameters():
            nn.init.normal_(table, std=std)
        fields.append(copies)
    return fields


def _softmax(scores: Tensor, there: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; all zero where nothing is there."""
    if there is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~there, -torch.inf).softmax(-1)
    return weights.masked_fill(~there, 0)
