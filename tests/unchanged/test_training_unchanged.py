"""Fixed recipes train to the rows that were recorded before the package was rearranged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from recordings import (
    EPOCHS,
    LOG,
    RECIPES,
    RUNS,
    STORE,
    TRAINING,
    ask,
    bindings,
    difference_in_metrics,
    rows_of,
    train_words,
)

# Users of a group whose rank another rounding may move after two epochs.
MOVED_USERS = 2


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unchanged") / "log"
    ask("synth", "--out", path, *LOG)
    return path


def test_the_log_is_the_recorded_one(log: Path) -> None:
    recorded = json.loads((TRAINING / "log.json").read_text())
    # The .npy files hold the events; bytes of Parquet files are the writing library's choice.
    found = json.loads((log / "manifest.json").read_text())["hashes"]
    events = [name for name in recorded if name.endswith(".npy")]
    assert len(events) == 3
    assert {name: found[name] for name in events} == {name: recorded[name] for name in events}


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_gives_the_recorded_rows(
    recipe: str, log: Path, tmp_path: Path, exact: bool, foreign_arithmetic: str
) -> None:
    ask(*train_words(log, tmp_path / "run", bindings(recipe, epochs=EPOCHS)))
    lines = (TRAINING / f"{recipe}.jsonl").read_text().splitlines()
    compare_rows(tmp_path / "run", lines, exact, foreign_arithmetic)


def test_a_stopped_run_goes_on_to_the_recorded_rows(
    tmp_path: Path, writable_run: Callable[[str], Path], exact: bool, foreign_arithmetic: str
) -> None:
    run = writable_run("stopped")
    begun = (run / "metrics.jsonl").read_text()
    ask("train", "--data", STORE, "--out", run, "--resume")
    lines = (TRAINING.parent / "stopped_and_resumed.jsonl").read_text().splitlines()
    assert (run / "metrics.jsonl").read_text().startswith(begun)
    compare_rows(run, lines, exact, foreign_arithmetic)


def test_a_finished_run_that_is_resumed_keeps_its_rows(
    writable_run: Callable[[str], Path], exact: bool, foreign_arithmetic: str
) -> None:
    run = writable_run("all")
    lines = (RUNS / "all" / "metrics.jsonl").read_text().splitlines()
    ask("train", "--data", STORE, "--out", run, "--resume")
    compare_rows(run, lines, exact, foreign_arithmetic)
    found, recorded = (
        json.loads((one / "summary.json").read_text()) for one in (run, RUNS / "all")
    )
    assert found.keys() == recorded.keys()
    for name in ("best_epoch", "epochs", "parameters", "attention_pairs", "state_bytes", "seed"):
        assert found[name] == recorded[name]


def compare_rows(run: Path, lines: list[str], exact: bool, foreign_arithmetic: str) -> None:
    found, recorded = rows_of(run), [json.loads(line) for line in lines]
    assert [row["split"] for row in found] == [row["split"] for row in recorded]
    for new, old in zip(found, recorded):
        difference = difference_in_metrics(new, old, exact=exact, users=MOVED_USERS)
        how = f"within a tolerance: {foreign_arithmetic}" if foreign_arithmetic else "to the bit"
        assert not difference, f"{old['split']} of epoch {old['epoch']}, {how}: {difference}"
