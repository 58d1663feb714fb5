"""Towers are searched by an index: what it finds is the best of what ``score`` gives all items."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ranking_runs import DAY, START, make_runs, rank_run
from service_client import Client, serving

from hstu_xd.errors import InputError
from hstu_xd.ranking.run import ServedRanker, open_store
from hstu_xd.serving import retrieval
from hstu_xd.serving.http.settings import LogSettings
from hstu_xd.serving.http.shadow import Shadow
from hstu_xd.serving.ranking_session import RankingSession, RankRequest, history_of
from hstu_xd.serving.tower_search import BestRequest, TowerSearch

Cli = Callable[..., Any]
NOW, GOAL, OTHER = START + 100 * DAY, "deal=true", "deal=false"
EVERY = [f"i{n}" for n in range(40)]
needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None,
    reason="no faiss here: approximate search of towers is NOT covered",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_runs(tmp_path_factory.mktemp("towers"), ["towers", "hard"])
    one_goal = ("xd_interest.kind = 'towers'", "xd_interest.readout = 'layer'")
    rank_run(made / "one", made / "one_goal_requests", one_goal)
    return made


@pytest.fixture
def ranker(folder: Path) -> ServedRanker:
    return ServedRanker.of(folder / "towers", open_store(folder / "towers"))


@pytest.fixture
def session(folder: Path, ranker: ServedRanker) -> RankingSession:
    return RankingSession(ranker, history_of(open_store(folder / "towers")))


def by_scoring(session: RankingSession, request: BestRequest) -> dict[str, float]:
    """The definition: score all items that are allowed."""
    allowed = EVERY
    if request.domain is not None:
        allowed = [name for name in EVERY if f"d{int(name[1:]) % 2}" == request.domain]
    scored = RankRequest(request.user, allowed, request.goal, request.timestamp)
    return dict(zip(allowed, session.rank([scored])[0], strict=True))


def is_best(found: list[tuple[str, float]], scores: dict[str, float], k: int) -> None:
    """Names may change places where scores are the same but for rounding."""
    assert len({name for name, _ in found}) == len(found) == min(k, len(scores))
    wanted = sorted(scores.values(), reverse=True)[:k]
    assert [chance for _, chance in found] == pytest.approx(wanted, abs=1e-6)
    assert [scores[name] for name, _ in found] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("domain", [None, "d0", "d1"])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_best_are_those_of_scoring_all(
    ranker: ServedRanker, session: RankingSession, domain: str | None, k: int
) -> None:
    search = TowerSearch(ranker)
    for user in ("u0", "u5", "nobody"):
        for goal in (GOAL, OTHER):
            for at in (None, START + 30 * DAY, START):
                request = BestRequest(user, goal, domain, k, at)
                is_best(search.best(session, request), by_scoring(session, request), k)


def test_goals_have_lists_of_their_own(ranker: ServedRanker, session: RankingSession) -> None:
    search = TowerSearch(ranker)
    lists = [search.best(session, BestRequest("u3", goal, k=40)) for goal in (GOAL, OTHER)]
    assert [name for name, _ in lists[0]] != [name for name, _ in lists[1]]


def test_events_that_come_later_are_read(ranker: ServedRanker, session: RankingSession) -> None:
    search = TowerSearch(ranker)
    for user in ("u1", "fresh"):
        earlier = BestRequest(user, GOAL, timestamp=NOW)
        before = search.best(session, earlier)
        session.append([user] * 2, ["i3", "i8"], [NOW, NOW])
        request = BestRequest(user, GOAL)
        found = search.best(session, request)
        assert found != before
        is_best(found, by_scoring(session, request), 10)
        assert search.best(session, earlier) == before


def test_seen_items_are_left_out_where_that_is_asked_for(
    ranker: ServedRanker, session: RankingSession, folder: Path
) -> None:
    search, store = TowerSearch(ranker), open_store(folder / "towers")
    at = START + 9 * DAY
    items, times = store.history(store.user_index("u4"))
    seen = {store.catalog.token(int(item)) for item in items[times < at]}
    assert 0 < len(seen) < 40
    request = BestRequest("u4", GOAL, None, 40, at, exclude_seen=True)
    found = search.best(session, request)
    scores = by_scoring(session, request)
    is_best(found, {name: score for name, score in scores.items() if name not in seen}, 40)
    assert not seen & {name for name, _ in found}


@needs_faiss
def test_lists_give_items_with_their_scores(
    ranker: ServedRanker, session: RankingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exactly(*_: Any) -> None:
        raise AssertionError("all items were scored")

    monkeypatch.setattr(retrieval, "_INDEXED_FROM", 10)
    monkeypatch.setattr(retrieval, "_LARGEST_SHARE", 1.0)
    monkeypatch.setattr(retrieval, "_READ", 1.0)
    search = TowerSearch(ranker, "approximate")
    monkeypatch.setattr(retrieval.ItemIndex, "_exactly", exactly)
    for domain in ("d0", None):
        request = BestRequest("u2", GOAL, domain, 6)
        is_best(search.best(session, request), by_scoring(session, request), 6)


def test_what_cannot_be_found_is_named(
    folder: Path, ranker: ServedRanker, session: RankingSession
) -> None:
    search = TowerSearch(ranker)
    for request, message in (
        (BestRequest("u1", GOAL, k=0), "k is 0; ask for at least one item"),
        (BestRequest("u1", GOAL, "d2"), "d2"),
        (BestRequest("u1", "deal=tru"), "unknown goal 'deal=tru'"),
        (BestRequest("u1"), "no goal is named; the model has deal="),
    ):
        with pytest.raises(InputError, match=message):
            search.best(session, request)
    with pytest.raises(InputError, match="retrieval is 'hnsw'"):
        TowerSearch(ranker, "hnsw")
    hard = ServedRanker.of(folder / "hard", open_store(folder / "hard"))
    with pytest.raises(InputError, match=r"kind = 'tin' reads the candidate.*kind = 'towers'"):
        TowerSearch(hard)


def test_recommend_prints_what_score_gives(folder: Path, cli: Cli) -> None:
    ask = ("--user", "u6", "--goal", GOAL, "--at", START + 40 * DAY)
    said = cli("score", folder / "towers", *ask, "--items", ",".join(EVERY), "--json")
    scores = {row["item"]: row["score"] for row in json.loads(said.out)["items"]}
    said = cli("recommend", folder / "towers", *ask, "--k", 12, "--json")
    told = json.loads(said.out)
    assert (told["user"], told["goal"], told["domain"]) == ("u6", GOAL, None)
    is_best([(row["item"], row["score"]) for row in told["items"]], scores, 12)
    said = cli("recommend", folder / "towers", *ask, "--domain", "d1", "--exclude-seen")
    assert said.code == 0, said.err
    assert all(int(line.split()[1][1:]) % 2 for line in said.out.splitlines())
    said = cli("recommend", folder / "one", "--user", "nobody")
    assert len(said.out.splitlines()) == 10
    assert "'nobody' has no events; found without a history" in said.err


def test_all_users_get_what_each_would_get_alone(
    folder: Path, session: RankingSession, cli: Cli, tmp_path: Path
) -> None:
    """At the end, and at a time when some have no event yet, with and without what they know."""
    store = open_store(folder / "towers")
    users = [store.user_token(number) for number in range(store.num_users)]
    for at in (None, START + DAY):
        for leave in (False, True):
            out = tmp_path / f"{at}-{leave}.parquet"
            k = 25 if leave else 7  # more than the items of a domain, and fewer
            words = ["--all-users", "--goal", OTHER, "--k", k, "--out", out]
            words += ["--at", at] if at else []
            said = cli("recommend", folder / "towers", *words, *["--exclude-seen"] * leave)
            assert said.code == 0, said.err
            rows = pl.read_parquet(out)
            assert rows.columns == ["user", "domain", "rank", "item", "score"]
            found = rows.group_by("user", "domain", maintain_order=True).agg(
                "rank", "item", "score"
            )
            assert found["user"].unique(maintain_order=True).to_list() == users
            for user, domain, ranks, items, chances in found.iter_rows():
                seen = (
                    {store.catalog.token(int(i)) for i in session.seen(user, at)} if leave else ()
                )
                scores = by_scoring(session, BestRequest(user, OTHER, domain, timestamp=at))
                wanted = {name: score for name, score in scores.items() if name not in seen}
                assert ranks == [*range(1, len(ranks) + 1)]
                is_best([*zip(items, chances, strict=True)], wanted, k)


def test_some_users_and_domains_in_another_format(folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("u3\nstranger\nu1\n")
    out = tmp_path / "best.csv"
    words = ("--users", tmp_path / "users", "--domains", "d1", "--out", out, "--k", 3)
    said = cli("recommend", folder / "one", "--all-users", *words, "--json")
    told = json.loads(said.out)
    assert (told["rows"], told["users"], told["domains"]) == (6, 2, ["d1"])
    assert told["unserved"] == {"stranger": "is not in the log"}
    assert pl.read_csv(out)["user"].to_list() == ["u3"] * 3 + ["u1"] * 3


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (
            "towers",
            ("--user", "u1", "--log", "s"),
            "takes --goal, --at, --data, --exclude-seen, --domain, --k; leave --log",
        ),
        (
            "towers",
            ("--all-users", "--domain", "d0"),
            "--users, --domains, --k, --format, --force; ",
        ),
        ("towers", ("--user", "u1", "--allow-imports"), "leave --allow-imports out, or take a run"),
        ("towers", ("--pairs", "p.csv"), "leave --pairs out, or take a run of hstu-xd train"),
        ("towers", ("--goal", GOAL), "--user is missing; give --user or --all-users, and --goal"),
        ("towers", ("--all-users", "--goal", GOAL), "--out is missing, which --all-users needs"),
        ("towers", ("--all-users", "--out", "f.csv"), "no goal is named; the model has deal="),
        ("hard", ("--user", "u1", "--goal", GOAL), "no index finds its best items; rank given"),
        ("hard", ("--all-users", "--out", "f.csv"), "no index finds its best items; rank given"),
    ],
)
def test_what_recommend_does_not_do_of_ranking_runs(
    folder: Path,
    run: str,
    options: tuple[str, ...],
    message: str,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("recommend", folder / run, *options)
    assert not [*tmp_path.iterdir()]
    assert (said.code, message in said.err) == (2, True), said.err


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> Iterator[Client]:
    with serving(tmp_path / "log", run=folder / "towers") as client:
        yield client


def test_the_service_recommends_by_towers(client: Client, session: RankingSession) -> None:
    body = {"user": "u1", "domains": ["d1", "d0"], "goal": GOAL, "k": 5}
    new = {"user": "u1", "item": "i3", "timestamp": NOW}
    for _ in range(2):
        answer = client.ask("POST", "/v1/recommend", body)
        assert answer.status_code == 200, answer.text
        found = answer.json()["recommendations"]
        assert [each["domain"] for each in found] == ["d1", "d0"]
        for each in found:
            scores = by_scoring(session, BestRequest("u1", GOAL, each["domain"]))
            is_best([(row["item"], row["score"]) for row in each["items"]], scores, 5)
        assert client.append(new).status_code == 200
        session.append(["u1"], ["i3"], [NOW])
    answer = client.ask("POST", "/v1/recommend", body | {"exclude_seen": True, "k": 40})
    rows = [row["item"] for each in answer.json()["recommendations"] for row in each["items"]]
    assert "i3" not in rows
    ranked = {"user": "u1", "candidates": EVERY[:3], "goal": GOAL}
    answers = client.ask_all([("POST", "/v1/recommend", body), ("POST", "/v1/rank", ranked)])
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(answers[1].json()["goals"][0]["scores"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": None}, "no goal is named; the model has deal="),
        ({"goal": "deal=tru"}, "unknown goal 'deal=tru'"),
        ({"domains": ["d0"] * 3}, "domains has 3 names, and there are 2 domains"),
        ({"domains": ["d2"]}, "d2"),
        ({"timestamp": 10**15}, "timestamp 1000000000000000 is in the future"),
    ],
)
def test_bad_requests_of_the_service_are_named(
    client: Client, change: dict[str, Any], message: str
) -> None:
    body = {"user": "u1", "domains": ["d0"], "goal": GOAL} | change
    answer = client.ask("POST", "/v1/recommend", body)
    assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text


def test_what_towers_answer_is_said(client: Client) -> None:
    answer = client.ask("POST", "/v1/score", {"user": "u1"})
    assert answer.status_code == 404
    assert "is a ranking run; ask POST /v1/rank or /v1/recommend" in answer.json()["error"]
    paths = client.ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/rank", "/v1/recommend"} <= set(paths)
    assert "/v1/score" not in paths


@needs_faiss
def test_a_service_of_towers_may_search_by_lists(folder: Path, tmp_path: Path) -> None:
    options = {"states": {"retrieval": "approximate"}}
    with serving(tmp_path / "log", run=folder / "towers", **options) as client:
        body = {"user": "u1", "domains": ["d0"], "goal": GOAL, "k": 3}
        answer = client.ask("POST", "/v1/recommend", body)
        assert len(answer.json()["recommendations"][0]["items"]) == 3


def test_only_towers_take_the_place_of_towers(folder: Path, tmp_path: Path) -> None:
    headers = {"authorization": "Bearer t"}
    with serving(tmp_path / "log", run=folder / "towers", token="t") as client:
        answer = client.ask("POST", "/v1/models", {"run": "hard"}, headers=headers)
        assert answer.status_code == 400
        assert "hard is none of towers and recommends nothing" in answer.json()["error"]
    with serving(tmp_path / "other", run=folder / "hard", token="t") as client:
        answer = client.ask("POST", "/v1/models", {"run": "towers"}, headers=headers)
        assert answer.status_code == 200, answer.text


def test_a_shadow_is_compared_by_what_it_recommends(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", run=folder / "towers") as client:
        shadow = Shadow(client.service, folder / "towers", allow_imports=False, log=LogSettings())
        client.service.shadow = shadow
        body = {"user": "u1", "domains": ["d0"], "goal": GOAL}
        assert client.ask("POST", "/v1/recommend", body).status_code == 200
        deadline = time.monotonic() + 60
        while 'outcome="compared"} 1.0' not in (text := client.ask("GET", "/metrics").text):
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        assert f'hstu_xd_shadow_first_rank_sum{{name="{shadow.name}"}} 1.0' in text
