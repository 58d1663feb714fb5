"""A ranking run as the service asks it: chances of candidates, and of towers the best items."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RANKING
from hstu_xd.ranking.batches import RequestBatch
from hstu_xd.ranking.run import ServedRanker
from hstu_xd.ranking.towers import TowerRanker
from hstu_xd.serving.codec import digest_weights
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http.engine import Engine, domains_of, settled
from hstu_xd.serving.http.histories import Histories
from hstu_xd.serving.http.jobs import Question, Rank, Recommend
from hstu_xd.serving.http.settings import StateSettings, shown
from hstu_xd.serving.ranking_session import RankingSession, RankRequest
from hstu_xd.serving.stores import StateStore
from hstu_xd.serving.tower_search import BestRequest, FoundHistory, TowerSearch


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
        search: finds the best items, all sessions share it; None: the model is none of towers.

    Raises:
        InputError: states are to be kept in a store, or items searched by lists that are not
            searched at all.
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
        is_towers = isinstance(ranker.model, TowerRanker)
        if states.retrieval != "exact" and not is_towers:
            raise InputError(
                f"--retrieval {states.retrieval} with {name}, a ranking run: it ranks the "
                "candidates of a request and searches no items; drop --retrieval"
            )
        self.name, self.prepared, self._ranker = name, prepared, ranker
        self._max_bytes = states.max_bytes
        self.version, self.catalog = _version(ranker), ranker.catalog
        self.goals = ranker.goals
        self.search = TowerSearch(ranker, states.retrieval) if is_towers else None

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
        return RankingJobs(session, self)

    def warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
        items = [self.catalog.token(int(self.catalog.domain_items[0]))]
        asked: list[Question] = [Rank("", items, self.goals, None)]
        if self.search is not None:
            domains = self.catalog.domain_names
            asked.append(Recommend("", domains, None, 1, exclude_seen=False, goal=self.goals[0]))
        self.session(None, None).answer(asked)

    def check_replaces(self, old: Engine) -> None:
        """Refuse to take the place of a run with other goals, or of towers with something else.

        Raises:
            InputError: one of its goals is not here, or it recommends and this one does not.
        """
        assert isinstance(old, RankingEngine)
        if old.search is not None and self.search is None:
            raise InputError(
                f"{self.name} is none of towers and recommends nothing, as {old.name} does; train "
                "with xd_interest.kind = 'towers', or start the service anew"
            )
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
        engine: whose session it is.
    """

    def __init__(self, session: RankingSession, engine: RankingEngine) -> None:
        self._session, self._engine = session, engine

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
        """Return the answer to every question, or what is wrong with it."""
        return settled(questions, self._read, self._answers)

    def forget(self, user: str) -> bool:
        """Drop all that is kept of a user."""
        return self._session.forget(user)

    def release(self, users: Iterable[str]) -> None:
        """Let go of histories in memory."""
        self._session.release(users)

    def _read(self, job: Question) -> "list[RequestBatch] | _Best":
        """Find what is read: of candidates for every goal.

        Raises:
            InputError: an unknown candidate, domain or goal, or the model recommends nothing.
        """
        if isinstance(job, Recommend):
            return self._best(job)
        assert isinstance(job, Rank)
        return [
            self._session.batch(RankRequest(job.user, job.candidates, goal, job.timestamp))
            for goal in job.goals
        ]

    def _best(self, job: Recommend) -> "_Best":
        if (search := self._engine.search) is None:
            raise InputError(f"{self._engine.name} recommends nothing; ask POST /v1/rank")
        domains = domains_of(job, self._engine.catalog)
        at, seen = job.timestamp, bool(job.exclude_seen)
        request = BestRequest(job.user, job.goal, None, job.k, at, seen)
        return _Best(search, search.read(self._session, request), domains, job.k)

    def _answers(self, read: "list[list[RequestBatch] | _Best]") -> list[Any]:
        asked = [batch for each in read if isinstance(each, list) for batch in each]
        chances = iter(self._session.chances(asked))
        return [
            [next(chances) for _ in each]
            if isinstance(each, list)
            else each.search.by_domain(each.found, each.domains, each.k)
            for each in read
        ]


@dataclass(frozen=True)
class _Best:
    """The best items of some domains are asked for.

    Attributes:
        search: finds them.
        found: what is read.
        domains: ids.
        k: items of a domain.
    """

    search: TowerSearch
    found: FoundHistory
    domains: Sequence[int]
    k: int


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
