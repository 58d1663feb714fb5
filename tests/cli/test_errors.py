"""What the machine refuses, a full disk or a path it cannot have, is one line on stderr too."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hstu_xd.cli.app import run
from hstu_xd.data.synthetic import SynthOptions, synthesize


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=40, domains=2, items_per_domain=20, mean_length=8))
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must exit with 1 and one line, which is returned."""

    def call(*line: object) -> str:
        assert run([str(word) for word in line]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("hstu-xd: ")
        assert errors.count("\n") == 1
        return errors

    return call


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_folder_that_cannot_be(command: str, store: Path, fails: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert f"{out}: Not a directory" in fails(command, "--data", store, "--out", out)


def test_name_that_is_too_long(fails: Callable, tmp_path: Path) -> None:
    name = "x" * 5000
    assert "File name too long" in fails("prepare", name, "--out", tmp_path / "out")


def test_disk_that_fills_up_during_training(
    store: Path, fails: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("hstu_xd.training.checkpoint.save_file", full)
    line = ["train", "--data", store, "--out", tmp_path / "run"]
    small = ["xd_train.num_epochs = 1", "xd_train.item_embedding_dim = 8"]
    for binding in small:
        line += ["--gin_bindings", binding]
    assert "best.safetensors: cannot be written" in (message := fails(*line))
    assert "No space left" in message
    assert "--resume" in message
