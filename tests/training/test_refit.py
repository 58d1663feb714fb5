"""A run that is trained again on its held-out events: what it sees, keeps, says and refuses."""

import json
import os
import re
import shlex
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refit_runs import (
    BEGIN,
    GLOBAL,
    RECIPE,
    assert_same_weights,
    facts,
    log_lines,
    prepare,
    refused,
    times_of,
    train,
)

import hstu_xd
from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.cuts import TimeCuts
from hstu_xd.data.store import InteractionStore
from hstu_xd.training import trainer as trainers
from hstu_xd.training.checkpoint import load_checkpoint
from hstu_xd.training.trainer import Trainer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], list[int]]]:
    """Of every training step: times of the events that are read, and of those that are targets."""
    forward, found = trainers._Loss.forward, []

    def watched(self: Any, batch: Any, targets: Any, generator: Any) -> Any:
        found.append((set(batch.timestamps.tolist()), batch.next_timestamps.tolist()))
        return forward(self, batch, targets, generator)

    monkeypatch.setattr(trainers._Loss, "forward", watched)
    return found


def trained_times(until: str, split: str) -> list[list[int]]:
    """Times of each user's events that may be read in training, by the words of the settings."""
    found = []
    for times in map(times_of, range(12)):
        if split == "global":
            ends = {"train": BEGIN + 2600, "valid": BEGIN + 3200, "test": np.inf}
            found.append([time for time in times if time < ends[until]])
        else:
            held_out = {"train": 2, "valid": 1, "test": 0}[until] if len(times) >= 3 else 0
            found.append(times[: len(times) - held_out])
    return found


@pytest.mark.parametrize("split", ["leave-one-out", "global"])
@pytest.mark.parametrize("until", ["train", "valid", "test"])
def test_what_is_trained_on(
    until: str,
    split: str,
    refits: Path,
    tmp_path: Path,
    seen: list[tuple[set[int], list[int]]],
) -> None:
    bindings = (*RECIPE, *(GLOBAL if split == "global" else ()), "xd_train.num_epochs = 2")
    bindings = (*bindings, f"xd_train.train_until = {until!r}")
    assert train("--data", refits / "log", "--out", tmp_path / "run", bindings=bindings) == 0
    expected = trained_times(until, split)
    steps = len(seen) // 2
    for epoch in (seen[:steps], seen[steps:]):
        targets = Counter(time for _, each in epoch for time in each)
        # Every event but a user's first is a target once an epoch, and none that is held out.
        assert targets == Counter(time for times in expected for time in times[1:])
        read = set().union(*(each for each, _ in epoch))
        assert read == {time for times in expected for time in times[:-1]}
    measured = {"train": {"valid", "test"}, "valid": {"test"}, "test": set()}[until]
    summary = facts(tmp_path / "run", "summary")
    assert summary.keys() & {"valid", "test"} == measured
    assert ("best_epoch" in summary) == (until == "train")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["split"] for row in rows} == measured | {"train"}


def test_a_refit_takes_settings_and_epochs_and_trains_on_validation_targets(
    refits: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    assert train("--refit", refits / "run", "--out", out) == 0
    said = capsys.readouterr().out
    assert sorted(time for _, targets in seen for time in targets) == sorted(
        5 * [time for times in trained_times("valid", "") for time in times[1:]]
    )
    # The last event of users of three or more is never read, nor is it a target.
    tests = {times_of(user)[-1] for user in range(12) if len(times_of(user)) >= 3}
    assert not any(tests & (read | set(targets)) for read, targets in seen)
    ours, theirs = facts(out), facts(refits / "run")
    assert ours["train"] == theirs["train"] | {"train_until": "valid"}
    assert all(ours[part] == theirs[part] for part in ("encoder", "protocol", "item", "seed"))
    recorded = ours["refits"]
    assert recorded["run"] == str((refits / "run").resolve())
    assert (recorded["best_epoch"], recorded["epochs"]) == (4, 5)
    assert ours["variant_name"] == "HSTU + until valid"
    assert f"{out}: trained 5 epochs on all up to valid targets, test hr@10 " in said
    assert "epoch 4: loss " in said
    assert "valid ndcg" not in said
    assert_same_weights(out, refits / "again")


def test_the_last_average_is_kept(refits: Path) -> None:
    kept, metadata = load_checkpoint(refits / "again" / "best.safetensors")
    last, progress = load_checkpoint(refits / "again" / "last.safetensors")
    assert metadata["epoch"] == 4
    assert progress["progress"]["epoch"] == 5
    assert all(torch.equal(last[f"averaged.module.{name}"], kept[name]) for name in kept)


def test_it_is_the_run_of_a_log_without_the_test_targets(refits: Path, tmp_path: Path) -> None:
    """Everything of the shorter log trains there, so the bits are the same."""
    lines = log_lines()
    sizes = Counter(line[0] for line in lines)
    last = {user: times_of(user)[-1] for user, size in sizes.items() if size >= 3}
    cut = [line for line in lines if line[3] != last.get(line[0])]
    store = prepare(cut, tmp_path / "cut.csv")
    bindings = (*RECIPE, "xd_train.train_until = 'test'", "xd_train.num_epochs = 6")
    assert {line[1] for line in cut} == {line[1] for line in lines}
    # A run of six epochs, stopped by hand after the fifth: a schedule is over all of them.
    whole = tmp_path / "whole"
    assert train("--data", store, "--out", whole, bindings=bindings) == 0
    shutil.copytree(refits / "run", tmp_path / "run")
    summary = facts(tmp_path / "run", "summary")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"best_epoch": 5}))
    assert train("--refit", tmp_path / "run", "--out", tmp_path / "again") == 0
    assert_same_weights(tmp_path / "again", whole)


def test_rates_are_those_of_the_run(
    refits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    rate_at = trainers.rate_at

    def watched(settings: Any, step: int, done: float) -> float:
        asked.append(done)
        return rate_at(settings, step, done)

    monkeypatch.setattr(trainers, "rate_at", watched)
    assert train("--refit", refits / "run", "--out", tmp_path / "again") == 0
    # Five of the six epochs that the cosine is over.
    assert min(asked) == 0
    assert 4 / 6 < max(asked) < 5 / 6


def stop_in_step(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def stopped(self: Trainer, data: SequenceData, users: np.ndarray) -> int:
        if self.progress.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, data, users)

    monkeypatch.setattr(Trainer, "_step", stopped)


@pytest.mark.parametrize("at", [1, 9])
def test_a_stopped_refit_goes_on_to_the_same_bits(
    at: int,
    refits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_in_step(at, patch)
        assert train("--refit", refits / "run", "--out", out) == 143
    command = capsys.readouterr().err.strip().partition("go on with: hstu-xd ")[2]
    assert command == f"train --data {refits / 'log'} --out {out} --resume"
    assert run(shlex.split(command)) == 0
    assert_same_weights(out, refits / "again")
    summaries = [facts(each, "summary") for each in (out, refits / "again")]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert summaries[0]["epochs"] == 5
    assert facts(out)["refits"] == facts(refits / "again")["refits"]


def test_a_refit_on_everything_is_served_and_never_measured(
    refits: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    assert train("--refit", refits / "run", "--out", out, "--until", "test") == 0
    said = capsys.readouterr().out
    assert f"{out}: trained 5 epochs on all up to test targets, measured on nothing\n" in said
    assert "evaluate" not in said
    assert {time for _, targets in seen for time in targets} == {
        time for user in range(12) for time in times_of(user)[1:]
    }
    message = (
        f"{out} was trained on the targets of test (xd_train.train_until = 'test'), so its numbers "
        f"there mean nothing; measure the run that it is a refit of, {(refits / 'run').resolve()}\n"
    )
    assert run(["evaluate", str(out)]) == 2
    assert capsys.readouterr().err == f"hstu-xd: {message}"
    assert run(["compare", str(refits / "run"), str(out)]) == 2
    assert capsys.readouterr().err == f"hstu-xd: {message}"
    assert run(["export", str(out), "--out", str(tmp_path / "export")]) == 0
    file = tmp_path / "lists.parquet"
    words = ["recommend", str(out), "--all-users", "--k", "2", "--out", str(file)]
    assert run(words) == 0
    assert pl.read_parquet(file).height > 0
    assert hstu_xd.load(out).training is False
    assert run(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "was trained on all targets, those of test, too, for as many epochs as the best" in page


def test_evaluate_leaves_validation_out(refits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(refits / "again")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("valid is left out: the run was trained on its targets\ntest (%)")
    assert run(["evaluate", str(refits / "again"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "valid" not in told
    assert told["test"]["count"] == facts(refits / "again", "summary")["test"]["count"]


@pytest.mark.parametrize(
    ("until", "told"),
    [
        ("train", "2600 train, and of those from there on and from 3200 on a user's last one is"),
        (
            "valid",
            "3200 train, and of those from there on a user's last one is the target of test.",
        ),
    ],
)
def test_a_cut_in_time_is_told_as_it_was_trained_on(
    until: str, told: str, refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    bindings = (*RECIPE, *GLOBAL, f"xd_train.train_until = {until!r}", "xd_train.num_epochs = 1")
    assert train("--data", refits / "log", "--out", out, bindings=bindings) == 0
    capsys.readouterr()
    assert run(["evaluate", str(out)]) == 0
    said = re.sub(
        r"15000(\d{4,5}) \([-\d :]+\)", lambda m: m[1].lstrip("0"), capsys.readouterr().out
    )
    assert f"events before {told}" in said


def test_compare_and_report_say_what_a_run_was_trained_on(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(refits / "run"), str(refits / "again")]
    note = (
        "HSTU + until valid was trained on validation targets, too, for as many epochs as the "
        f"best one of {(refits / 'run').resolve()} took."
    )
    assert run(["compare", *runs]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| HSTU + until valid | 1 | ")
    assert note in said
    twice = tmp_path / "twice"
    shutil.copytree(refits / "again", twice)
    recorded = facts(twice) | {"refits": {"run": "another"}, "seed": 5}
    (twice / "run.json").write_text(json.dumps(recorded))
    assert run(["compare", *runs, str(twice)]) == 0
    told = f"the best ones of {(refits / 'run').resolve()}, another took."
    assert told in capsys.readouterr().out
    assert run(["compare", *runs, "--split", "valid"]) == 2
    assert (
        "again was trained on the targets of valid (xd_train.train_until = 'valid'), so its "
        "numbers there mean nothing; measure it on test, or leave it out"
    ) in capsys.readouterr().err
    assert run(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    assert note in (tmp_path / "report" / "index.html").read_text()


def test_runs_of_one_name_that_were_trained_on_more_are_told_apart(
    refits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the earlier run knows nothing of the setting."""
    for name in ("old", "named"):
        shutil.copytree(refits / ("run" if name == "old" else "again"), tmp_path / name)
    old = facts(tmp_path / "old")
    del old["train"]["train_until"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(old))
    named = facts(tmp_path / "named") | {"variant_name": "HSTU"}
    (tmp_path / "named" / "run.json").write_text(json.dumps(named))
    runs = [str(tmp_path / "old"), str(tmp_path / "named")]
    assert run(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    assert "Runs of HSTU differ in train.train_until, not only in their seed." in caplog.text
    caplog.clear()
    runs = [str(tmp_path / "old"), str(refits / "run")]
    assert run(["report", *runs, "--out", str(tmp_path / "other")]) == 0
    assert "train_until" not in caplog.text


def test_a_continued_run_is_continued_again(
    refits: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same weights, on what is new in the log and on what was held out of it."""
    lines = log_lines()
    news = [
        (user, "books2", "books", BEGIN + 9000 + 10 * user + n) for n in (0, 1) for user in (7, 8)
    ]
    store = prepare([*lines, *news], tmp_path / "newer.csv")
    shutil.copytree(refits / "run", tmp_path / "old")
    words = ("--data", store, "--out", tmp_path / "run", "--continue-from", tmp_path / "old")
    little = ("xd_train.replay_share = 0.0", "xd_train.num_epochs = 2", "xd_train.news_context = 2")
    assert train(*words, bindings=little) == 0

    def targets() -> set[int]:
        found = {time for _, times in seen for time in times}
        seen.clear()
        return found

    held_out = {time for user in (7, 8) for time in times_of(user)[-2:]}
    assert held_out <= targets()
    again = tmp_path / "again"
    assert train("--refit", tmp_path / "run", "--out", again) == 0
    # Of every user the last event but one of the earlier log is new to training, too.
    held_out = {times_of(user)[-2] for user in range(12) if len(times_of(user)) >= 3}
    held_out |= {times_of(user)[-1] for user in (7, 8)}
    newer = {BEGIN + 9000 + 10 * user for user in (7, 8)}
    assert held_out | newer <= targets()
    assert facts(again)["continues"]["run"] == facts(tmp_path / "run")["continues"]["run"]
    assert facts(again)["refits"]["run"] == str((tmp_path / "run").resolve())
    with (tmp_path / "old" / "best.safetensors").open("ab") as file:
        file.write(b"!")
    assert refused(capsys, "--refit", tmp_path / "run", "--out", tmp_path / "third") == (
        f"{tmp_path / 'run'} continues {(tmp_path / 'old').resolve()}, which no longer holds the "
        "weights that it began with; put them back there, or refit a run that was trained from "
        "nothing"
    )


def test_a_baseline_counts_what_is_trained_on(refits: Path, tmp_path: Path) -> None:
    bindings = ("xd_train.baseline = 'popularity'", "xd_train.train_until = 'valid'")
    assert train("--data", refits / "log", "--out", tmp_path / "run", bindings=bindings) == 0
    counted, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    (counts,) = (value for value in counted.values() if value.ndim)
    assert int(counts.sum()) == sum(
        len(times) for times in trained_times("valid", "") if len(times) > 1
    )
    summary = facts(tmp_path / "run", "summary")
    assert "valid" not in summary
    assert "test" in summary


def test_new_items_are_those_without_an_event_that_trains(refits: Path) -> None:
    store = InteractionStore.open(refits / "log")
    lines = log_lines()
    cuts, found = TimeCuts(BEGIN + 1, BEGIN + 2600), []
    for until, end in ((Split.TRAIN, cuts.valid_from), (Split.VALID, cuts.test_from)):
        test = SequenceData(store, Split.TEST, 40, cuts, until=until)
        known = {item for _, item, _, time in lines if time < end}
        targets = {}
        for user, item, _, time in lines:
            if time >= cuts.test_from:
                targets[user] = item
        expected = sum(item not in known for item in targets.values())
        found.append(test.counts.get("count_new_items", 0))
        assert found[-1] == expected
    assert found[0] > found[1]


def test_new_items_are_told_by_what_a_run_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is met while validation lasts, and is a target of test."""
    news = [(user, "books_new", "books", BEGIN + time) for user, time in ((7, 2700), (8, 5000))]
    store = prepare([*log_lines(), *news], tmp_path / "log.csv")
    for until in ("train", "valid"):
        out = tmp_path / until
        bindings = (*RECIPE, *GLOBAL, "xd_train.num_epochs = 1")
        bindings = (*bindings, f"xd_train.train_until = {until!r}")
        assert train("--data", store, "--out", out, bindings=bindings) == 0
        other = tmp_path / f"{until}_too"
        shutil.copytree(out, other)
        recorded = facts(other) | {"variant_name": "other"}
        (other / "run.json").write_text(json.dumps(recorded))
        for words in (["evaluate", str(out)], ["compare", str(out), str(other)]):
            capsys.readouterr()
            assert run(words) == 0
            said = "items without an event that trains" in capsys.readouterr().out
            assert said == (until == "train"), words
