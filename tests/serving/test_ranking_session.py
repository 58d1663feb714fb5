"""A session ranks as evaluation does, whatever came with the store and whatever came later."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu_xd.cli.app import run as run_command
from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.run import TrainedRanker, load_ranker
from hstu_xd.serving.ranking_session import RankingSession, RankRequest

Cli = Callable[..., Any]
START, DAY = 1_600_000_000, 86_400
KINDS = {
    "counts": ("xd_interest.kind = 'none'", "xd_interest.counts = True"),
    "recent": (),
    "hard": ("xd_search.kind = 'hard'", "xd_search.skip_recent = 1"),
    "domain": ("xd_search.kind = 'hard'", "xd_search.scope = 'target_domain'"),
    "soft": ("xd_interest.kind = 'none'", "xd_search.soft = 'decoupled'"),
}


def events() -> list[tuple[str, str, str, int, str]]:
    """Users who take a few of 40 items of two domains every day or two, some twice at once."""
    draw, rows = np.random.default_rng(0), []
    for user in range(12):
        days = np.sort(draw.choice(60, 30, replace=False))
        for day in days.tolist():
            at = START + day * DAY + user
            deal = str(bool(draw.random() < 0.5)).lower()
            rows += [
                (f"u{user}", f"i{item}", f"d{item % 2}", at, deal)
                for item in draw.choice(40, 3, replace=False).tolist()
            ]
    return rows


def run_words(*words: object) -> None:
    assert run_command([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, requests of it, and a run of every kind."""
    folder = tmp_path_factory.mktemp("sessions")
    schema = ["user", "item", "domain", "time", "deal"]
    pl.DataFrame(events(), schema=schema, orient="row").write_parquet(folder / "log.parquet")
    names = [f"i{n}" for n in range(40)]
    types = pl.DataFrame({"item": names, "type": [f"t{n % 5}" for n in range(40)]})
    types.write_parquet(folder / "items.parquet")
    prepare = ["--event-cols", "deal", "--item-features", folder / "items.parquet"]
    run_words(
        *("prepare", folder / "log.parquet", "--out", folder / "store"),
        *(*prepare, "--levels", "type", "--min-user", 1, "--min-item", 1),
    )
    make = ("requests", "--data", folder / "store", "--out", folder / "requests")
    run_words(*make, "--goal", "deal", "--positives", 2, "--negatives", 2, "--min-history", 5)
    for kind, bindings in KINDS.items():
        own = (*bindings, "xd_search.k = 6", "xd_rank.num_epochs = 1", "xd_rank.item_width = 4")
        given = [word for binding in own for word in ("--gin_bindings", binding)]
        out = folder / kind
        run_words("rank", "--data", folder / "requests", "--out", out, *given)
    return folder


@pytest.fixture(params=KINDS)
def trained(folder: Path, request: pytest.FixtureRequest) -> Iterator[TrainedRanker]:
    return load_ranker(folder / request.param)


@pytest.fixture
def session(folder: Path, request: pytest.FixtureRequest, trained: TrainedRanker) -> RankingSession:
    return RankingSession.open(folder / request.node.callspec.params["trained"])


def users_of(store: InteractionStore) -> list[str]:
    names = [f"u{n}" for n in range(12)]
    return sorted(names, key=store.user_index)


def asked_of(trained: TrainedRanker) -> tuple[np.ndarray, list[RankRequest]]:
    requests: RequestSet = trained.task.requests
    store, chosen = trained.task.store, requests.of_split(Split.TEST)
    names, token = users_of(store), store.catalog.token
    return chosen, [
        RankRequest(
            names[requests.users[r]],
            [token(int(i)) for i in requests.candidates[slice(*requests.offsets[r : r + 2])]],
            requests.goal_names[requests.goals[r]],
            int(requests.times[r]),
        )
        for r in chosen
    ]


def test_scores_are_those_of_evaluation(trained: TrainedRanker, session: RankingSession) -> None:
    chosen, requests = asked_of(trained)
    offline = trained.task.scores(trained.model, chosen)
    assert np.concatenate(session.rank(requests)).tolist() == offline.tolist()
    alone = np.concatenate([session.rank([each])[0] for each in requests])
    np.testing.assert_allclose(alone, offline, atol=1e-6)


def test_events_that_come_later_count_as_if_they_were_of_the_log(
    folder: Path, trained: TrainedRanker, request: pytest.FixtureRequest
) -> None:
    """A session of the first half of every history, and of no history of one user, catches up."""
    whole = RankingSession.open(folder / request.node.callspec.params["trained"])
    task, store = trained.task, trained.task.store
    half = InteractionStore(store.path, store.manifest, *_first_halves(store, "u3"))
    session = RankingSession(half, trained.model, HistoryIndex(half), whole.goals, task.settings)
    names = users_of(store)
    cuts = np.diff(half.offsets)
    late = [
        (int(time), name, store.catalog.token(int(item)))
        for user, name in enumerate(names)
        for item, time in list(zip(*store.history(user), strict=True))[cuts[user] :]
    ]
    for time, name, item in sorted(late, key=lambda each: each[0]):
        session.append(name, item, time)
    _, requests = asked_of(trained)
    requests += [RankRequest(name, ["i1", "i7", "i30"], "deal=true") for name in names]
    for mine, wanted in zip(session.rank(requests), whole.rank(requests), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-6)


def _first_halves(store: InteractionStore, without: str) -> tuple[np.ndarray, ...]:
    lengths = np.diff(store.offsets) // 2
    lengths[store.user_index(without)] = 0
    rows = [np.arange(n) + first for n, first in zip(lengths, store.offsets, strict=False)]
    kept = np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return offsets, store.item_ids[kept], store.timestamps[kept]


def test_an_event_counts_from_the_second_after_it(session: RankingSession) -> None:
    at = 1_700_000_000
    ask = [RankRequest("u1", ["i5", "i6"], "deal=false", t) for t in (at, at + 1)]
    before, same = session.rank(ask)
    for _ in range(2):  # one setting leaves out the latest event
        session.append("u1", "i5", at)
    assert session.rank(ask)[0] == before
    assert session.rank(ask)[1] != same
    assert session.latest_time("u1") == at
    now = RankRequest("u1", ["i5", "i6"], "deal=false")
    np.testing.assert_allclose(session.rank([now])[0], session.rank(ask)[1], atol=1e-6)


def test_a_new_user_begins_without_history(session: RankingSession) -> None:
    ask = RankRequest("somebody", ["i5", "i6"], "deal=true", START + 100 * DAY)
    nobody, other = session.rank([ask, RankRequest("else", ["i5", "i6"], "deal=true")])
    assert nobody == pytest.approx(other)
    assert session.latest_time("somebody") is None
    for time in (START, START + 1):  # one setting leaves out the latest event
        session.append("somebody", "i6", time)
    assert session.rank([ask])[0] != pytest.approx(nobody, abs=1e-9)
    assert session.rank([]) == []


@pytest.fixture
def hard(folder: Path) -> RankingSession:
    return RankingSession.open(folder / "hard")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RankRequest("u1", ["i1", "x"], "deal=true"), "unknown item 'x'; take one of the 40 items"),
        (RankRequest("u1", ["i1"], "deal=tru"), "unknown goal 'deal=tru'; the model has deal="),
        (RankRequest("u1", ["i1"]), "no goal is named; the model has deal="),
        (RankRequest("u1", [], "deal=true"), "the request for user 'u1' names no candidates"),
    ],
)
def test_bad_requests_are_named(hard: RankingSession, request_: RankRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hard.rank([request_])


def test_bad_events_change_nothing(hard: RankingSession) -> None:
    ask = [RankRequest("u1", ["i1", "i2"], "deal=true")]
    before = hard.rank(ask)
    with pytest.raises(InputError, match="unknown item 'x'"):
        hard.append("u1", "x", 1_700_000_000)
    with pytest.raises(InputError, match=r"timestamp 5 is before the last event of user 'u1' at"):
        hard.append("u1", "i1", 5)
    assert hard.rank(ask) == before


def test_the_command_line_gives_the_same_scores(
    folder: Path, hard: RankingSession, cli: Cli
) -> None:
    names, at = ["i3", "i9", "i20"], START + 40 * DAY
    (wanted,) = hard.rank([RankRequest("u2", names, "deal=true", at)])
    command = ("score", folder / "hard", "--user", "u2", "--items", ",".join(names))
    said = cli(*command, "--goal", "deal=true", "--at", at, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["user"], found["goal"]) == ("u2", "deal=true")
    assert {row["item"]: row["score"] for row in found["items"]} == dict(zip(names, wanted))
    scores = [row["score"] for row in found["items"]]
    assert scores == sorted(scores, reverse=True)
    lines = cli(*command, "--goal", "deal=true", "--at", at).out.splitlines()
    assert [line.split()[1] for line in lines] == [row["item"] for row in found["items"]]
    said = cli(*command)
    assert (said.code, "no goal is named" in said.err) == (2, True)
    stranger = cli(
        "score", folder / "hard", "--user", "u2 ", "--items", "i3", "--goal", "deal=true"
    )
    assert (stranger.code, "'u2 ' has no events" in stranger.err) == (0, True)


def test_a_retrieval_run_does_not_score(folder: Path, cli: Cli, tmp_path: Path) -> None:
    popular = ("--gin_bindings", "xd_train.baseline = 'popularity'")
    assert cli("train", "--data", folder / "store", "--out", tmp_path / "a", *popular).code == 0
    said = cli("score", tmp_path / "a", "--user", "u1", "--items", "i1")
    wanted = "is a retrieval run, written by hstu-xd train; here a ranking run is needed"
    assert (said.code, wanted in said.err) == (2, True)
