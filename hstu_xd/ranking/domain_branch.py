"""The domain branch: the latest events through the encoder, read out for each candidate's domain.

A candidate's domain is what the encoder calls the next domain, so that TAPE, DDSR's query and the
target view know it. The events of a request are encoded once; a domain of its candidates is one
more row, a question (:class:`hstu_xd.batch.Questions`), however many candidates it has.
"""

import torch
from torch import Tensor, nn

from hstu_xd.batch import Questions
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.inputs import PositionalInput, next_domain_modules, next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import Events
from hstu_xd.ranking.batches import Histories


class DomainBranch(nn.Module):
    """Encodes the latest events before each request, as :class:`CrossDomainHSTU` encodes histories.

    Its input are the ranker's own vectors of items, projected, so that an event is told by its
    nodes of the taxonomy, too. Times count back from the request: differences alone are read.

    Args:
        width: d, of an item's vector.
        settings: of the encoder.
    """

    def __init__(self, width: int, settings: EncoderSettings) -> None:
        super().__init__()
        inner, rate = settings.embedding_dim, settings.linear_dropout_rate
        self._num_domains = settings.num_domains
        self._project = nn.Linear(width, inner)
        self._input = PositionalInput(settings.norm_length, inner, rate)
        self._tape, self._target_domain_emb = next_domain_modules(settings)
        self._encoder = CrossDomainEncoder(settings)
        self._norm = nn.LayerNorm(inner)
        self._read = nn.Linear(inner, width)

    def forward(
        self, vectors: Tensor, domains: Tensor, latest: Histories, asked_domains: Tensor
    ) -> Tensor:
        """Encode the events of requests and read them for their candidates.

        Args:
            vectors: (L, d) of the events' items.
            domains: (L,) int64, of the events.
            latest: the events.
            asked_domains: (R, C) int64, of the candidates; -1 for padding.

        Returns:
            (R, C, d): the history as each candidate's domain reads it; zeros without events, and
            for padding.
        """
        read = vectors.new_zeros(*asked_domains.shape, vectors.shape[1])
        asked = (asked_domains >= 0) & (latest.offsets.diff() > 0)[:, None]
        if not asked.any():
            return read
        request = torch.arange(len(asked))[:, None].expand_as(asked)[asked]
        pairs = request * self._num_domains + asked_domains[asked]
        pairs, place = pairs.unique(return_inverse=True)
        questions = Questions(
            rows=latest.offsets[1:][pairs // self._num_domains] - 1,
            target_domains=pairs % self._num_domains,
            timestamps=torch.zeros_like(pairs),
        )
        read[asked] = self._read(self._answers(vectors, domains, latest, questions))[place]
        return read

    def _answers(
        self, vectors: Tensor, domains: Tensor, latest: Histories, questions: Questions
    ) -> Tensor:
        """Encode events and questions that are put to them; return the answers, (Q, K)."""
        times, last = -latest.gaps, (latest.offsets[1:] - 1)[latest.offsets.diff() > 0]
        events = Events(
            domains=domains,
            # Nothing reads the last event itself: those that ask are its copies.
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
        return self._norm(self._encoder(x, events, questions=questions)[len(domains) :])
