"""Bodies of requests and responses, as the OpenAPI description shows them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hstu_xd.serving.http.settings import Limits

# Beyond it a JSON number is not exact in every client.
MAX_TIMESTAMP = 2**53 - 1

User = Annotated[str, Field(min_length=1, max_length=256, examples=["u1"])]
Item = Annotated[str, Field(min_length=1, max_length=1024, examples=["B00X"])]
Domain = Annotated[str, Field(max_length=1024, examples=["books"])]
Goal = Annotated[str, Field(min_length=1, max_length=1024, examples=["deal=true"])]
Timestamp = Annotated[
    int,
    Field(
        strict=True,
        ge=0,
        le=MAX_TIMESTAMP,
        description="Seconds since 1970, as in the prepared store.",
        examples=[1_700_000_000],
    ),
]


Key = Annotated[str, Field(min_length=1, max_length=256, examples=["order-1-line-2"])]


class Body(BaseModel):
    """A request; unknown fields are refused, as they are misspelt ones."""

    model_config = ConfigDict(extra="forbid")


class EventBody(Body):
    """One event."""

    user: User
    item: Item
    timestamp: Timestamp
    id: Annotated[
        Key | None, Field(description="The user's event with this id counts once, ever.")
    ] = None


class RemoveBody(Body):
    """Which event of a user to remove."""

    user: User
    item: Item
    timestamp: Timestamp


class ErrorBody(BaseModel):
    """Why a request was not answered, and how to mend it."""

    error: str


class RefusedEvent(BaseModel):
    """An event that was not taken."""

    index: Annotated[int, Field(description="Its place in the request, from 0.")]
    error: str


class Accepted(BaseModel):
    """How many events are now safe."""

    accepted: int
    repeated: Annotated[
        int, Field(description="Known already, not counted again; left out where it is 0.")
    ] = 0
    refused: Annotated[
        list[RefusedEvent], Field(description="Those not taken; left out where all were.")
    ] = []


class Removed(BaseModel):
    """How often the event was there."""

    removed: int


class Recommendation(BaseModel):
    """An item and its score, a cosine in -1..1; of towers the chance, 0..1, that it is taken."""

    item: str
    score: float


class DomainRecommendations(BaseModel):
    """Items of one domain, best first."""

    domain: str
    items: list[Recommendation]


class Recommendations(BaseModel):
    """Recommendations of the requested domains, in their order."""

    user: str
    recommendations: list[DomainRecommendations]


class Scores(BaseModel):
    """Scores of the requested items, in their order; cosines in -1..1."""

    scores: list[float]


class GoalScores(BaseModel):
    """Chances in 0..1 that the candidates are taken for a goal, in their order."""

    goal: str
    scores: list[float]


class Ranked(BaseModel):
    """What is thought of the candidates of a request."""

    user: str
    goals: list[GoalScores]


class DomainFacts(BaseModel):
    """A domain of the catalogue."""

    name: str
    items: int


class Domains(BaseModel):
    """All domains of the catalogue."""

    domains: list[DomainFacts]


class Users(BaseModel):
    """Names of users, in order."""

    users: list[str]


class HistoryEvent(BaseModel):
    """An event of a user."""

    item: str
    domain: str
    timestamp: int


class UserHistory(BaseModel):
    """A user's last events, oldest first."""

    user: str
    events: list[HistoryEvent]


class Forgotten(BaseModel):
    """Whether anything was known of the user."""

    forgotten: bool


class Health(BaseModel):
    """State of the service.

    The status is "ready", "draining", "failing" (what is written does not reach the disk, or the
    state store refuses) or "failed"; the store is "memory", "ok" or "gone"; writes are "ok" or
    "failing".
    """

    status: str
    model: str
    store: str
    writes: str


class Alive(BaseModel):
    """Whether the process does its work."""

    live: bool


class Ready(BaseModel):
    """Whether requests are to be sent here; the status is that of :class:`Health`."""

    status: str


class SwapBody(Body):
    """Which run is to answer from now on, or to be compared with the one that does."""

    run: Annotated[
        str,
        Field(
            min_length=1,
            max_length=255,
            description="Name of a run folder beside the one that the service was started with.",
            examples=["2026-11-26"],
        ),
    ]
    mode: Annotated[
        Literal["answer", "shadow"],
        Field(
            description="In the shadow it answers the same requests unseen, and /metrics has how "
            "its answers differ, until DELETE /v1/models/shadow, or it is named again to answer."
        ),
    ] = "answer"


class Swapped(BaseModel):
    """The model that answers now, and what has come with it."""

    model: str
    previous: str
    items_left: Annotated[
        int, Field(description="Items that it does not have: their events are skipped.")
    ]
    items_new: int


class Shadowed(BaseModel):
    """The model in the shadow, and what it would bring with it if it answered."""

    shadow: str
    model: Annotated[str, Field(description="That answers.")]
    items_left: int
    items_new: int


class ShadowModel(BaseModel):
    """The model in the shadow."""

    model: str
    state: Annotated[
        Literal["answering", "ended"],
        Field(
            description="Ended where its process has, beside the worker that answers this: its "
            "answers are counted as failed."
        ),
    ]


class Models(BaseModel):
    """The model that answers, and the one that is compared with it."""

    model: str
    shadow: ShadowModel | None


class RequestBodies:
    """Bodies whose bounds are the service's own.

    Args:
        limits: of a request.
    """

    def __init__(self, limits: Limits) -> None:
        class Events(Body):
            """Events of any users, in the order in which they happened; all are taken or none."""

            events: Annotated[list[EventBody], Field(min_length=1, max_length=limits.max_events)]
            partial: Annotated[
                bool,
                Field(strict=True, description="Take the others where some events are refused."),
            ] = False

        class RecommendBody(Body):
            """Who is to be recommended what."""

            user: User
            domains: Annotated[
                list[Domain],
                Field(min_length=1, description="At most as many names as there are domains."),
            ]
            k: Annotated[int, Field(strict=True, ge=1, le=limits.max_k)] = 10
            exclude_seen: Annotated[
                Annotated[bool, Field(strict=True)] | None,
                Field(
                    description="Leave out items that the user has met; by default as the model "
                    "was evaluated."
                ),
            ] = None
            timestamp: Timestamp | None = None

        class BestBody(RecommendBody):
            """Who is to be recommended what, and for which goal."""

            goal: Annotated[
                Goal | None, Field(description="What they are wanted for; by default the only one.")
            ] = None

        class ScoreBody(Body):
            """Items of a domain to score for a user."""

            user: User
            domain: Domain
            items: Annotated[list[Item], Field(min_length=1, max_length=limits.max_items)]
            timestamp: Timestamp | None = None

        class RankBody(Body):
            """Candidates of any domains to rank for a user; they do not see each other."""

            user: User
            candidates: Annotated[list[Item], Field(min_length=1, max_length=limits.max_items)]
            goal: Annotated[
                Goal | None, Field(description="What they are ranked for; by default every goal.")
            ] = None
            timestamp: Annotated[
                Timestamp | None,
                Field(
                    description="Of the request: the history is read strictly before it; by "
                    "default all of it is."
                ),
            ] = None

        self.events, self.recommend, self.score = Events, RecommendBody, ScoreBody
        self.rank, self.best = RankBody, BestBody
