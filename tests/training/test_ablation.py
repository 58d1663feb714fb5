"""Ablations: what may stand in one table, and under which name."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quick_runs import QUICK

from hstu_xd.cli import app
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError, Interrupted
from hstu_xd.experiments.ablation import AblationRun, ablate
from hstu_xd.files import locked_folder
from hstu_xd.training.checkpoint import load_checkpoint
from hstu_xd.training.settings import load_settings


@pytest.fixture(scope="module")
def finished(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "runs"
    ablate(store_path, ["hstu"], [1], out, bindings=QUICK)
    return out


def test_finished_runs_are_kept(finished: Path, store_path: Path) -> None:
    before = (finished / "hstu-seed1" / "summary.json").stat().st_mtime_ns
    table = ablate(store_path, ["hstu"], [1], finished, bindings=QUICK)
    assert (finished / "hstu-seed1" / "summary.json").stat().st_mtime_ns == before
    assert table == (finished / "ablation.md").read_text()


def test_runs_on_other_data_do_not_come_into_the_table(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    synthesize(other, SynthOptions(users=40, domains=2, items_per_domain=20, mean_length=8))
    before = (finished / "ablation.json").read_bytes()
    with pytest.raises(InputError, match=r"hstu-seed1.*other data than.*other.*--out"):
        ablate(other, ["hstu"], [1], finished, bindings=QUICK)
    assert (finished / "ablation.json").read_bytes() == before


def test_runs_with_other_settings_do_not_come_into_the_table(
    finished: Path, store_path: Path
) -> None:
    longer = [*QUICK, "xd_train.num_epochs = 2"]
    with pytest.raises(InputError, match=r"hstu-seed1.*not xd_train.num_epochs = 2 but 1.*--out"):
        ablate(store_path, ["hstu", "mask"], [1], finished, bindings=longer)
    assert not (finished / "mask-seed1").exists()


def test_unknown_to_an_older_run_is_not_compared(finished: Path) -> None:
    recorded = json.loads((finished / "hstu-seed1" / "run.json").read_text())
    settings = load_settings([], [*QUICK, "xd_train.random_seed = 1"])
    assert settings.unlike(recorded) == []
    del recorded["train"]["num_epochs"]
    assert load_settings([], QUICK[:4]).unlike(recorded) == [
        "not xd_train.num_negatives = 2048 but 20",
        "not xd_train.random_seed = 42 but 1",
    ]


def test_an_ablation_that_is_stopped_stops_its_trainings(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of a training stands a process that sends the signal and waits for its end."""
    program = (
        "import os, signal, sys\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "assert sys.stdin.read() == ''\n"
        "sys.exit('stopped; go on with: hstu-xd train')\n"
    )
    monkeypatch.setattr(AblationRun, "command", lambda *_: [sys.executable, "-c", program])
    out, lines = tmp_path / "out", []
    with pytest.raises(Interrupted) as stopped:
        ablate(store_path, ["hstu", "mask"], [1, 2], out, bindings=QUICK, announce=lines.append)
    assert lines[1:] == ["hstu seed 1: stopped; go on with: hstu-xd train"]
    assert stopped.value.exit_code == 143
    said, _, command = str(stopped.value).partition("; go on with: ")
    assert said == "stopped by SIGTERM, 0 of 4 runs are done"
    words = shlex.split(command)
    expected = ["hstu-xd", "ablate", "--data", str(store_path), "--variants", "hstu,mask"]
    assert words[:10] == [*expected, "--seeds", "2", "--out", str(out)]
    assert words[10:] == [x for b in QUICK for x in ("--gin_bindings", b)] + ["--jobs", "1"]


def test_a_second_ablation_in_a_folder_is_refused(store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        locked_folder(out, "runs an ablation in"),
        pytest.raises(InputError, match=r"another process \(pid \d+ on .*\) runs an ablation in"),
    ):
        ablate(store_path, ["hstu"], [1], out, bindings=QUICK)


LONG = (*QUICK[:4], "xd_train.num_negatives = 20", "xd_train.checkpoint_every = 1")
LONG += ("xd_train.num_epochs = 15", "xd_train.early_stop_patience = 15")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_an_ablation_that_ends_ends_its_trainings(
    number: str, code: int, store_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs = [out / "hstu-seed1", out / "mask-seed1"]
    words = ["ablate", "--data", str(store_path), "--variants", "hstu,mask", "--seeds", "1"]
    words += ["--out", str(out), *(x for b in LONG for x in ("--gin_bindings", b)), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hstu_xd", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: all((run / "last.safetensors").exists() for run in runs))
    assert process.poll() is None, "finished before it could be stopped"
    process.send_signal(getattr(signal, number))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    wait_until(lambda: not any((run / "hstu-xd.lock").exists() for run in runs))
    if number == "SIGKILL":
        command = words
    else:
        *told, last = errors.splitlines()
        each = [line for line in told if "stopped" in line]
        assert len(each) == 2
        assert all(": stopped by SIGTERM after " in line for line in each)
        command = shlex.split(last.partition("; go on with: hstu-xd ")[2])
        assert command == words
    steps = [load_checkpoint(run / "last.safetensors")[1]["progress"]["step"] for run in runs]
    assert app.run(command) == 0
    rows = json.loads((out / "ablation.json").read_text())
    assert [row["variant"] for row in rows] == ["hstu", "mask"]
    for run, step in zip(runs, steps):
        facts = json.loads((run / "run.json").read_text())
        assert [one["step"] for one in facts["starts"]] == [0, step]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("switch", "variant"),
    [
        ("ddsr = True", "hstu"),
        ("target_view_heads = 1", "hstu"),
        ("normalization = 'softmax'", "all"),
        ("segment_by = 'count'", "all"),
    ],
)
def test_recipe_with_a_switch_would_give_a_variant_the_wrong_name(
    switch: str, variant: str, store_path: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(f"xd_encoder.{switch}\n")
    message = rf"'{variant}'.*xd_encoder.{switch}.*recipe"
    with pytest.raises(InputError, match=message):
        ablate(store_path, ["all", "hstu"], [1], tmp_path / "out", files=[recipe])
    assert not (tmp_path / "out").exists()
