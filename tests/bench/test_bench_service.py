"""``bench service``: a real service under load, and what is checked afterwards. No timed claim."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import KEYS, call
from log_cases import postgres_server

pytest.importorskip("fastapi", reason="no fastapi here: bench service is NOT covered")

from hstu_xd.bench import service, service_inputs, service_traffic
from hstu_xd.bench.http_load import Call, Load, Outcome
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.stores import StoreError

TINY = {"heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1, "seq_len": 12, "threads": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (service_traffic, service_inputs):
        monkeypatch.setattr(module, "USERS", 12)
    monkeypatch.setattr(service_inputs, "ITEMS_PER_DOMAIN", 20)


def test_a_service_under_load_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Outcome] = []
    load = Load.open

    def watched(self: Load, *arguments: Any, **options: Any) -> list[Outcome]:
        kept.extend(load(self, *arguments, **options))
        # What was refused was not taken, and what was taken is not lost.
        return kept

    monkeypatch.setattr(Load, "open", watched)
    call("service", json=True, seconds=1.0, num_domains=3, **TINY)
    (row,) = json.loads(capsys.readouterr().out)
    assert row.keys() >= KEYS
    assert row["provider"] == row["what"] == "service"
    assert (row["seq_len"], row["num_domains"], row["layers"]) == (12, 3, 1)
    assert row["correct"] is True
    assert (row["other_errors"], row["lost_events"], row["foreign_events"]) == (0, 0, 0)
    assert 0 <= row["error_of_budget"] <= 1
    assert row["checked_users"] == 12
    assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] <= row["ms_p99"]
    accepted = [x for x in kept if x.status == 200]
    assert row["accepted_per_second"] == len(accepted)
    assert row["offered_per_second"] == len(kept)
    assert {x.status for x in kept} <= {200, 503}


def test_no_collection_of_garbage_holds_up_the_load() -> None:
    """What the load itself pauses for would count as time of the answers."""
    before, meanwhile = gc.get_threshold(), []

    def draw() -> None:
        meanwhile.append(gc.get_threshold())

    Load(1).closed(draw, seconds=1.0, connections=2)
    assert [(young, old) for young, old, _ in meanwhile] == 2 * [before[:2]]
    assert all(oldest > 10**9 for _, _, oldest in meanwhile)
    assert gc.get_threshold() == before


def test_a_log_may_be_long_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    call("service", json=True, seconds=1.0, num_domains=3, log_events=30_030, **TINY)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["log_events"] == 30_030
    assert row["ready_s"] > 0 < row["ready_s_empty"]
    # Those of the log, who are asked once, and those under load.
    assert row["checked_users"] == 100 + 12
    assert row["first_ms_median"] > 0
    assert row["correct"] is True
    assert (row["lost_events"], row["foreign_events"]) == (0, 0)


def test_states_in_a_store_are_compared_with_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "states.sqlite"
    call("service", json=True, seconds=1.0, num_domains=3, store=f"sqlite:{place}", **TINY)
    memory, stored = json.loads(capsys.readouterr().out)
    assert [row["states_in"] for row in (memory, stored)] == ["memory", "SQLite"]
    assert stored["provider"] == "service, states in SQLite"
    assert place.exists()
    for row in (memory, stored):
        assert row["correct"] is True
        assert row["cpu_ms_per_request"] > 0
        assert row["states_built"] is True
    assert stored["times_faster_than_service"] == pytest.approx(
        stored["capacity_per_second"] / memory["capacity_per_second"]
    )


@pytest.mark.slow
def test_workers_and_a_server_are_compared_with_one_and_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with postgres_server() as server:
        url = server.url("postgres")
        call("service", json=True, seconds=1.0, num_domains=3, workers=2, events=url, **TINY)
        rows = json.loads(capsys.readouterr().out)
        import psycopg

        with psycopg.connect(url) as connection:
            names = connection.execute("SELECT datname FROM pg_database").fetchall()
    apart = "2 workers, users apart"
    assert [row["provider"] for row in rows] == ["service", "postgres", apart, "2 workers"]
    assert [row["events_in"] for row in rows] == ["SQLite", *["PostgreSQL"] * 3]
    assert [row["workers"] for row in rows] == [1, 1, 2, 2]
    assert [row["users_apart"] for row in rows] == [False, False, True, False]
    for row in rows:
        assert row["correct"] is True
        assert row["lost_events"] == row["foreign_events"] == 0
    for row in rows[2:]:
        assert row["peak_bytes"] > rows[1]["peak_bytes"]
        assert row["times_faster_than_postgres"] == pytest.approx(
            row["capacity_per_second"] / rows[1]["capacity_per_second"]
        )
    assert not any("bench" in name for (name,) in names)


def test_what_workers_need_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers 2 share a log: give --events postgresql"):
        call("service", seconds=1.0, workers=2)
    with pytest.raises(InputError, match="store 'nowhere': memory, sqlite:FILE or redis"):
        call("service", seconds=1.0, store="nowhere")
    with pytest.raises(StoreError, match="; is it up, and is there room"):
        call("service", seconds=1.0, store=f"unix://{tmp_path}/none.sock")
    with pytest.raises(InputError, match="the URL of a PostgreSQL server is needed"):
        call("service", seconds=1.0, events=str(tmp_path / "file"))
    with pytest.raises(HstuXdError, match="--events needs a server that may make databases"):
        call("service", seconds=1.0, events="postgresql://nobody@/none?host=/nowhere", **TINY)


@pytest.mark.slow
def test_an_event_that_is_lost_or_made_up_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = service._Served.check

    def check(self: Any, outcomes: Any, found: Any) -> Any:
        event = {"user": "nobody", "item": "none", "timestamp": 1}
        extra = Outcome(Call("/v1/events", {"events": [event]}), 200, 0.1, b"")
        taken = [x for x in outcomes if x.status == 200 and x.call.path == "/v1/events"]
        user, scores = next(iter(found.items()))
        wrong = {item: score + 1e-3 for item, score in scores.items()}
        return honest(self, [*taken[1:], extra], found | {user: wrong})

    monkeypatch.setattr(service._Served, "check", check)
    with pytest.raises(HstuXdError, match="service disagrees"):
        call("service", json=True, seconds=1.0, num_domains=2, **TINY)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["lost_events"], row["foreign_events"]) == (1, 1)
    assert row["error_of_budget"] == pytest.approx(100, rel=0.1)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no catalogue here"):
        call("service", tmp_path, seconds=1.0)


def test_sizes_of_a_run_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--seq-len has no effect on a trained run; drop it"):
        call("service", tmp_path, seq_len=200)
