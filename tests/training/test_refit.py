"""A run that is trained again on its held-out events: what it sees, keeps, says and refuses."""

import json
import os
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
from quick_runs import QUICKEST

import hstu_xd
from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.cuts import TimeCuts
from hstu_xd.data.store import InteractionStore
from hstu_xd.training import trainer as trainers
from hstu_xd.training.checkpoint import load_checkpoint
from hstu_xd.training.trainer import Trainer

BEGIN = 1_500_000_000
RECIPE = (
    *QUICKEST,
    "xd_train.max_sequence_length = 40",
    "xd_train.num_epochs = 6",
    "xd_train.early_stop_patience = 6",
    "xd_train.local_batch_size = 4",
    "xd_train.learning_rate_schedule = 'cosine'",
)
GLOBAL = ("xd_evaluate.split = 'global'", f"xd_evaluate.valid_from = {BEGIN + 2600}")
GLOBAL = (*GLOBAL, f"xd_evaluate.test_from = {BEGIN + 3200}")

Line = tuple[int, str, str, int]


def log_lines() -> list[Line]:
    """Users of 1 to 14 events in two domains; every event has a time of its own."""
    lines = []
    for user in range(12):
        for event in range(1 + (user * 5) % 14):
            number = (user + event) % 10
            domain = ("books", "films")[number % 2]
            lines.append((user, f"{domain}{number}", domain, BEGIN + 300 * event + user))
    return lines


def prepare(lines: list[Line], file: Path) -> Path:
    text = [f"u{user},{item},{domain},{time}" for user, item, domain, time in lines]
    file.write_text("\n".join(["user,item,domain,timestamp", *text]) + "\n")
    assert run(["prepare", str(file), "--out", str(file.with_suffix(""))]) == 0
    return file.with_suffix("")


def train(*words: object, bindings: tuple[str, ...] = ()) -> int:
    recipe = [word for binding in bindings for word in ("--gin_bindings", binding)]
    return run(["train", *map(str, words), *recipe])


def facts(out: Path, name: str = "run") -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a run on it whose best epoch is its fifth, and its refit."""
    folder = tmp_path_factory.mktemp("refit")
    store = prepare(log_lines(), folder / "log.csv")
    assert train("--data", store, "--out", folder / "run", "--name", "HSTU", bindings=RECIPE) == 0
    summary = facts(folder / "run", "summary")
    (folder / "run" / "summary.json").write_text(json.dumps(summary | {"best_epoch": 4}))
    assert train("--refit", folder / "run", "--out", folder / "again") == 0
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], list[int]]]:
    """Of every training step: times of the events that are read, and of those that are targets."""
    forward, found = trainers._Loss.forward, []

    def watched(self: Any, batch: Any, targets: Any, generator: Any) -> Any:
        found.append((set(batch.timestamps.tolist()), batch.next_timestamps.tolist()))
        return forward(self, batch, targets, generator)

    monkeypatch.setattr(trainers._Loss, "forward", watched)
    return found


def times_of(user: int) -> list[int]:
    return [time for u, _, _, time in log_lines() if u == user]


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
    until: str, split: str, first: Path, tmp_path: Path, seen: list[tuple[set[int], list[int]]]
) -> None:
    bindings = (*RECIPE, *(GLOBAL if split == "global" else ()), "xd_train.num_epochs = 2")
    bindings = (*bindings, f"xd_train.train_until = {until!r}")
    assert train("--data", first / "log", "--out", tmp_path / "run", bindings=bindings) == 0
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
    first: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    assert train("--refit", first / "run", "--out", out) == 0
    said = capsys.readouterr().out
    assert sorted(time for _, targets in seen for time in targets) == sorted(
        5 * [time for times in trained_times("valid", "") for time in times[1:]]
    )
    # The last event of users of three or more is never read, nor is it a target.
    tests = {times_of(user)[-1] for user in range(12) if len(times_of(user)) >= 3}
    assert not any(tests & (read | set(targets)) for read, targets in seen)
    ours, theirs = facts(out), facts(first / "run")
    assert ours["train"] == theirs["train"] | {"train_until": "valid"}
    assert all(ours[part] == theirs[part] for part in ("encoder", "protocol", "item", "seed"))
    refits = ours["refits"]
    assert refits["run"] == str((first / "run").resolve())
    assert (refits["best_epoch"], refits["epochs"]) == (4, 5)
    assert ours["variant_name"] == "HSTU + until valid"
    assert f"{out}: trained 5 epochs on all up to valid targets, test hr@10 " in said
    assert "epoch 4: loss " in said
    assert "valid ndcg" not in said
    assert_same_weights(out, first / "again")


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (load_checkpoint(each / "best.safetensors")[0] for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_last_average_is_kept(first: Path) -> None:
    kept, metadata = load_checkpoint(first / "again" / "best.safetensors")
    last, progress = load_checkpoint(first / "again" / "last.safetensors")
    assert metadata["epoch"] == 4
    assert progress["progress"]["epoch"] == 5
    assert all(torch.equal(last[f"averaged.module.{name}"], kept[name]) for name in kept)


def test_it_is_the_run_of_a_log_without_the_test_targets(first: Path, tmp_path: Path) -> None:
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
    shutil.copytree(first / "run", tmp_path / "run")
    summary = facts(tmp_path / "run", "summary")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"best_epoch": 5}))
    assert train("--refit", tmp_path / "run", "--out", tmp_path / "again") == 0
    assert_same_weights(tmp_path / "again", whole)


def test_rates_are_those_of_the_run(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    rate_at = trainers.rate_at

    def watched(settings: Any, step: int, done: float) -> float:
        asked.append(done)
        return rate_at(settings, step, done)

    monkeypatch.setattr(trainers, "rate_at", watched)
    assert train("--refit", first / "run", "--out", tmp_path / "again") == 0
    # Five of the six epochs that the cosine is over.
    assert max(asked) < 5 / 6 < max(asked) + len(asked[:1]) / 6
    assert min(asked) == 0


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
    first: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_in_step(at, patch)
        assert train("--refit", first / "run", "--out", out) == 143
    command = capsys.readouterr().err.strip().partition("go on with: hstu-xd ")[2]
    assert command == f"train --data {first / 'log'} --out {out} --resume"
    assert run(shlex.split(command)) == 0
    assert_same_weights(out, first / "again")
    summaries = [facts(each, "summary") for each in (out, first / "again")]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert summaries[0]["epochs"] == 5
    assert facts(out)["refits"] == facts(first / "again")["refits"]


def test_a_refit_on_everything_is_served_and_never_measured(
    first: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    assert train("--refit", first / "run", "--out", out, "--until", "test") == 0
    said = capsys.readouterr().out
    assert f"{out}: trained 5 epochs on all up to test targets, measured on nothing\n" in said
    assert "evaluate" not in said
    assert {time for _, targets in seen for time in targets} == {
        time for user in range(12) for time in times_of(user)[1:]
    }
    message = (
        f"{out} was trained on the targets of test (xd_train.train_until = 'test'), so its numbers "
        f"there mean nothing; measure the run that it is a refit of, {(first / 'run').resolve()}\n"
    )
    assert run(["evaluate", str(out)]) == 2
    assert capsys.readouterr().err == f"hstu-xd: {message}"
    assert run(["compare", str(first / "run"), str(out)]) == 2
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


def test_evaluate_leaves_validation_out(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(first / "again")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("valid is left out: the run was trained on its targets\ntest (%)")
    assert run(["evaluate", str(first / "again"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "valid" not in told
    assert told["test"]["count"] == facts(first / "again", "summary")["test"]["count"]


def test_compare_and_report_say_what_a_run_was_trained_on(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(first / "run"), str(first / "again")]
    note = (
        "HSTU + until valid was trained on validation targets, too, for as many epochs as the "
        f"best one of {(first / 'run').resolve()} took."
    )
    assert run(["compare", *runs]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| HSTU + until valid | 1 | ")
    assert note in said
    assert run(["compare", *runs, "--split", "valid"]) == 2
    assert (
        "again was trained on the targets of valid (xd_train.train_until = 'valid'), so its "
        "numbers there mean nothing; measure it on test, or leave it out"
    ) in capsys.readouterr().err
    assert run(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    assert note in (tmp_path / "report" / "index.html").read_text()


def test_runs_of_one_name_that_were_trained_on_more_are_told_apart(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the earlier run knows nothing of the setting."""
    for name in ("old", "named"):
        shutil.copytree(first / ("run" if name == "old" else "again"), tmp_path / name)
    old = facts(tmp_path / "old")
    del old["train"]["train_until"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(old))
    named = facts(tmp_path / "named") | {"variant_name": "HSTU"}
    (tmp_path / "named" / "run.json").write_text(json.dumps(named))
    runs = [str(tmp_path / "old"), str(tmp_path / "named")]
    assert run(["report", *runs, "--out", str(tmp_path / "report")]) == 0
    assert "Runs of HSTU differ in train.train_until, not only in their seed." in caplog.text
    caplog.clear()
    runs = [str(tmp_path / "old"), str(first / "run")]
    assert run(["report", *runs, "--out", str(tmp_path / "other")]) == 0
    assert "train_until" not in caplog.text


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert train(*words) == 2
    return capsys.readouterr().err.removeprefix("hstu-xd: ").rstrip("\n")


def test_what_cannot_be_refit(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, new = first / "log", tmp_path / "new"
    said = refused(capsys, "--refit", first / "again", "--out", new)
    assert said == (
        f"{first / 'again'} was trained with xd_train.train_until = 'valid', so validation has "
        "picked no epoch of it; refit the run that it is a refit of, "
        f"{(first / 'run').resolve()}"
    )
    (tmp_path / "begun").mkdir()
    shutil.copy(first / "run" / "run.json", tmp_path / "begun")
    said = refused(capsys, "--refit", tmp_path / "begun", "--out", new)
    assert said == (
        f"{tmp_path / 'begun'} has no summary.json yet, so its best epoch is not known; finish it "
        f"with --out {tmp_path / 'begun'} --resume"
    )
    alone = tmp_path / "alone"
    lonely = (*RECIPE, "xd_train.train_until = 'valid'", "xd_train.num_epochs = 1")
    assert train("--data", store, "--out", alone, bindings=lonely) == 0
    assert "no epoch of it; refit one that was trained without" in refused(
        capsys, "--refit", alone, "--out", new
    )
    counted = tmp_path / "counted"
    popular = ("xd_train.baseline = 'popularity'",)
    assert train("--data", store, "--out", counted, bindings=popular) == 0
    assert refused(capsys, "--refit", counted, "--out", new) == (
        f"{counted} is the baseline 'popularity', which counts and has no epochs; count more by "
        "xd_train.train_until = 'valid'"
    )
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "run.json").write_text('{"kind": "ranking"}')
    assert refused(capsys, "--refit", tmp_path / "ranks", "--out", new) == (
        f"{tmp_path / 'ranks'} is a ranking run; --refit knows runs of hstu-xd train alone"
    )
    assert not new.exists()


def test_a_continued_run_is_continued_again(
    first: Path, tmp_path: Path, seen: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same weights, on what is new in the log and on what was held out of it."""
    lines = log_lines()
    news = [
        (user, "books2", "books", BEGIN + 9000 + 10 * user + n) for n in (0, 1) for user in (7, 8)
    ]
    store = prepare([*lines, *news], tmp_path / "newer.csv")
    shutil.copytree(first / "run", tmp_path / "old")
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


def test_the_store_is_that_of_the_run(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first / "run", tmp_path / "run")
    shutil.copytree(first / "log", tmp_path / "moved")
    recorded = facts(tmp_path / "run") | {"data": str(tmp_path / "gone")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(recorded))
    words = ("--refit", tmp_path / "run", "--out", tmp_path / "again")
    assert refused(capsys, *words) == (
        f"{tmp_path / 'gone'}, the store of {tmp_path / 'run'}, is not there; say by --data where "
        "it has moved"
    )
    other = prepare(log_lines()[:-1], tmp_path / "other.csv")
    said = refused(capsys, *words, "--data", other)
    assert said.startswith(f"{other} is not the store that {tmp_path / 'run'} was trained on (")
    assert said.endswith(
        f"; give that one by --data, it was {tmp_path / 'gone'}, or train a run on this one first"
    )
    shutil.copytree(other, tmp_path / "gone")
    assert "it was prepared again since: prepare the old log there again, or train a run" in (
        refused(capsys, *words)
    )
    assert train(*words, "--data", tmp_path / "moved") == 0
    assert_same_weights(tmp_path / "again", first / "again")


def test_options_that_exclude_one_another(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, refit = ("--out", tmp_path / "new"), ("--refit", first / "run")
    assert refused(capsys, *out) == ("--data is needed, a prepared store; --refit alone knows one")
    assert refused(capsys, *out, *refit, "--until", "train") == (
        "--until train; one of valid, test"
    )
    data = ("--data", first / "log")
    assert refused(capsys, *out, *data, "--until", "test") == (
        "--until test has no meaning without --refit; a training that is no refit has the binding "
        "\"xd_train.train_until = 'test'\""
    )
    assert refused(capsys, *out, *refit, "--gin_bindings", "xd_train.num_epochs = 3") == (
        f"--refit trains with the settings of {first / 'run'}, and xd_train.num_epochs = 3 is "
        "given beside it; leave it out, or train without --refit"
    )
    said = "begins a new run and --resume goes on with one, which knows"
    assert said in refused(capsys, *out, *refit, "--resume")
    both = refused(capsys, *out, *refit, "--continue-from", first / "run")
    assert both.startswith("--continue-from begins a new run and --refit another one")


def test_nothing_continues_a_last_training(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--data", first / "log", "--out", tmp_path / "new")
    assert refused(capsys, *out, "--continue-from", first / "again") == (
        f"{first / 'again'} was trained with xd_train.train_until = 'valid', a last training that "
        "nothing continues; continue a run that was trained until 'train', such as the one that "
        "it may be a refit of"
    )
    until = ("--gin_bindings", "xd_train.train_until = 'test'")
    assert refused(capsys, *out, "--continue-from", first / "run", *until) == (
        "xd_train.train_until = 'test' leaves validation nothing to pick the epoch of a continued "
        "run by; leave it at 'train'"
    )


def test_settings_that_pick_an_epoch_do_nothing_in_a_last_training(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ("--data", first / "log", "--out", tmp_path / "new")
    bindings = (*RECIPE, "xd_train.num_epochs = 1", "xd_train.train_until = 'valid'")
    bindings = (*bindings, "xd_train.select_metric = 'mrr[nobody]'")
    assert train(*out, bindings=bindings) == 0
    for setting in ("early_stop_patience = 6", "select_metric = 'mrr[nobody]'"):
        said = f"xd_train.{setting} does nothing without xd_train.train_until = 'train'"
        assert said in caplog.text


def test_ablations_and_searches(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One table holds variants that were trained on as much, and a search has its validation."""
    data = ["--data", str(first / "log"), "--out", str(tmp_path / "out")]
    until = ["--gin_bindings", "xd_train.train_until = {!r}"]
    file = tmp_path / "mine.gin"
    file.write_text("xd_train.train_until = 'valid'\n")
    ablate = ["ablate", *data, "--seeds", "1"]
    assert run([*ablate, "--variants", f"popularity,{file}"]) == 2
    assert (
        f"variant {file} has xd_train.train_until = 'valid', popularity 'train': one of them is "
        "trained on more; put the setting into the recipe that all share"
    ) in capsys.readouterr().err
    assert run([*ablate, "--variants", "popularity", until[0], until[1].format("test")]) == 2
    assert (
        "xd_train.train_until = 'test' leaves nothing to measure variants by; compare them with "
        "'train' or 'valid'"
    ) in capsys.readouterr().err
    valid = [until[0], until[1].format("valid")]
    assert run([*ablate, "--variants", "popularity", *valid]) == 0
    assert "popularity was trained on validation targets, too.\n" in capsys.readouterr().out
    assert run([*ablate, "--variants", "popularity"]) == 2
    assert "not xd_train.train_until = 'train' but 'valid'" in capsys.readouterr().err
    pytest.importorskip("optuna")
    for words in (valid, ["--gin_bindings", 'xd_tune.space = ("xd_train.train_until = [1, 2]",)']):
        tune = ["tune", "--data", str(first / "log"), "--out", str(tmp_path / "tuned")]
        assert run([*tune, "--trials", "1", *words]) == 2
    assert capsys.readouterr().err.count("a search picks by validation targets, which") == 1


def test_a_baseline_counts_what_is_trained_on(first: Path, tmp_path: Path) -> None:
    bindings = ("xd_train.baseline = 'popularity'", "xd_train.train_until = 'valid'")
    assert train("--data", first / "log", "--out", tmp_path / "run", bindings=bindings) == 0
    counted, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    (counts,) = (value for value in counted.values() if value.ndim)
    assert int(counts.sum()) == sum(
        len(times) for times in trained_times("valid", "") if len(times) > 1
    )
    summary = facts(tmp_path / "run", "summary")
    assert "valid" not in summary
    assert "test" in summary


def test_new_items_are_those_without_an_event_that_trains(first: Path) -> None:
    store = InteractionStore.open(first / "log")
    lines = log_lines()
    cuts = TimeCuts(BEGIN + 600, BEGIN + 2600)
    for until, end in ((Split.TRAIN, cuts.valid_from), (Split.VALID, cuts.test_from)):
        test = SequenceData(store, Split.TEST, 40, cuts, until=until)
        known = {item for _, item, _, time in lines if time < end}
        targets = {}
        for user, item, _, time in lines:
            if time >= cuts.test_from:
                targets[user] = item
        expected = sum(item not in known for item in targets.values())
        assert test.counts.get("count_new_items", 0) == expected
