"""Trackers: what each is told of a run, that a resumed run goes on there, and none fails one."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick_runs import QUICKEST

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import Interrupted
from hstu_xd.training import trackers
from hstu_xd.training.run import train
from hstu_xd.training.settings import load_settings
from hstu_xd.training.trackers import TrackedRun, _plain
from hstu_xd.training.trainer import Trainer

Call = Callable[..., str]
RECIPE = (*QUICKEST, "xd_train.num_epochs = 2", "xd_train.local_batch_size = 80")
BASELINE = (*RECIPE, 'xd_train.baseline = "popularity"')


class Remembering:
    """A tracker that remembers what it is told; ``gone`` names the calls that fail."""

    package = "json"
    told: list[tuple[str, Any]]
    gone: set[str]

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    def _note(self, call: str, value: Any) -> None:
        if call in self.gone:
            raise ConnectionError("nobody\nthere")
        self.told.append((call, value))

    def start(self, settings: Mapping[str, Any]) -> str:
        self._note("start", (self.run.known_as, self.run.step, settings))
        return self.run.known_as or "seven"

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._note("metrics", (step, values))

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, float]) -> None:
        self._note("finish", ([file.name for file in artefacts], summary))

    def stop(self) -> None:
        self._note("stop", None)


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Remembering]]:
    Remembering.told, Remembering.gone = [], set()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Remembering)
    return Remembering


def words(data: Path, run: Path, *bindings: str) -> list[str]:
    line = ["train", "--data", str(data), "--out", str(run)]
    return line + [word for b in bindings for word in ("--gin_bindings", b)]


def steps_told(told: Sequence[tuple[str, Any]]) -> list[tuple[int, str]]:
    return [
        (value[0], next(iter(value[1])).partition("/")[0])
        for call, value in told
        if call == "metrics"
    ]


def test_a_tracker_is_told_settings_metrics_and_results(
    call: Call, remembering: type[Remembering], store_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call(*words(store_path, run, *RECIPE), "--tracker", "mlflow", "--tracker", "tensorboard")
    told = remembering.told
    known_as, step, settings = told[0][1]
    assert (told[0][0], known_as, step) == ("start", "", None)
    assert settings["train.num_epochs"] == 2
    assert settings["encoder.num_heads"] == 2
    assert settings["variant_name"].startswith("HSTU")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [value for kind, value in told if kind == "metrics"] == [
        (row.pop("step"), {f"{split}/{name}": value for name, value in row.items()})
        for row in rows
        if (split := row.pop("split")) and row.pop("epoch") >= 0
    ]
    names, found = told[-1][1]
    assert (told[-1][0], len(told)) == ("finish", len(rows) + 2)
    assert names == ["run.json", "config.gin", "metrics.jsonl", "summary.json"]
    summary = json.loads((run / "summary.json").read_text())
    assert found["summary/test/ndcg@10"] == summary["test"]["ndcg@10"]
    assert found["summary/best_epoch"] == summary["best_epoch"]
    assert json.loads((run / "trackers.json").read_text()) == {
        "mlflow": "seven",
        "tensorboard": "tensorboard",
    }
    assert any((run / "tensorboard").iterdir())


def test_by_default_there_is_tensorboard_alone(
    call: Call, store_path: Path, tmp_path: Path
) -> None:
    call(*words(store_path, tmp_path / "a", *BASELINE))
    assert any((tmp_path / "a" / "tensorboard").iterdir())
    assert not (tmp_path / "a" / "trackers.json").exists()


def test_without_tensorboard_there_are_no_event_files(
    call: Call, remembering: type[Remembering], store_path: Path, tmp_path: Path
) -> None:
    call(*words(store_path, tmp_path / "a", *BASELINE), "--tracker", "mlflow")
    assert not (tmp_path / "a" / "tensorboard").exists()
    assert [name for name, _ in remembering.told] == ["start", "metrics", "metrics", "finish"]


def interrupted_at(
    step: int, run: Path, data: Path, patch: pytest.MonkeyPatch, tracker: str = "mlflow"
) -> None:
    """Train a run, and leave it in the middle of its second epoch as Ctrl-C does."""
    take = Trainer._step

    def stop(trainer: Trainer, split: Any, users: np.ndarray) -> int:
        if trainer.progress.step == step:
            trainer._stop(2)
        return take(trainer, split, users)

    with patch.context() as patched:
        patched.setattr(Trainer, "_step", stop)
        with pytest.raises(Interrupted):
            train(data, load_settings([], RECIPE), run, trackers=[tracker])


def test_a_resumed_run_goes_on_where_it_was(
    call: Call,
    remembering: type[Remembering],
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    interrupted_at(3, run, store_path, monkeypatch)
    assert [name for name, _ in remembering.told] == ["start", "metrics", "metrics", "stop"]
    remembering.told.clear()
    call(*words(store_path, run), "--resume")
    assert remembering.told[0][1][:2] == ("seven", 3)
    assert steps_told(remembering.told) == [(4, "train"), (4, "valid"), (4, "test")]
    assert remembering.told[-1][0] == "finish"
    assert not (run / "tensorboard").exists()


def test_a_tracker_that_joins_a_run_later_is_told_of_all_epochs(
    call: Call,
    remembering: type[Remembering],
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    interrupted_at(3, run, store_path, monkeypatch)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Remembering)
    remembering.told.clear()
    call(*words(store_path, run), "--resume", "--tracker", "wandb")
    assert remembering.told[0][1][0] == ""
    of_epochs = [(step, split) for step in (2, 4) for split in ("train", "valid")]
    assert steps_told(remembering.told) == [*of_epochs, (4, "test")]


@pytest.mark.parametrize("gone", ["start", "metrics", "finish"])
def test_a_server_that_is_gone_is_one_warning(
    gone: str,
    remembering: type[Remembering],
    store_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remembering.gone = {gone}
    with caplog.at_level(logging.WARNING):
        summary = train(store_path, load_settings([], RECIPE), tmp_path, trackers=["mlflow"])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("mlflow does not take in the run (nobody there); the training goes")
    assert gone not in [name for name, _ in remembering.told]


def test_a_server_that_comes_back_is_told_what_it_missed(
    remembering: type[Remembering],
    store_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remembering.gone = {"start"}
    train(
        store_path,
        load_settings([], RECIPE),
        tmp_path,
        trackers=["mlflow"],
        announce=lambda line: remembering.gone.clear(),
    )
    assert [name for name, _ in remembering.told] == ["start", *["metrics"] * 5, "finish"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "seven"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("command", ["train", "rank", "ablate"])
def test_what_is_not_there_is_said_before_anything_is_done(
    command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [command, "--data", tmp_path / "none", "--out", tmp_path / "out"]
    said = call(*line, "--tracker", "wandbb", code=2)
    assert "--tracker wandbb; did you mean 'wandb'?; there are tensorboard, mlflow, wandb" in said
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        said = call(*line, "--tracker", "tensorboard", "--tracker", name, code=2)
        assert (
            f'--tracker {name} needs {name}, which is not installed: pip install "hstu-xd[{name}]"'
            in said
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_list_of_trackers_is_refused(
    call: Call, store_path: Path, tmp_path: Path
) -> None:
    call(*words(store_path, tmp_path / "a", *BASELINE))
    for text in ("{", "[]", '{"board": ""}'):
        (tmp_path / "a" / "trackers.json").write_text(text)
        said = call(*words(store_path, tmp_path / "a"), "--resume", code=2)
        assert "trackers.json: cannot be followed" in said
        assert "remove it, and name the run's trackers by --tracker" in said


def test_ablate_passes_trackers_on(call: Call, store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    line = [*words(store_path, out, *RECIPE), "--variants", "hstu", "--seeds", "1"]
    call("ablate", *line[1:], "--tracker", "tensorboard")
    known = json.loads((out / "hstu-seed1" / "trackers.json").read_text())
    assert known == {"tensorboard": "tensorboard"}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("valid/ndcg@100", "valid/ndcg_at_100"),
        ("test/hr@10[Toys/Games]", "test/hr_at_10 Toys_Games"),
        ("summary/test/hr@10[../x]", "summary/test/hr_at_10 .._x"),
        ("train.learning_rate", "train.learning_rate"),
    ],
)
def test_names_that_mlflow_takes(name: str, plain: str) -> None:
    assert _plain(name) == plain


def test_mlflow_holds_the_run(
    call: Call,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="no mlflow here: its tracker is NOT covered")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    interrupted_at(3, run, store_path, monkeypatch)
    known_as = json.loads((run / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(known_as).info.status == "KILLED"
    call(*words(store_path, run), "--resume")
    found, domain = client.get_run(known_as), InteractionStore.open(store_path).domain_names[0]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["train.num_epochs"] == "2"
    summary = json.loads((run / "summary.json").read_text())
    assert found.data.metrics["test/ndcg_at_10"] == summary["test"]["ndcg@10"]
    assert (
        found.data.metrics[f"summary/test/ndcg_at_10 {domain}"]
        == (summary["test"][f"ndcg@10[{domain}]"])
    )
    history = client.get_metric_history(known_as, "train/loss")
    assert [metric.step for metric in history] == [2, 4]
    names = [file.path for file in client.list_artifacts(known_as)]
    assert names == ["config.gin", "metrics.jsonl", "run.json", "summary.json"]
    assert len(client.search_runs([found.info.experiment_id])) == 1


def test_weights_and_biases_holds_the_run(
    call: Call,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb", reason="no wandb here: its tracker is NOT covered")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    interrupted_at(3, run, store_path, monkeypatch, "wandb")
    known_as = json.loads((run / "trackers.json").read_text())["wandb"]
    call(*words(store_path, run), "--resume")
    kept = sorted((run / "wandb").glob(f"offline-run-*-{known_as}/*.wandb"))
    assert len(kept) == 2
