"""A training that is asked to stop saves, says how to go on, and goes on to the same bits."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_runs import QUICK

from hstu_xd.cli import app
from hstu_xd.data.batches import Split
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.training import run as runs
from hstu_xd.training import trainer as trainers
from hstu_xd.training.checkpoint import load_checkpoint
from hstu_xd.training.interruption import STOPS_WITH_STDIN, StopRequest, stop_requests
from hstu_xd.training.settings import RunSettings, load_settings
from hstu_xd.training.trainer import Progress, Trainer

RECIPE = (
    *QUICK,
    "xd_train.num_epochs = 2",
    "xd_train.local_batch_size = 16",
    "xd_train.eval_batch_size = 50",
)
WATCHED = Path(__file__).with_name("watched_training.py")


def settings(*more: str) -> RunSettings:
    return load_settings([], [*RECIPE, *more])


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights, optimiser, progress and metrics to the bit; only times are not compared."""
    for name in ("best.safetensors", "last.safetensors"):
        (found, facts), (expected, others) = (load_checkpoint(r / name) for r in (run, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        for each in (facts, others):
            each.get("progress", {}).pop("train_seconds", None)
        assert facts == others
    assert rows(run) == rows(whole)
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, whole)]
    assert summaries[0]["test"] == summaries[1]["test"]


@pytest.fixture(scope="module")
def whole(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(store_path, settings(), run)
    return run


def send_in_step(at: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def interrupted(trainer: Trainer, data: object, users: np.ndarray) -> int:
        if trainer.progress.step == at:
            os.kill(os.getpid(), number)
        return step(trainer, data, users)

    monkeypatch.setattr(Trainer, "_step", interrupted)


def send_in_evaluation(at: tuple[Split, int], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer.evaluate

    def interrupted(trainer: Trainer, split: Split) -> dict[str, float]:
        if (split, trainer.progress.epoch) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, split)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)


@pytest.mark.parametrize(
    ("number", "name", "exit_code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (1, "SIGHUP", 129)],
)
@pytest.mark.parametrize("at", [0, 4, 19])
def test_stopped_in_a_step_it_goes_on_to_the_same_bits(
    number: int,
    name: str,
    exit_code: int,
    at: int,
    whole: Path,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "a run"
    before = [signal.signal(n, signal.default_int_handler) for n in (1, 2, 15)]
    try:
        with monkeypatch.context() as patch:
            send_in_step(at, number, patch)
            with pytest.raises(Interrupted) as stopped:
                runs.train(store_path, settings(), run)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        for n, handler in zip((1, 2, 15), before):
            signal.signal(n, handler)
    assert stopped.value.exit_code == exit_code
    epoch = 0 if at < 10 else 1
    # The step was finished: it is counted, and its state is saved.
    said = f"stopped by {name} after {at + 1} steps, in epoch {epoch}; go on with: hstu-xd train "
    assert str(stopped.value) == said + f"--data {store_path} --out '{run}' --resume"
    assert load_checkpoint(run / "last.safetensors")[1]["progress"]["step"] == at + 1
    assert not (run / "summary.json").exists()
    assert app.run(shlex.split(str(stopped.value).partition("hstu-xd ")[2])) == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("at", [(Split.VALID, 0), (Split.VALID, 1), (Split.TEST, 2)])
def test_stopped_in_an_evaluation_it_goes_on_to_the_same_bits(
    at: tuple[Split, int],
    whole: Path,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, batches = tmp_path / "run", []
    ranked = trainers.rank_targets

    def counted(*arguments: object, progress: object, **options: object) -> object:
        return ranked(*arguments, progress=lambda n: (batches.append(n), progress(n)), **options)

    with monkeypatch.context() as patch:
        send_in_evaluation(at, patch)
        patch.setattr(trainers, "rank_targets", counted)
        with pytest.raises(Interrupted):
            runs.train(store_path, settings(), run)
    # Four batches an evaluation; the interrupted one ends with its first.
    assert len(batches) % 4 == 1
    runs.train(store_path, None, run, resume=True)
    assert_same_run(run, whole)


def test_a_run_with_parts_of_its_own_says_that_they_must_be_allowed(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "stopped_parts.py"
    module.write_text(
        "import gin\n\n@gin.configurable\ndef top(ranks):\n    return (ranks == 1).float()\n"
    )
    file = tmp_path / "own.gin"
    file.write_text("import stopped_parts\nxd_train.metrics = (@top,)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    send_in_step(2, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted, match=r"--out run --resume --allow-imports$"):
        runs.train(store_path, load_settings([file], RECIPE), Path("run"))


def test_no_error_of_a_training_hides_a_stop() -> None:
    """A loop over trainings that goes on after an error does not go on after Ctrl-C."""
    assert not issubclass(Interrupted, Exception)
    assert issubclass(HstuXdError, Exception)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    try:
        with stop_requests(request):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.signal
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def line(store: Path, out: Path, *bindings: str) -> list[str]:
    words = ["train", "--data", str(store), "--out", str(out)]
    for binding in (*RECIPE, *bindings):
        words += ["--gin_bindings", binding]
    return words


def start(
    words: list[str], folder: Path | None = None, **environment: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests may ignore Ctrl-C, as a shell does behind &.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def watched(
    words: list[str],
    log: Path,
    *,
    rank: int = 0,
    at: int = -1,
    sent: str = "",
    folders: Sequence[Path | None] = (None,),
) -> list[tuple[int, str, str]]:
    """Run a watched training, a process in each folder; return exit codes, stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = len(folders)
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Those without a folder of their own are of one machine.
    job |= {"LOCAL_WORLD_SIZE": str(size if None in folders else 1)}
    words = [str(WATCHED), str(log), str(rank), str(at), sent, *words]
    processes = [start(words, each, **job, RANK=str(r)) for r, each in enumerate(folders)]
    said = [process.communicate(timeout=180) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said)]


def test_the_second_ctrl_c_ends_at_once(store_path: Path, tmp_path: Path) -> None:
    words = line(store_path, tmp_path / "run")
    ((code, _, errors),) = watched(words, tmp_path / "log", at=3, sent="SIGINT,SIGINT")
    assert (code, errors) == (-signal.SIGINT, "")
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_training_ends_with_who_has_started_it(store_path: Path, tmp_path: Path) -> None:
    """However its parent ends: the pipe that only the parent holds ends with it."""
    run = tmp_path / "run"
    words = ["-m", "hstu_xd", *line(store_path, run, "xd_train.num_epochs = 100000")]
    process = start(words, **{STOPS_WITH_STDIN: "1"})
    _, errors = process.communicate(timeout=120)  # closes the pipe
    assert process.returncode == 143
    assert errors.startswith("hstu-xd: stopped by SIGTERM after ")
    assert errors.count("\n") == 1
    assert (run / "last.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one disk", "a disk each"])
def test_all_processes_stop_where_one_is_asked(
    store_path: Path, tmp_path: Path, shared: bool
) -> None:
    """On machines of their own each has a store; the run is the first one's."""
    both: list[Path | None] = [None, None]
    data, whole, run = store_path, tmp_path / "whole", tmp_path / "run"
    assert [code for code, *_ in watched(line(data, whole), tmp_path / "log", folders=both)] == [
        0,
        0,
    ]
    if not shared:
        both = [tmp_path / name for name in ("first", "second")]
        for folder in both:
            shutil.copytree(store_path, folder / "data")
        data, run = Path("data"), Path("run")
    stopped = watched(line(data, run), tmp_path / "log", rank=1, at=3, sent="SIGTERM", folders=both)
    assert [code for code, *_ in stopped] == [143, 143]
    (*_, said), (*_, silent) = stopped
    command = f"train --data {data} --out {run} --resume"
    job = "torchrun --nproc_per_node 2 -m hstu_xd" if shared else "2 processes of hstu-xd"
    assert said.endswith(f"go on with: {job} {command}\n")
    assert silent == ""
    resumed = watched(shlex.split(command), tmp_path / "log", folders=both)
    assert [code for code, *_ in resumed] == [0, 0], resumed
    assert "hstu-xd evaluate" in resumed[0][1]  # what comes next; said once
    assert resumed[1][1] == ""
    assert_same_run(run if shared else tmp_path / "first" / run, whole)
    if not shared:
        assert [file.name for file in (tmp_path / "second").iterdir()] == ["data"]


@pytest.mark.slow
def test_machines_with_different_data_are_refused(store_path: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    shutil.copytree(store_path, folders[0] / "data")
    synthesize(folders[1] / "data", SynthOptions(users=50))
    refused = watched(line(Path("data"), Path("run")), tmp_path / "log", folders=folders)
    assert [code for code, *_ in refused] == [2, 2]
    for *_, errors in refused:
        assert re.search(
            r"process 1 reads .*data, which holds other data than .*of process 0", errors
        )
    assert not (folders[0] / "run" / "run.json").exists()


def trained_users(log: Path, *, before: int | None = None) -> Counter[int]:
    """How often each user was trained in the first epoch."""
    steps = [json.loads(text) for text in log.read_text().splitlines()]
    return Counter(
        user
        for epoch, step, users in steps
        if epoch == 0 and (before is None or step < before)
        for user in users
    )


@pytest.mark.slow
def test_on_other_processes_the_users_that_are_left_are_trained_once(
    store_path: Path, tmp_path: Path
) -> None:
    """The last step has one user for two processes."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = line(store_path, run, "xd_train.local_batch_size = 53")
    ((code, *_),) = watched(words, log, at=0, sent="SIGTERM")
    assert code == 143
    assert json.loads((run / "run.json").read_text())["processes"] == 1
    resumed = watched([*words[:5], "--resume"], log, folders=[None, None])
    assert [code for code, *_ in resumed] == [0, 0], resumed
    assert "was trained by 1 process and goes on with 2: a step takes 106" in resumed[0][2]
    assert resumed[1][2] == ""
    found = trained_users(log)
    assert len(found) == 160
    assert set(found.values()) == {1}
    facts = json.loads((run / "run.json").read_text())
    assert facts["processes"] == 2
    assert [(one["step"], one["processes"]) for one in facts["starts"]] == [(0, 1), (1, 2)]


def test_another_number_of_users_a_step_trains_those_who_are_left(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another number of processes does; the place in the epoch is counted in users."""
    run, seen = tmp_path / "run", Counter()
    step = Trainer._step

    def counted(trainer: Trainer, data: object, users: np.ndarray) -> int:
        if trainer.progress.epoch == 0:
            seen.update(users.tolist())
        return step(trainer, data, users)

    monkeypatch.setattr(Trainer, "_step", counted)
    with monkeypatch.context() as patch:
        send_in_step(2, signal.SIGTERM, patch)
        with pytest.raises(Interrupted):
            runs.train(store_path, settings(), run)
    assert seen.total() == 48
    config = run / "config.gin"
    config.write_text(config.read_text().replace("batch_size = 16", "batch_size = 32"))
    runs.train(store_path, None, run, resume=True)
    assert len(seen) == seen.total() == 160


def test_the_place_in_an_epoch_of_an_older_checkpoint() -> None:
    stored = {"epoch": 2, "step_in_epoch": 3, "step": 23}
    assert Progress.from_stored(stored, users_per_step=32) == Progress(2, 23, users_in_epoch=96)
    assert Progress.from_stored({"users_in_epoch": 7}, users_per_step=32) == Progress(
        users_in_epoch=7
    )


def test_a_second_training_into_a_folder_is_refused(
    whole: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", Trainer._step
    refused = []

    def tries_again(trainer: Trainer, data: object, users: np.ndarray) -> int:
        if trainer.progress.step == 5:
            for resume in (False, True):
                with pytest.raises(InputError) as error:
                    runs.train(store_path, None, run, resume=resume)
                refused.append(str(error.value))
        return step(trainer, data, users)

    monkeypatch.setattr(Trainer, "_step", tries_again)
    runs.train(store_path, settings(), run)
    assert len(refused) == 2
    for said in refused:
        assert f"another process (pid {os.getpid()} on {socket.gethostname()} since " in said
        assert f"trains into {run}; wait until it ends" in said
    monkeypatch.undo()
    assert_same_run(run, whole)
    assert not (run / "hstu-xd.lock").exists()
