"""A run folder that a stopped or refused training leaves behind can be used again."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_runs import QUICK

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.training import run as runs
from hstu_xd.training.distributed import World
from hstu_xd.training.settings import RunSettings, load_settings
from hstu_xd.training.trainer import Trainer


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def settings(*more: str) -> RunSettings:
    return load_settings([], [*QUICK, "xd_train.checkpoint_every = 1", *more])


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(store_path, settings(), run)
    return run


def killed_after(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """Train and die right after the first call of a method of the trainer."""
    method = getattr(Trainer, name)

    def dies(trainer: Trainer, *arguments: object) -> None:
        method(trainer, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, name, dies)
        with pytest.raises(Killed):
            runs.train(*arguments)


def test_killed_before_the_first_row_of_metrics_it_resumes(
    whole: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    killed_after("_save", monkeypatch, store_path, settings(), run)
    assert (run / "last.safetensors").exists()
    assert not (run / "metrics.jsonl").exists()
    runs.train(store_path, settings(), run, resume=True)
    assert rows(run) == rows(whole)


def test_killed_before_the_first_checkpoint_no_row_comes_twice(
    whole: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rare = tmp_path / "run", settings("xd_train.checkpoint_every = 1000")
    killed_after("evaluate", monkeypatch, store_path, rare, run)
    assert [row["split"] for row in rows(run)] == ["train"]
    assert not (run / "last.safetensors").exists()
    runs.train(store_path, settings(), run, resume=True)
    assert rows(run) == rows(whole)


def test_stopped_before_it_was_a_run_it_can_begin_again(
    whole: Path, store_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.gin", "catalog.parquet"):  # run.json is the last to come
        (run / name).write_bytes((whole / name).read_bytes()[:20])
    runs.train(store_path, settings(), run)
    assert rows(run) == rows(whole)


def test_folder_of_something_else_is_refused_and_not_said_to_be_resumable(
    store_path: Path, tmp_path: Path
) -> None:
    for other in (tmp_path / "folder", tmp_path / "file"):
        if other.name == "folder":
            other.mkdir()
            (other / "thesis.tex").write_text("x")
        else:
            other.write_text("x")
        with pytest.raises(InputError, match=rf"{other.name}.*not a run folder.*--out"):
            runs.train(store_path, settings(), other)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ('xd_encoder.impl = "fast"', "'fast' is not available here; use auto"),
        ("xd_train.main_module_bf16 = True", "needs CUDA"),
        ("xd_train.random_seed = 18446744073709551616", "random_seed.*at most"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binding: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HstuXdError, match=message):
        runs.train(store_path, settings(binding), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_says_which_settings_it_was_given_in_vain(
    whole: Path, store_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for given in (None, settings()):
        runs.train(store_path, given, run, resume=True)
        assert not caplog.records
    runs.train(store_path, settings("xd_train.num_epochs = 3"), run, resume=True)
    assert "goes on with its own settings: not xd_train.num_epochs = 3 but 1" in caplog.text
    assert rows(run) == rows(whole)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_has_the_mode_that_the_umask_gives(
    umask: int, store_path: Path, tmp_path: Path
) -> None:
    run, before = tmp_path / "run", os.umask(umask)
    try:
        runs.train(store_path, settings(), run)
    finally:
        os.umask(before)
    found = {path.name: path for path in run.rglob("*")}
    assert {"best.safetensors", "last.safetensors", "run.json", "summary.json"} <= found.keys()
    for name, path in found.items():
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~umask, name


def test_unreadable_checkpoint_is_not_an_absent_one(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, denied = Path.open, whole / "best.safetensors"

    def refused(self: Path, *args: Any, **options: Any) -> object:
        if self == denied:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"best.safetensors: cannot be read \(Permission denied"):
        runs.load(whole)


def test_damaged_record_of_a_run_is_named(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "run.json").write_text('{"data": ')
    with pytest.raises(InputError, match=r"run\.json: not JSON.*restore the file"):
        runs.load(run)


class AsTwo(World):
    """A process whose twin has always lost as much."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


def test_what_several_processes_have_lost_is_resumed_once(
    whole: Path, store: InteractionStore, tmp_path: Path
) -> None:
    run, device = tmp_path / "run", torch.device("cpu")
    shutil.copytree(whole, run)

    def trainer(world: World) -> Trainer:
        return Trainer(runs.load(run), store, settings().train, run, world)

    stops = trainer(AsTwo(0, 1, device))
    stops.resume(processes=1)
    stops.progress.loss_sum = 3.0
    stops._save()
    assert stops.progress.loss_sum == 3.0
    for rank, loss in ((0, 6.0), (1, 0.0)):
        resumed = trainer(World(rank, 1, device))
        resumed.resume(processes=1)
        assert resumed.progress.loss_sum == loss
