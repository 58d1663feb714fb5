"""A small log whose events all have times of their own, and commands on it: for tests of refits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_runs import QUICKEST

from hstu_xd.cli.app import run
from hstu_xd.training.checkpoint import load_checkpoint

BEGIN = 1_500_000_000
RECIPE = (
    *QUICKEST,
    "xd_train.max_sequence_length = 40",
    "xd_train.num_epochs = 6",
    "xd_train.early_stop_patience = 2",
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


def times_of(user: int) -> list[int]:
    return [time for u, _, _, time in log_lines() if u == user]


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (load_checkpoint(each / "best.safetensors")[0] for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert train(*words) == 2
    return capsys.readouterr().err.removeprefix("hstu-xd: ").rstrip("\n")
