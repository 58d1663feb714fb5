"""A ranking run as the service asks it: chances of given candidates for goals."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RANKING
from hstu_xd.ranking.batches import RequestBatch
from hstu_xd.ranking.run import ServedRanker
from hstu_xd.serving.codec import digest_weights
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http.engine import Engine, settled
from hstu_xd.serving.http.histories import Histories
from hstu_xd.serving.http.jobs import Question, Rank
from hstu_xd.serving.http.settings import StateSettings, shown
from hstu_xd.serving.ranking_session import RankingSession, RankRequest
from hstu_xd.serving.stores import StateStore


class RankingEngine:
    """A run of ``hstu-xd rank``.

    Args:
        name: of the run.
        ranker: the model and what belongs to it.
        prepared: earlier histories, if any.
        states: how much memory histories may take.

    Attributes:
        name, prepared: as given.
        version: of the ranker.
        catalog: of the model.
        goals: names.

    Raises:
        InputError: states are to be kept in a store, or items searched by lists.
    """

    kind = RANKING

    def __init__(
        self,
        name: str,
        ranker: ServedRanker,
        prepared: InteractionStore | None,
        states: StateSettings,
    ) -> None:
        if states.store != "memory":
            raise InputError(
                f"--store {shown(states.store)} with {name}, a ranking run: its states are sorted "
                "histories, which are made of the event log in memory; drop --store"
            )
        if states.retrieval != "exact":
            raise InputError(
                f"--retrieval {states.retrieval} with {name}, a ranking run: it ranks the "
                "candidates of a request and searches no items; drop --retrieval"
            )
        self.name, self.prepared, self._ranker = name, prepared, ranker
        self._max_bytes = states.max_bytes
        self.version, self.catalog = _version(ranker), ranker.catalog
        self.goals = ranker.goals

    @classmethod
    def from_run(
        cls,
        run: Path,
        store: InteractionStore,
        prepared: InteractionStore | None,
        states: StateSettings,
    ) -> "RankingEngine":
        """Load the best ranker of a run.

        Args:
            run: a folder written by ``hstu-xd rank``.
            store: with the items and levels of the run.
            prepared: earlier histories; the store, or none.
            states: of the service.

        Raises:
            InputError: the store does not fit.
        """
        return cls(run.resolve().name, ServedRanker.of(run, store), prepared, states)

    def session(self, histories: Histories | None, store: StateStore | None) -> "RankingJobs":
        """Make a session; there is no store of states."""
        session = RankingSession(
            self._ranker,
            _nothing if histories is None else histories.all_of,
            versions=histories,
            max_bytes=self._max_bytes,
        )
        return RankingJobs(session)

    def warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
        items = [self.catalog.token(int(self.catalog.domain_items[0]))]
        self.session(None, None).answer([Rank("", items, self.goals, None)])

    def check_replaces(self, old: Engine) -> None:
        """Refuse to take the place of a run with other goals.

        Raises:
            InputError: one of its goals is not here.
        """
        assert isinstance(old, RankingEngine)
        for goal in old.goals:
            if goal not in self.goals:
                raise InputError(
                    f"{self.name} has no goal {goal!r}, which {old.name} serves; train with all "
                    "of its goals, or start the service anew"
                )


class RankingJobs:
    """A ranking session, asked in jobs.

    Args:
        session: keeps the states.
    """

    def __init__(self, session: RankingSession) -> None:
        self._session = session

    def __len__(self) -> int:
        return len(self._session)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all histories in memory."""
        return self._session.num_bytes

    def append(self, events: Sequence[Event]) -> None:
        """Take events that the log is about to take."""
        users, items, times = zip(*events, strict=True)
        self._session.append(users, items, times)

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Return the chances of every question by goal, or what is wrong with it."""
        return settled(questions, self._read, self._answers)

    def forget(self, user: str) -> bool:
        """Drop all that is kept of a user."""
        return self._session.forget(user)

    def release(self, users: Iterable[str]) -> None:
        """Let go of histories in memory."""
        self._session.release(users)

    def _read(self, job: Question) -> list[RequestBatch]:
        """Find what is read for every goal.

        Raises:
            InputError: an unknown candidate or goal.
        """
        assert isinstance(job, Rank)
        return [
            self._session.batch(RankRequest(job.user, job.candidates, goal, job.timestamp))
            for goal in job.goals
        ]

    def _answers(self, read: list[list[RequestBatch]]) -> list[list[list[float]]]:
        chances = iter(self._session.chances([batch for each in read for batch in each]))
        return [[next(chances) for _ in each] for each in read]


def _version(ranker: ServedRanker) -> str:
    """Name what answers depend on beside the histories."""
    digest = blake2b(digest_size=16)
    digest.update(repr((ranker.settings.to_gin(), ranker.levels.names, ranker.goals)).encode())
    digest.update(ranker.levels.paths.tobytes())
    digest_weights(digest, ranker.model)
    return digest.hexdigest()


def _nothing(user: str) -> tuple[Sequence[int], Sequence[int]]:
    """Return the history of a user of whom nothing is known."""
    return (), ()
