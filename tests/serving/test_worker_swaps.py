"""Another model for a service of several processes: all take it or none, and from a signal, too."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from log_cases import postgres_server
from other_models import OTHER, expected
from service_client import (
    MODEL,
    TOKEN,
    events,
    scores,
)
from service_process import ServiceProcess, asked_all_the_while

from hstu_xd.errors import InputError
from hstu_xd.serving.http.live_model import Changes
from hstu_xd.serving.http.swaps import SwapRefused
from hstu_xd.serving.http.worker_swaps import SwapLeader


def led(tmp_path: Path) -> tuple[SwapLeader, list[list[Any]]]:
    heard: list[list[Any]] = [[], []]
    return SwapLeader(tmp_path, 2, lambda number, message: heard[number].append(message)), heard


def test_a_leader_has_all_workers_take_a_model_or_none(tmp_path: Path) -> None:
    from hstu_xd.serving.http.worker_swaps import _Ask, _Done, _Load, _Take

    changes = Changes("b 1", "a 1", 0, 0)
    leader, heard = led(tmp_path)
    leader.hear(0, _Ask(tmp_path / "b"))
    assert heard[0] == heard[1] == [_Load(1, tmp_path / "b")]
    leader.hear(1, _Ask(tmp_path / "c"))
    assert isinstance(heard[1][-1].error, SwapRefused)
    leader.hear(0, _Done(1, changes))
    assert leader.run == tmp_path
    leader.hear(1, _Done(1, changes))
    assert leader.run == tmp_path / "b"
    assert heard[0][-1] == heard[1][-1] == _Take(1)
    # One that dies now starts with the new model; the other one is still to say that it has it.
    leader.lose(1)
    leader.hear(0, _Done(1))
    assert heard[0][-1] == _Done(1, changes)

    leader.begin(tmp_path / "c", 1)
    leader.hear(0, _Done(2, changes))
    leader.lose(0)
    assert heard[1][-1].error.args[0].startswith("a worker has ended meanwhile; the model stays")
    assert heard[1][-2] == _Take(2, forget=True)
    assert leader.run == tmp_path / "b"
    leader.hear(1, _Done(2, changes))  # What it was doing is no longer asked for.

    leader.begin(tmp_path / "d", 0)
    leader.hear(1, _Done(3, error=InputError("no")))
    assert heard[0][-1].error.args == ("no",)
    leader.begin(tmp_path / "e", 0)
    leader.hear(0, _Done(4, changes))
    leader.hear(1, _Done(4, Changes("b 2", "a 1", 0, 0)))
    assert "the run has changed while workers loaded it" in heard[0][-1].error.args[0]
    assert leader.run == tmp_path / "b"


def test_a_leader_has_all_workers_take_a_shadow_or_none(tmp_path: Path) -> None:
    from hstu_xd.serving.http.worker_swaps import _Ask, _Done, _Load, _Take

    changes = Changes("b 1", "a 1", 0, 0)
    leader, heard = led(tmp_path)
    leader.hear(0, _Ask(tmp_path / "b", "shadow"))
    assert heard[0] == heard[1] == [_Load(1, tmp_path / "b", "shadow")]
    leader.hear(1, _Done(1, error=InputError("no")))
    assert heard[0][-1].error.args == ("no",)
    assert heard[1][-1] == _Take(1, forget=True)
    assert leader.shadow is None

    def follow(swap: int, message: _Ask, found: Changes | None) -> None:
        leader.hear(0, message)
        for _ in range(2):  # It is loaded, then taken.
            for worker in range(2):
                leader.hear(worker, _Done(swap, found))
        assert heard[0][-1] == _Done(swap, found)

    follow(2, _Ask(tmp_path / "b", "shadow"), changes)
    assert (leader.run, leader.shadow) == (tmp_path, tmp_path / "b")
    leader.hear(1, _Ask(tmp_path / "c", "shadow"))
    text = "b is in the shadow; end it first with DELETE /v1/models/shadow"
    assert heard[1][-1].error.args == (text,)
    follow(3, _Ask(tmp_path / "c"), changes)
    assert (leader.run, leader.shadow) == (tmp_path / "c", tmp_path / "b")
    # Who is to answer is in the shadow no more.
    follow(4, _Ask(tmp_path / "b"), changes)
    assert (leader.run, leader.shadow) == (tmp_path / "b", None)
    follow(5, _Ask(tmp_path / "c", "shadow"), changes)
    follow(6, _Ask(None, "shadow"), None)
    assert (leader.run, leader.shadow) == (tmp_path / "b", None)
    leader = SwapLeader(tmp_path, 2, lambda *_: None, tmp_path / "b")
    assert leader.shadow == tmp_path / "b"


def test_a_leader_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_xd.serving.http import worker_swaps

    monkeypatch.setattr(worker_swaps, "_LOADING", 0.0)
    leader, heard = led(tmp_path)
    leader.begin(tmp_path, 0)
    time.sleep(0.01)
    leader.look()
    assert "not all workers have loaded it within" in heard[0][-1].error.args[0]


def wait_for_model(process: ServiceProcess, name: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        model = process.ask("GET", "/healthz")[1]["model"]
        if model.startswith(f"{name} "):
            return model
        time.sleep(0.05)
    raise AssertionError(f"{name} does not come")


def test_sighup_serves_what_a_link_names_now(tmp_path: Path, runs: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(runs / "old")
    options = ["--events", str(tmp_path / "events")]
    with ServiceProcess(link, *options) as process:
        assert process.ask("POST", "/v1/events", {"events": events(5)})[0] == 200
        wait_for_model(process, "old")
        link.unlink()
        link.symlink_to(runs / "new")
        process.send(signal.SIGHUP)
        wait_for_model(process, "new")
        wanted = expected(OTHER, events(5), "books")
        body = {"user": "ann", "domain": "books", "items": list(wanted)}
        assert process.ask("POST", "/v1/score", body)[1]["scores"] == pytest.approx(
            list(wanted.values()), abs=1e-5
        )
        link.unlink()
        link.symlink_to(runs / "toys")
        process.send(signal.SIGHUP)
        time.sleep(1.0)
        wait_for_model(process, "new")
        code, said = process.end()
    assert code == 0
    assert "has no domain 'games'" in said
    assert "; the model before goes on" in said


@pytest.mark.slow
def test_workers_swap_together_under_load(tmp_path: Path, runs: Path) -> None:
    """Ten swaps, a worker killed after one: all answer by the run that was named last."""
    with postgres_server() as server:
        options = ["--events", server.database(), "--workers", "2"]
        with ServiceProcess(runs / "old", *options, token=TOKEN) as process:
            assert process.ask("POST", "/v1/events", {"events": events(5)})[0] == 200
            wanted = {
                "old": list(scores(events(5), 0).values()),
                "new": list(expected(OTHER, events(5), "books").values()),
            }
            items = [str(item) for item in MODEL.catalog.items_of(0).tolist()]
            body = {"user": "ann", "domain": "books", "items": items}
            with asked_all_the_while(process, body, [*wanted.values()]):
                for number in range(10):
                    name = ("new", "old")[number % 2]
                    status, answer = process.ask("POST", "/v1/models", {"run": name})
                    assert (status, answer.get("model", "").split()[:1]) == (200, [name]), answer
                    for _ in range(6):  # Whichever worker answers.
                        status, answer = process.ask("POST", "/v1/score", body)
                        assert answer["scores"] == pytest.approx(wanted[name], abs=1e-5)
                assert process.ask("POST", "/v1/models", {"run": "toys"})[0] == 400
            assert process.ask("POST", "/v1/models", {"run": "new"})[0] == 200
            # What is started again serves the new model: none of those that swapped is left.
            for worker in process.workers():
                process.kill_worker(worker)
            for _ in range(8):
                assert process.ask("POST", "/v1/score", body)[1]["scores"] == pytest.approx(
                    wanted["new"], abs=1e-5
                )
            code, said = process.end()
        assert code == 0, said
        assert "Traceback" not in said
