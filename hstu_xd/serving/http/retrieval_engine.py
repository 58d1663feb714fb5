"""A retrieval run as the service asks it: recommendations and scores of a domain's items."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RETRIEVAL
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Scorer
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http.engine import Engine, domains_of, settled
from hstu_xd.serving.http.histories import Histories
from hstu_xd.serving.http.jobs import Question, Recommend, Score
from hstu_xd.serving.http.settings import StateSettings
from hstu_xd.serving.items import Items
from hstu_xd.serving.requests import Answer, Request
from hstu_xd.serving.retrieval import ItemIndex
from hstu_xd.serving.session import EncoderSession
from hstu_xd.serving.stores import StateStore
from hstu_xd.training.run import load_trained


class RetrievalEngine:
    """A run of ``hstu-xd train``.

    Args:
        name: of the run.
        model: trained, on the CPU.
        window: which events of a history are read; a number: so many latest ones.
        prepared: earlier histories, if any.
        states: where states are kept, and how items are searched.
        scorer: what ranks items; None: dot products.
        exclude_seen: whether items of a user's history are left out, unless a request says.

    Attributes:
        model, name, prepared, exclude_seen: as given.
        window: which events of a history are read.
        version: beginning with the fingerprint of its states.
        catalog: of the model.
        index: the items; all sessions share it: of millions of items it takes long to build.
        items: of the catalogue, by name.
    """

    kind = RETRIEVAL

    def __init__(
        self,
        name: str,
        model: CrossDomainHSTU,
        window: Window | int,
        prepared: InteractionStore | None,
        states: StateSettings,
        *,
        scorer: Scorer | None = None,
        exclude_seen: bool = True,
    ) -> None:
        self.name, self.model, self.prepared = name, model, prepared
        self.window = Window.of(window)
        self.exclude_seen, self._states = exclude_seen, states
        self.catalog: DomainCatalog = model.catalog
        self.items = Items(self.catalog)
        self.index = ItemIndex(model, states.retrieval, scorer)
        self.version = fingerprint(model, window, torch.float32).hex()

    @classmethod
    def from_run(
        cls,
        run: Path,
        prepared: InteractionStore | None,
        states: StateSettings,
        *,
        allow_imports: bool,
    ) -> "RetrievalEngine":
        """Load the best model of a run.

        Raises:
            InputError: not a run folder, or modules that it may not import.
        """
        trained = load_trained(run, allow_imports=allow_imports)
        return cls(
            run.resolve().name,
            trained.model,
            trained.window,
            prepared,
            states,
            scorer=trained.scorer,
            exclude_seen=trained.protocol.exclude_seen,
        )

    def session(self, histories: Histories | None, store: StateStore | None) -> "RetrievalSession":
        """Make a session."""
        encoder = EncoderSession(
            self.model,
            window=self.window,
            max_bytes=self._states.max_bytes,
            history=None if histories is None else histories.all_of,
            store=store,
            versions=histories,
            store_every=self._states.store_every,
            retrieval=self.index,
        )
        return RetrievalSession(self, encoder)

    def warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
        domains = self.catalog.domain_names
        self.session(None, None).answer([Recommend("", domains, None, 1, exclude_seen=False)])

    def check_replaces(self, old: Engine) -> None:
        """Take the place of any: which domains it must have is checked for all kinds of runs."""


class RetrievalSession:
    """An encoder's session, asked in names.

    Args:
        engine: whose session it is.
        encoder: keeps the states.

    Attributes:
        encoder: as given.
    """

    def __init__(self, engine: RetrievalEngine, encoder: EncoderSession) -> None:
        self._engine, self.encoder = engine, encoder

    def __len__(self) -> int:
        return len(self.encoder)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all states in memory."""
        return self.encoder.num_bytes

    def append(self, events: Sequence[Event]) -> None:
        """Take events that the log is about to take."""
        users, names, times = zip(*events, strict=True)
        self.encoder.append(users, [self._engine.items.id_of(name) for name in names], times)

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Return the result of every question, or what is wrong with it."""
        return settled(questions, self._translated, self._answers)

    def forget(self, user: str) -> bool:
        """Drop all that is kept of a user."""
        return self.encoder.forget(user)

    def release(self, users: Iterable[str]) -> None:
        """Let go of states in memory."""
        self.encoder.release(users)

    def _translated(self, job: Question) -> "_Asked":
        """Translate what a client asks for into the ids of the model.

        Raises:
            InputError: a domain or an item that the model does not have.
        """
        engine = self._engine
        catalog = engine.catalog
        if isinstance(job, Score):
            domain = catalog.domain_index(job.domain)
            item_ids = [engine.items.id_in(token, domain) for token in job.items]
            return _Asked(job, Request(job.user, [domain], job.timestamp), item_ids)
        assert isinstance(job, Recommend)
        return _Asked(job, Request(job.user, domains_of(job, catalog), job.timestamp))

    def _answers(self, asked: list["_Asked"]) -> list[Any]:
        answers = self.encoder.answer([each.request for each in asked])
        with torch.inference_mode():
            return [self._result(*pair) for pair in zip(asked, answers, strict=True)]

    def _result(self, asked: "_Asked", answer: Answer) -> list | InputError:
        engine, job, request = self._engine, asked.job, asked.request
        last, at = answer.last_time, request.timestamp
        if last is not None and at is not None and at < last:
            return InputError(
                f"timestamp {at} is before the last event of user {request.user!r} at {last}; ask "
                "for a later time, or leave it out"
            )
        if isinstance(job, Score):
            ids = torch.tensor(asked.item_ids)
            return engine.index.scores_of_one(answer.vectors[0], ids).tolist()
        leave_out = engine.exclude_seen if job.exclude_seen is None else job.exclude_seen
        seen = answer.seen if leave_out else None
        return [
            [
                (engine.catalog.token(item), score)
                for item, score in engine.index.best(vector, domain, job.k, seen)
            ]
            for vector, domain in zip(answer.vectors, request.target_domains)
        ]


@dataclass(frozen=True)
class _Asked:
    """A question in the ids of the model: what the session is asked, and items to be scored."""

    job: Recommend | Score
    request: Request
    item_ids: Sequence[int] = ()
