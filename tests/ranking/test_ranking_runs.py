"""A ranking run is a run: it is resumed, measured again, and refused where it does not fit."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.cli.app import run as run_command
from hstu_xd.data.requests import RequestOptions, write_requests
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.ranking import RankingProtocol
from hstu_xd.files import sha256_of
from hstu_xd.ranking import trainer

Cli = Callable[..., Any]
QUICK = ("xd_rank.num_epochs = 2", "xd_rank.batch_requests = 32", "xd_search.k = 10")
# With something that is dropped, which a resumed run has to drop again.
QUICK += ("xd_short.events = 6", "xd_short.width = 8", "xd_encoder.num_blocks = 1")
QUICK_WORDS = [word for binding in QUICK for word in ("--gin_bindings", binding)]


@pytest.fixture(scope="module")
def run(requests_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tin"
    command = ["rank", "--data", requests_path, "--out", out, *QUICK_WORDS]
    assert run_command([str(word) for word in command]) == 0
    return out


def outcome(run: Path) -> tuple[Any, ...]:
    """What a run ends with, but for how long it took."""
    summary = json.loads((run / "summary.json").read_text())
    timed = ("seconds_per_step", "candidates_per_second")
    left = {name: value for name, value in summary.items() if name not in timed}
    return left, (run / "metrics.jsonl").read_text(), sha256_of(run / "best.safetensors")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Do something after a number of steps of the trainings that follow, once."""
    whole, seen = trainer.RankTrainer._step, []
    monkeypatch.setattr(trainer, "_SAVE_EVERY", 4)

    def arrange(number: int, do: Callable[[], Any]) -> None:
        def step(self: Any, chosen: Any) -> None:
            whole(self, chosen)
            seen.append(chosen)
            if len(seen) == number:
                do()

        monkeypatch.setattr(trainer.RankTrainer, "_step", step)

    return arrange


def steps_of_an_epoch(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"]


@pytest.mark.parametrize("further", [2, 5])  # of an epoch, from one without and one with a save
def test_a_killed_run_resumes_to_the_same(
    further: int, run: Path, cli: Cli, requests_path: Path, tmp_path: Path, stop_at: Any
) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    stop_at(steps_of_an_epoch(run) + further, die)
    out = tmp_path / "run"
    command = ("rank", "--data", requests_path, "--out", out)
    assert cli(*command, *QUICK_WORDS).code == 130
    assert not (out / "summary.json").exists()
    said = cli(*command, "--resume")
    assert said.code == 0, said.err
    assert outcome(out) == outcome(run)


def test_a_run_that_is_asked_to_stop_says_how_to_go_on(
    run: Path, cli: Cli, requests_path: Path, tmp_path: Path, stop_at: Any
) -> None:
    stop_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "run"
    command = ("rank", "--data", requests_path, "--out", out)
    said = cli(*command, *QUICK_WORDS)
    assert said.code == 143
    mend = f"go on with: hstu-xd rank --data {requests_path} --out {out} --resume"
    assert "stopped by SIGTERM after 3 steps, in epoch 0" in said.err
    assert mend in said.err
    assert cli(*command, "--resume").code == 0
    assert outcome(out) == outcome(run)


def test_a_run_before_its_first_checkpoint_begins_again(
    run: Path, cli: Cli, requests_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "config.gin"):
        shutil.copy(run / name, out)
    assert cli("rank", "--data", requests_path, "--out", out, "--resume").code == 0
    assert outcome(out) == outcome(run)


def test_other_settings_are_said_when_a_run_is_resumed(
    run: Path, cli: Cli, requests_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = outcome(run)
    command = ("rank", "--data", requests_path, "--out", run, "--resume")
    assert cli(*command, *QUICK_WORDS, "--gin_bindings", "xd_search.k = 7").code == 0
    assert "goes on with its own settings: not xd_search.k = 7 but 10" in caplog.text
    assert outcome(run) == before


@pytest.fixture(scope="module")
def other_requests(store: InteractionStore, requests_path: Path) -> Path:
    """Other requests of the same store, for the same goals."""
    out = requests_path.with_name("other")
    write_requests(store, out, RequestOptions(goal="deal", positives=1, min_history=20, seed=5))
    return out


def test_a_run_is_resumed_on_its_own_requests(run: Path, other_requests: Path, cli: Cli) -> None:
    said = cli("rank", "--data", other_requests, "--out", run, "--resume")
    assert said.code == 2
    assert "was trained on other requests than" in said.err
    assert "resume it with --data" in said.err


def test_what_is_there_is_not_trained_over(run: Path, requests_path: Path, cli: Cli) -> None:
    said = cli("rank", "--data", requests_path, "--out", run)
    assert (said.code, "resume it with --resume or give another" in said.err) == (2, True)


def test_several_processes_are_refused(
    requests_path: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    import torch

    from hstu_xd.training.distributed import World

    both = nullcontext(World(0, 2, torch.device("cpu")))
    monkeypatch.setattr("hstu_xd.ranking.run.world", lambda: both)
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "run")
    assert (said.code, "rank trains in one process, and 2 were started" in said.err) == (2, True)


def test_evaluate_finds_what_the_training_found(run: Path, cli: Cli) -> None:
    said = cli("evaluate", run, "--json")
    assert said.code == 0, said.err
    found, summary = json.loads(said.out), json.loads((run / "summary.json").read_text())
    assert (found["valid"], found["test"]) == (summary["valid"], summary["test"])
    assert found["requests_hash"] == summary["requests_hash"]
    assert found["data_changes"] == ""


def test_evaluate_prints_every_group(run: Path, cli: Cli) -> None:
    said, test = cli("evaluate", run), json.loads((run / "summary.json").read_text())["test"]
    lines = said.out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("test"))
    assert lines[first].split() == ["test", *RankingProtocol.metrics, "candidates", "users"]
    cells = lines[first + 1].split()
    assert cells[:3] == ["all", f"{test['auc']:.4f}", f"{test['gauc']:.4f}"]
    for group in ("[deal=true]", "[d0]", "[history longest]", "[unseen]"):
        assert any(line.startswith(group) for line in lines[first:])
    assert "No AUC, as the candidates there are none or of one class: " in said.out
    assert "calibration is the mean chance over the share that was taken" in said.out


def test_evaluate_takes_other_requests_of_the_store(
    run: Path, cli: Cli, other_requests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = json.loads(cli("evaluate", run, "--json", "--data", other_requests).out)
    own = json.loads((run / "summary.json").read_text())
    assert found["requests_hash"] != own["requests_hash"]
    assert found["test"]["rows"] != own["test"]["rows"]
    assert abs(found["test"]["gauc"] - own["test"]["gauc"]) < 0.2
    assert "has other requests than those that" in caplog.text


def test_evaluate_refuses_other_goals(
    run: Path, cli: Cli, store: InteractionStore, tmp_path: Path
) -> None:
    write_requests(store, tmp_path / "any", RequestOptions(positives=2, min_history=20))
    said = cli("evaluate", run, "--data", tmp_path / "any")
    assert said.code == 2
    assert "has the goals any," in said.err
    assert "was trained for deal=" in said.err


def test_requests_that_were_made_again_are_refused(
    run: Path, cli: Cli, other_requests: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    facts = json.loads((moved / "run.json").read_text()) | {"requests": str(other_requests)}
    (moved / "run.json").write_text(json.dumps(facts))
    said = cli("evaluate", moved)
    assert (said.code, "was made again since" in said.err) == (2, True)


def test_other_levels_are_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    facts = json.loads((moved / "run.json").read_text())
    facts["data_hashes"]["item_levels.npy"] = "0"
    (moved / "run.json").write_text(json.dumps(facts))
    said = cli("evaluate", moved)
    assert (said.code, "its items have other levels than those that" in said.err) == (2, True)


@pytest.mark.parametrize(
    "options",
    [
        ("--exclude-seen",),
        ("--include-seen",),
        ("--candidates", "99"),
        ("--ties", "favour"),
        ("--ks", "5"),
        ("--ranks", "ranks.parquet"),
        ("--allow-imports",),
    ],
)
def test_options_of_retrieval_are_refused(options: tuple[str, ...], run: Path, cli: Cli) -> None:
    said = cli("evaluate", run, *options)
    assert said.code == 2
    message = f"a ranking run, of candidates that its requests name: {options[0]} has no meaning"
    assert message in said.err


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--data", "STORE", "--out", "RUN", "--resume"),
        ("train", "--data", "STORE", "--out", "OUT", "--continue-from", "RUN"),
    ],
)
def test_commands_of_retrieval_runs_say_what_they_need(
    command: tuple[str, ...], run: Path, store_path: Path, tmp_path: Path, cli: Cli
) -> None:
    places = {"RUN": run, "STORE": store_path, "OUT": tmp_path / "out"}
    said = cli(*(places.get(word, word) for word in command))
    assert said.code == 2
    assert f"{run} is a ranking run, written by hstu-xd rank; here a retrieval run" in said.err
