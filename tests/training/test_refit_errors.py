"""What cannot be trained again, and what must not be compared or searched with a refit."""

import json
import shutil
from pathlib import Path

import pytest
from refit_runs import RECIPE, assert_same_weights, facts, log_lines, prepare, refused, train

from hstu_xd.cli.app import run


def test_what_cannot_be_refit(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, new = refits / "log", tmp_path / "new"
    said = refused(capsys, "--refit", refits / "again", "--out", new)
    assert said == (
        f"{refits / 'again'} was trained with xd_train.train_until = 'valid', so validation has "
        "picked no epoch of it; refit the run that it is a refit of, "
        f"{(refits / 'run').resolve()}"
    )
    (tmp_path / "begun").mkdir()
    shutil.copy(refits / "run" / "run.json", tmp_path / "begun")
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


def test_the_store_is_that_of_the_run(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(refits / "run", tmp_path / "run")
    shutil.copytree(refits / "log", tmp_path / "moved")
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
    assert_same_weights(tmp_path / "again", refits / "again")


def test_options_that_exclude_one_another(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, refit = ("--out", tmp_path / "new"), ("--refit", refits / "run")
    assert refused(capsys, *out) == ("--data is needed, a prepared store; --refit alone knows one")
    assert refused(capsys, *out, *refit, "--until", "train") == (
        "--until train; one of valid, test"
    )
    data = ("--data", refits / "log")
    assert refused(capsys, *out, *data, "--until", "test") == (
        "--until test has no meaning without --refit; a training that is no refit has the binding "
        "\"xd_train.train_until = 'test'\""
    )
    assert refused(capsys, *out, *refit, "--gin_bindings", "xd_train.num_epochs = 3") == (
        f"--refit trains with the settings of {refits / 'run'}, and xd_train.num_epochs = 3 is "
        "given beside it; leave it out, or train without --refit"
    )
    said = "begins a new run and --resume goes on with one, which knows"
    assert said in refused(capsys, *out, *refit, "--resume")
    both = refused(capsys, *out, *refit, "--continue-from", refits / "run")
    assert both.startswith("--continue-from begins a new run and --refit another one")


def test_nothing_continues_a_last_training(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--data", refits / "log", "--out", tmp_path / "new")
    assert refused(capsys, *out, "--continue-from", refits / "again") == (
        f"{refits / 'again'} was trained with xd_train.train_until = 'valid', a last training that "
        "nothing continues; continue a run that was trained until 'train', such as the one that "
        "it may be a refit of"
    )
    until = ("--gin_bindings", "xd_train.train_until = 'test'")
    assert refused(capsys, *out, "--continue-from", refits / "run", *until) == (
        "xd_train.train_until = 'test' leaves validation nothing to pick the epoch of a continued "
        "run by; leave it at 'train'"
    )


def test_settings_that_pick_an_epoch_do_nothing_in_a_last_training(
    refits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ("--data", refits / "log", "--out", tmp_path / "new")
    bindings = (*RECIPE, "xd_train.num_epochs = 1", "xd_train.train_until = 'valid'")
    bindings = (*bindings, "xd_train.select_metric = 'mrr[nobody]'")
    assert train(*out, bindings=bindings) == 0
    for setting in ("early_stop_patience = 2", "select_metric = 'mrr[nobody]'"):
        said = f"xd_train.{setting} does nothing without xd_train.train_until = 'train'"
        assert said in caplog.text


def test_ablations_and_searches(
    refits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One table holds variants that were trained on as much, and a search has its validation."""
    data = ["--data", str(refits / "log"), "--out", str(tmp_path / "out")]
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
        tune = ["tune", "--data", str(refits / "log"), "--out", str(tmp_path / "tuned")]
        assert run([*tune, "--trials", "1", *words]) == 2
    assert capsys.readouterr().err.count("a search picks by validation targets, which") == 1
