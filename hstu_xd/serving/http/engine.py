"""What a kind of run brings to the service, which is the same for all kinds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Event
from hstu_xd.serving.http.histories import Histories
from hstu_xd.serving.http.jobs import Question, Recommend
from hstu_xd.serving.stores import StateStore

T = TypeVar("T")


class Session(Protocol):
    """States of users, by which questions are answered; one thread at a time uses it.

    A state is of a version of the user's history, and made anew where the log has another one.
    """

    def __len__(self) -> int:
        """Return the number of users whose states are in memory."""
        ...

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all states in memory."""
        ...

    def append(self, events: Sequence[Event]) -> None:
        """Take events that the log is about to take.

        Raises:
            InputError: one of them cannot be; nothing has changed.
            StoreError: the store of states failed.
        """
        ...

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Return the result of every question, or the InputError that says what is wrong with it.

        Raises:
            StoreError: the store of states failed.
        """
        ...

    def forget(self, user: str) -> bool:
        """Drop all that is kept of a user, in the store too; returns whether anything was."""
        ...

    def release(self, users: Iterable[str]) -> None:
        """Let go of states in memory: the next call makes them anew; no store is asked."""
        ...


class Engine(Protocol):
    """A trained run, as the service asks it.

    Attributes:
        kind: of the run, RETRIEVAL or RANKING.
        name: of the run.
        version: of its answers: other weights and settings have another one.
        catalog: of the model.
        prepared: earlier histories, if any.
    """

    kind: str
    name: str
    version: str
    catalog: DomainCatalog
    prepared: InteractionStore | None

    def session(self, histories: Histories | None, store: StateStore | None) -> Session:
        """Make a session.

        Args:
            histories: of the users; None: nobody has one.
            store: where states are kept beyond memory; None: nowhere.
        """
        ...

    def warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
        ...

    def check_replaces(self, old: "Engine") -> None:
        """Refuse to take the place of an engine of the same kind whose clients would be lost.

        Raises:
            InputError: it answers something that this one does not.
        """
        ...


def domains_of(job: Recommend, catalog: DomainCatalog) -> list[int]:
    """Return the ids of the domains that items are wanted of.

    Raises:
        InputError: an unknown one, or more than there are.
    """
    if len(job.domains) > catalog.num_domains:
        raise InputError(
            f"domains has {len(job.domains)} names, and there are {catalog.num_domains} domains; "
            "name each once"
        )
    return [catalog.domain_index(name) for name in job.domains]


def settled(
    questions: Sequence[Question],
    check: Callable[[Question], T],
    answer: Callable[[list[T]], Sequence[Any]],
) -> list[Any]:
    """Answer those questions that nothing is wrong with, all together.

    Args:
        questions: to answer.
        check: translates a question, or raises an InputError.
        answer: what translated questions are answered with, in their order.

    Returns:
        For every question its answer, or the InputError.
    """
    results: list[Any] = [None] * len(questions)
    asked: dict[int, T] = {}
    for place, question in enumerate(questions):
        try:
            asked[place] = check(question)
        except InputError as error:
            results[place] = error
    if asked:
        for place, result in zip(asked, answer([*asked.values()]), strict=True):
            results[place] = result
    return results
