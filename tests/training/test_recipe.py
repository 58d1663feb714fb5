"""What a recipe may turn: the rate's schedule, the table's weight decay, averaged weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_runs import QUICK
from tiny_models import tiny_model

from hstu_xd.cli import app
from hstu_xd.errors import InputError, Interrupted
from hstu_xd.training.checkpoint import load_checkpoint
from hstu_xd.training.optimization import WeightAverage, optimizer_of, rate_at
from hstu_xd.training.settings import TrainSettings, load_settings
from hstu_xd.training.trainer import Trainer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.1, 0.2]),
        ("cosine", [2.0, 1.1, 0.2]),
    ],
)
def test_a_schedule_goes_from_the_peak_to_its_share(schedule: str, expected: list[float]) -> None:
    train = TrainSettings(
        learning_rate=2.0, learning_rate_schedule=schedule, final_rate_share=0.1, num_warmup_steps=4
    )
    assert [rate_at(train, 100, done) for done in (0.0, 0.5, 1.0)] == pytest.approx(expected)
    # Warm-up is on top of it.
    assert [rate_at(train, step, 0.0) for step in (0, 1, 3)] == pytest.approx([0.5, 1.0, 2.0])


def test_the_table_takes_its_share_of_the_decay() -> None:
    model = tiny_model()
    train = TrainSettings(weight_decay=0.5, embedding_decay_share=0.0, learning_rate=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(model, train).step()
    table = set(model.item_table.parameters())
    assert table
    for name, value in model.named_parameters():
        share = 1.0 if value in table else 0.95
        torch.testing.assert_close(value, before[name] * share, msg=name)


def test_an_average_follows_the_weights() -> None:
    model = tiny_model()
    average = WeightAverage(model, 0.75)
    weight = next(model.parameters())
    expected = None
    for steps in range(40):
        with torch.no_grad():
            weight.add_(torch.ones_like(weight))
        average.update()
        now = weight.detach().clone()
        kept = 0.75 if steps > 26 else (1 + steps) / (10 + steps)
        expected = now if expected is None else kept * expected + (1 - kept) * now
    torch.testing.assert_close(next(average.model.parameters()).detach(), expected)


def words(store: Path, out: Path) -> list[str]:
    line = ["train", "--data", str(store), "--out", str(out)]
    for binding in (
        *QUICK,
        "xd_train.average_decay = 0.9",
        'xd_train.learning_rate_schedule = "cosine"',
        "xd_train.num_epochs = 2",
        "xd_train.local_batch_size = 16",
    ):
        line += ["--gin_bindings", binding]
    return line


def test_a_stopped_run_goes_on_with_its_average(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert app.run(words(store_path, whole)) == 0

    def stop(trainer: Trainer) -> None:
        if trainer.progress.step == 13:
            raise Interrupted("here", 15)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_stop_if_asked", stop)
        assert app.run(words(store_path, stopped)) != 0
    assert not (stopped / "summary.json").exists()
    assert app.run(["train", "--data", str(store_path), "--out", str(stopped), "--resume"]) == 0
    for name in ("best.safetensors", "last.safetensors"):
        expected, found = (load_checkpoint(run / name)[0] for run in (whole, stopped))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    # What was measured is the average, which is what was saved.
    weights, metadata = load_checkpoint(whole / "best.safetensors")
    state, _ = load_checkpoint(whole / "last.safetensors")
    if metadata["epoch"] == 1:
        assert all(torch.equal(state[f"averaged.module.{k}"], v) for k, v in weights.items())
    assert any(not torch.equal(state[f"model.{k}"], v) for k, v in weights.items())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["split"] == "valid"][metadata["epoch"]]
    summary = json.loads((whole / "summary.json").read_text())
    assert valid["mrr"] == pytest.approx(summary["valid"]["mrr"], abs=1e-12)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ('xd_train.learning_rate_schedule = "step"', "one of constant, linear, cosine"),
        ("xd_train.final_rate_share = 1.5", "final_rate_share"),
        ("xd_train.average_decay = 1.0", "0 <= rate < 1"),
        ("xd_train.embedding_decay_share = -1.0", "0 or more"),
    ],
)
def test_values_out_of_range(binding: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings([], [binding])


def test_a_share_without_a_schedule_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_settings([], ["xd_train.final_rate_share = 0.1"])
    assert "final_rate_share = 0.1 does nothing" in caplog.text


@pytest.mark.parametrize(
    ("bindings", "users", "expected"),
    [
        # A user has ten events in the mean.
        ({"events_per_step": 1}, 2000, 32),
        ({"events_per_step": 1}, 320, 10),
        ({"events_per_step": 1}, 31, 1),
        ({"events_per_step": 1000}, 100_000, 100),
        ({"events_per_step": 1004}, 100_000, 100),
        ({"events_per_step": 1000}, 640, 20),
        ({"events_per_step": 1000, "local_batch_size": 7}, 640, 7),
    ],
)
def test_a_step_takes_the_users_who_have_its_events(
    bindings: dict[str, int], users: int, expected: int
) -> None:
    events = np.tile([5, 15], (users + 1) // 2)[:users]
    assert TrainSettings(**bindings).users_per_step(events) == expected


def test_a_log_without_training_events_has_steps_all_the_same() -> None:
    assert TrainSettings().users_per_step(np.empty(0, np.int64)) == 1
