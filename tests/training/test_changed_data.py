"""Stores that are not, or no longer, what a run was trained on: said, with what has changed."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from quick_runs import QUICK

from hstu_xd.cli.app import run
from hstu_xd.data.store import InteractionStore
from hstu_xd.training.run_facts import data_changes, read_run

USERS, ITEMS = 12, 10


def write_log(file: Path, events: int, *, domains: Sequence[str] = ("books", "films")) -> None:
    """A log of every item; users of so many events each."""
    lines = ["user,item,domain,timestamp"]
    for user in range(USERS):
        for event in range(events):
            item = (user + event) % ITEMS
            domain = domains[item % len(domains)]
            lines.append(f"u{user},{domain}{item},{domain},{1_500_000_000 + 60 * event}")
    file.write_text("\n".join(lines) + "\n")


def prepare(log: Path, out: Path) -> None:
    assert run(["prepare", str(log), "--out", str(out), "--force"]) == 0


def training(data: Path, out: Path, *more: str) -> list[str]:
    bindings = [word for binding in QUICK for word in ("--gin_bindings", binding)]
    return ["train", "--data", str(data), "--out", str(out), *bindings, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with logs, a store of the first one and a run on it."""
    folder = tmp_path_factory.mktemp("changed")
    write_log(folder / "log.csv", 8)
    write_log(folder / "longer.csv", 9)
    write_log(folder / "elsewhere.csv", 8, domains=("books", "games"))
    prepare(folder / "log.csv", folder / "store")
    assert run(training(folder / "store", folder / "run")) == 0
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, whose run knows the copy of the store."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    facts = json.loads((folder / "run" / "run.json").read_text())
    facts["data"] = str((folder / "store").resolve())
    (folder / "run" / "run.json").write_text(json.dumps(facts))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


CHANGES = "other events; 108 events instead of 96"


def test_resume_after_a_new_prepare_says_what_changed(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(workplace / "longer.csv", workplace / "store")
    capsys.readouterr()
    assert run(training(workplace / "store", workplace / "run", "--resume")) == 2
    assert said(capsys) == (
        f"hstu-xd: {workplace}/store was prepared again since {workplace}/run was trained on it "
        f"({CHANGES}); prepare the old log there again, or train into a new --out\n"
    )
    prepare(workplace / "log.csv", workplace / "store")
    assert run(training(workplace / "store", workplace / "run", "--resume")) == 0


def test_resume_on_another_store_names_one_that_can_work(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(workplace / "longer.csv", workplace / "other")
    capsys.readouterr()
    line = training(workplace / "other", workplace / "run", "--resume")
    assert run(line) == 2
    assert f"({CHANGES}); resume it with --data {workplace}/store\n" in said(capsys)
    shutil.rmtree(workplace / "store")
    assert run(line) == 2
    gone = f"{workplace}/store no longer holds them: prepare the old log again, or give a new --out"
    assert gone in said(capsys)


def test_evaluate_and_compare_refuse_changed_histories(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(workplace / "longer.csv", workplace / "store")
    second = workplace / "second"
    shutil.copytree(workplace / "run", second)
    facts = read_run(second) | {"variant_name": "another"}
    (second / "run.json").write_text(json.dumps(facts))
    capsys.readouterr()
    for line in (["evaluate", f"{workplace}/run"], ["compare", f"{workplace}/run", str(second)]):
        assert run(line) == 2
        assert (
            f"({CHANGES}); prepare the old log there again, or add --data {workplace}/store to "
            "take it as it is now" in said(capsys)
        )


def test_changed_histories_that_were_asked_for_are_a_warning(
    workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    store, trained = str(workplace / "store"), str(workplace / "run")
    assert run(["evaluate", trained, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_changes"] == ""
    assert "histories" not in caplog.text
    prepare(workplace / "longer.csv", workplace / "store")
    capsys.readouterr()
    assert run(["evaluate", trained, "--data", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_changes"] == CHANGES
    assert f"{store} does not hold the histories that {trained} was trained on" in caplog.text
    caplog.clear()
    assert run(["recommend", trained, "--user", "u1", "--domain", "books"]) == 0
    assert CHANGES in caplog.text


def test_another_catalogue_in_the_same_place(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(workplace / "elsewhere.csv", workplace / "store")
    capsys.readouterr()
    assert run(["evaluate", str(workplace / "run"), "--data", str(workplace / "store")]) == 2
    message = said(capsys)
    assert "its catalogue is not the one" in message
    assert "it was prepared again since; train on it, or prepare the old log there" in message


def test_changes_of_facts_without_counts(trained: Path) -> None:
    """Runs of other tools that write run.json may leave the counts out."""
    store, facts = InteractionStore.open(trained / "store"), read_run(trained / "run")
    assert data_changes(facts, store) == ""
    facts["data_hashes"] = facts["data_hashes"] | {"users.parquet": "", "catalog.parquet": ""}
    del facts["data_summary"]
    assert data_changes(facts, store) == "other items or domains, users"


@pytest.mark.parametrize(
    "command", ["train", "resume", "evaluate", "recommend", "compare", "ablate", "serve"]
)
def test_verify_finds_what_only_hashes_show(
    workplace: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    store, trained = str(workplace / "store"), str(workplace / "run")
    file = workplace / "store" / "item_ids.npy"
    ids = np.load(file)
    ids[:2] = ids[1], ids[0]
    np.save(file, ids)
    second = workplace / "second"
    shutil.copytree(workplace / "run", second)
    (second / "run.json").write_text(json.dumps(read_run(second) | {"variant_name": "another"}))
    lines = {
        "train": training(workplace / "store", workplace / "new"),
        "resume": training(workplace / "store", workplace / "run", "--resume"),
        "evaluate": ["evaluate", trained],
        "recommend": ["recommend", trained, "--user", "u1", "--domain", "books"],
        "compare": ["compare", trained, str(second)],
        "ablate": ["ablate", "--data", store, "--out", str(workplace / "table")],
        "serve": ["serve", trained, "--port", "0"],
    }
    assert run([*lines[command], "--verify"]) == 2
    assert "item_ids.npy: has another SHA-256 than its manifest says" in said(capsys)
    assert not (workplace / "new").exists()
    assert not (workplace / "table").exists()


def test_nothing_to_verify(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(trained / "run"), "--port", "0", "--no-data", "--verify"]) == 2
    assert "--verify with --no-data; drop one of them" in said(capsys)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda store: os.truncate(store / "item_ids.npy", 100),
    "a file is missing": lambda store: (store / "users.parquet").unlink(),
    "no store": lambda store: (store / "manifest.json").unlink(),
    "no manifest": lambda store: (store / "manifest.json").write_text("{"),
    "a file in its place": lambda store: (shutil.rmtree(store), store.write_text("")),
    "a link to nowhere": lambda store: (shutil.rmtree(store), store.symlink_to(store / "gone")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_service_takes_a_damaged_store_for_none(
    workplace: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Every user would be a stranger to it."""
    DAMAGES[damage](workplace / "store")
    assert run(["serve", str(workplace / "run"), "--port", "0"]) == 2
    found = said(capsys)
    assert str(workplace / "store") in found
    assert "; or start without earlier histories: --no-data" in found
    assert not (workplace / "run" / "serving").exists()


def test_nor_one_of_another_catalogue(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(workplace / "elsewhere.csv", workplace / "store")
    assert run(["serve", str(workplace / "run"), "--port", "0"]) == 2
    found = said(capsys)
    assert "its catalogue is not the one" in found
    assert "--no-data" in found
