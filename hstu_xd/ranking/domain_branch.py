"""The domain branch: the latest events through the encoder, read out for each candidate's domain.

A candidate's domain is what the encoder calls the next domain, so that TAPE, DDSR's query and the
target view know it. The events of a request are encoded once; a domain of its candidates is one
more row, a question (:class:`hstu_xd.batch.Questions`), however many candidates it has.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.batch import Questions
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.inputs import PositionalInput, next_domain_modules, next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import Events
from hstu_xd.ranking.batches import Histories


class Encoded(NamedTuple):
    """What the encoder says of R requests of up to C candidates, as wide as an item's vector.

    Attributes:
        read: (R, C, d) the history as each candidate's domain reads it; zeros without events, and
            for padding.
        states: (R, D, d) what the latest event of each domain left; None where it is not asked for.
        ages: (R, D) int64 seconds from that event to the request; 0: there is none.
    """

    read: Tensor
    states: Tensor | None
    ages: Tensor


class DomainBranch(nn.Module):
    """Encodes the latest events before each request, as :class:`CrossDomainHSTU` encodes histories.

    Its input are the ranker's own vectors of items, projected, so that an event is told by its
    nodes of the taxonomy, too. Times count back from the request: differences alone are read.

    Args:
        width: d, of an item's vector.
        settings: of the encoder.
        states: whether states of the domains are given out.
    """

    def __init__(self, width: int, settings: EncoderSettings, *, states: bool) -> None:
        super().__init__()
        inner, rate = settings.embedding_dim, settings.linear_dropout_rate
        self._num_domains = settings.num_domains
        self._project = nn.Linear(width, inner)
        self._input = PositionalInput(settings.norm_length, inner, rate)
        self._tape, self._target_domain_emb = next_domain_modules(settings)
        self._encoder = CrossDomainEncoder(settings)
        self._norm = nn.LayerNorm(inner)
        self._read = nn.Linear(inner, width)
        self._state = nn.Linear(inner, width) if states else None

    def forward(
        self, vectors: Tensor, domains: Tensor, latest: Histories, asked_domains: Tensor
    ) -> Encoded:
        """Encode the events of requests and read them for their candidates.

        Args:
            vectors: (L, d) of the events' items.
            domains: (L,) int64, of the events; -1 of padding.
            latest: the events.
            asked_domains: (R, C) int64, of the candidates; -1 for padding.
        """
        asked = (asked_domains >= 0) & (latest.lengths > 0)[:, None]
        if latest.padded_length is not None:
            said, answers = self._encoded_padded(vectors, domains, latest, latest.padded_length)
            places = asked_domains.clamp(min=0)
            requests = torch.arange(places.shape[0])[:, None]
            read = self._read(answers)[requests, places] * asked.unsqueeze(-1)
        else:
            questions, place = self._questions(asked_domains, asked, latest.offsets)
            said, answers = self._encoded(vectors, domains, latest, questions)
            read = vectors.new_zeros(*asked.shape, vectors.shape[1])
            read[asked] = self._read(answers)[place]
        rows = _latest_rows(domains, latest.offsets, self._num_domains)
        ages = pad(latest.gaps, (0, 1))[rows]
        if self._state is None:
            return Encoded(read, None, ages)
        return Encoded(read, pad(self._state(said), (0, 0, 0, 1))[rows], ages)

    def _questions(
        self, asked_domains: Tensor, asked: Tensor, offsets: Tensor
    ) -> tuple[Questions, Tensor]:
        """Ask the latest event of each request for every domain of its candidates, once.

        Returns:
            The questions, and the one of each asked candidate.
        """
        request = torch.arange(len(asked))[:, None].expand_as(asked)[asked]
        pairs = request * self._num_domains + asked_domains[asked]
        pairs, place = pairs.unique(return_inverse=True)
        questions = Questions(
            rows=offsets[1:][pairs // self._num_domains] - 1,
            target_domains=pairs % self._num_domains,
            timestamps=torch.zeros_like(pairs),
        )
        return questions, place

    def _encoded(
        self, vectors: Tensor, domains: Tensor, latest: Histories, questions: Questions
    ) -> tuple[Tensor, Tensor]:
        """Encode events and questions: (L, K) and (Q, K)."""
        times, last = -latest.gaps, (latest.offsets[1:] - 1)[latest.offsets.diff() > 0]
        events = Events(
            domains=domains,
            # No question reads the last event itself, of which it is a copy.
            target_domains=domains.roll(-1).index_copy(0, last, domains[last]),
            timestamps=times,
            next_timestamps=times.roll(-1).index_fill(0, last, 0),
            offsets=latest.offsets,
        )

        def entries(values: Tensor) -> Tensor:
            return torch.cat([values, values[questions.rows]])

        signal = next_domain_signal(
            self._tape,
            self._target_domain_emb,
            entries(domains),
            torch.cat([events.target_domains, questions.target_domains]),
        )
        x = self._input(entries(self._project(vectors)), entries(events.positions), signal)
        encoded = self._norm(self._encoder(x, events, questions=questions))
        return encoded[: len(domains)], encoded[len(domains) :]

    def _encoded_padded(
        self, vectors: Tensor, domains: Tensor, latest: Histories, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Encode events by steps whose sizes follow from shapes alone: what is exported.

        No question is put: every request is encoded once for each domain, which its latest event
        is told to be the next. Earlier events read nothing of it.

        Returns:
            (L, K) what events say, the latest one told its own domain; (R, D, K) what the latest
            ones say of every domain.
        """
        shape = latest.offsets.shape[0] - 1, self._num_domains, columns
        last = (latest.lengths - 1).clamp(min=0)

        def spread(values: Tensor) -> Tensor:
            """Repeat what a request's events have, for every domain."""
            values = values.view(shape[0], 1, columns, *values.shape[1:])
            return values.expand(*shape, *values.shape[3:]).flatten(0, 2)

        own, times = domains.clamp(min=0), -latest.gaps
        is_last = (torch.arange(columns) == last[:, None, None]).expand(shape).flatten()
        every = torch.arange(self._num_domains)[:, None].expand(shape).flatten()
        rolled = [values.view(-1, columns).roll(-1, 1).flatten() for values in (own, times)]
        events = Events(
            domains=spread(own),
            target_domains=torch.where(is_last, every, spread(rolled[0])),
            timestamps=spread(times),
            next_timestamps=torch.where(is_last, 0, spread(rolled[1])),
            offsets=torch.arange(shape[0] * shape[1] + 1) * columns,
            padded_length=columns,
        )
        signal = next_domain_signal(
            self._tape, self._target_domain_emb, events.domains, events.target_domains
        )
        x = self._input(spread(self._project(vectors)), events.positions, signal)
        encoded = self._norm(self._encoder(x, events)).view(*shape, -1)
        requests = torch.arange(shape[0])
        said = encoded[requests, own.view(-1, columns)[requests, last]]
        return said.flatten(0, 1), encoded[requests, :, last]


def latest_domains(domains: Tensor, latest: Histories) -> Tensor:
    """Return the domain of the latest event of each request: (R,) int64, -1 without events.

    Args:
        domains: (L,) int64, of the events.
        latest: the events.
    """
    return pad(domains, (0, 1), value=-1)[latest.latest]


def _latest_rows(domains: Tensor, offsets: Tensor, num_domains: int) -> Tensor:
    """Return the latest event of each request in each domain: (R, D) int64, -1 where none is."""
    requests = torch.arange(offsets.shape[0] - 1)
    of_events = requests.repeat_interleave(offsets.diff(), output_size=domains.shape[0])
    nowhere = requests.shape[0] * num_domains  # of padding
    places = torch.where(domains < 0, nowhere, of_events * num_domains + domains)
    rows = torch.full((nowhere + 1,), -1)
    rows = rows.scatter_reduce(0, places, torch.arange(domains.shape[0]), "amax")
    return rows[:-1].view(-1, num_domains)
