"""A session ranks as evaluation does, whatever came with the store and whatever came later."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranking_runs import DAY, KINDS, START, asked_of, make_runs, users_of

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.ranking.run import ServedRanker, TrainedRanker, load_ranker
from hstu_xd.serving.ranking_session import RankingSession, RankRequest, history_of

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("sessions"))


@pytest.fixture(params=KINDS)
def trained(folder: Path, request: pytest.FixtureRequest) -> Iterator[TrainedRanker]:
    return load_ranker(folder / request.param)


@pytest.fixture
def session(folder: Path, request: pytest.FixtureRequest, trained: TrainedRanker) -> RankingSession:
    return RankingSession.open(folder / request.node.callspec.params["trained"])


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
    store = trained.task.store
    half = InteractionStore(store.path, store.manifest, *_first_halves(store, "u3"))
    ranker = ServedRanker.of(folder / request.node.callspec.params["trained"], store)
    session = RankingSession(ranker, history_of(half))
    names = users_of(store)
    cuts = np.diff(half.offsets)
    late = [
        (int(time), name, store.catalog.token(int(item)))
        for user, name in enumerate(names)
        for item, time in list(zip(*store.history(user), strict=True))[cuts[user] :]
    ]
    times, late_users, items = zip(*sorted(late, key=lambda each: each[0]), strict=True)
    session.append(late_users[:40], items[:40], times[:40])
    for event in zip(late_users[40:], items[40:], times[40:], strict=True):
        session.append(*([value] for value in event))
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
        session.append(["u1"], ["i5"], [at])
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
        session.append(["somebody"], ["i6"], [time])
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
        hard.append(["u2", "u1"], ["i1", "x"], [1_700_000_000] * 2)
    with pytest.raises(InputError, match=r"timestamp 5 is before the last event of user 'u1' at"):
        hard.append(["u2", "u1"], ["i1", "i1"], [1_700_000_000, 5])
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
