"""Which items have vectors of their own is a fact of the run, whatever log it reads later."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ranking_runs import events, make_runs, run_words

from hstu_xd.errors import InputError
from hstu_xd.ranking.run import load_ranker, trained_items
from hstu_xd.serving.ranking_session import RankingSession, RankRequest

Cli = Callable[..., Any]
GOAL = "deal=true"
# So rare in the other log that they would have no vector of their own.
RARE = ("i3", "i8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its store, and "other": a log in which some users never took some of the items."""
    made = make_runs(tmp_path_factory.mktemp("known"), ["hard"])
    rows = [row for row in events() if row[0] in ("u1", "u2") or row[1] not in RARE]
    schema = ["user", "item", "domain", "time", "deal"]
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(made / "other.parquet")
    run_words(
        *("prepare", made / "other.parquet", "--out", made / "other", "--event-cols", "deal"),
        *("--item-features", made / "items.parquet", "--levels", "type"),
        *("--min-user", 1, "--min-item", 1),
    )
    run_words(
        *("requests", "--data", made / "other", "--out", made / "other_requests"),
        *("--goal", "deal", "--positives", 2, "--negatives", 2, "--min-history", 5),
    )
    return made


def as_before(folder: Path, tmp_path: Path) -> Path:
    """A run that does not say what it was trained on, as those of before."""
    run = shutil.copytree(folder / "hard", tmp_path / "run")
    (run / "trained_items.npy").unlink()
    return run


def test_another_log_does_not_change_what_is_known(folder: Path) -> None:
    asked = [RankRequest(u, ["i3", "i8", "i21", "i30"], GOAL) for u in ("u1", "u2", "new")]
    own = RankingSession.open(folder / "hard").rank(asked)
    other = RankingSession.open(folder / "hard", folder / "other").rank(asked)
    np.testing.assert_allclose(other, own, atol=1e-6)
    known = load_ranker(folder / "hard").model.items.known
    measured = load_ranker(folder / "hard", folder / "other_requests")
    assert (measured.model.items.known == known).all()


def test_the_command_scores_by_another_log(folder: Path, cli: Cli) -> None:
    ask = ("--user", "u1", "--items", "i3,i8,i21", "--goal", GOAL, "--json")
    own = json.loads(cli("score", folder / "hard", *ask).out)["items"]
    said = cli("score", folder / "hard", *ask, "--data", folder / "other")
    assert said.code == 0, said.err
    assert [row["score"] for row in json.loads(said.out)["items"]] == pytest.approx(
        [row["score"] for row in own], abs=1e-6
    )


def test_a_run_of_before_counts_in_its_own_log(folder: Path, tmp_path: Path) -> None:
    run = as_before(folder, tmp_path)
    asked = [RankRequest("u2", ["i3", "i8", "i21"], GOAL)]
    own = RankingSession.open(folder / "hard").rank(asked)
    found = RankingSession.open(run, folder / "other").rank(asked)
    np.testing.assert_allclose(found, own, atol=1e-6)


def test_where_that_is_no_more_it_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = as_before(folder, tmp_path)
    facts = json.loads((run / "run.json").read_text()) | {"data": str(tmp_path / "gone")}
    (run / "run.json").write_text(json.dumps(facts))
    whole = shutil.copytree(folder / "store", tmp_path / "moved")
    RankingSession.open(run, whole)
    assert "does not say which items it was trained on" in caplog.text
    assert f"they are counted in {whole}" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no array", "short"])
def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, content: bytes | str) -> None:
    run = shutil.copytree(folder / "hard", tmp_path / "run")
    if isinstance(content, bytes):
        (run / "trained_items.npy").write_bytes(content)
        message = r"trained_items.npy: cannot be read as an array; restore the file"
    else:
        np.save(run / "trained_items.npy", np.zeros(3, np.int64))
        message = r"int64 of shape \(3,\); int64 of shape \(41,\) belongs there; restore the file"
    with pytest.raises(InputError, match=message):
        RankingSession.open(run)


def test_it_is_what_the_training_counted(folder: Path) -> None:
    store = load_ranker(folder / "hard").task.store
    cut = json.loads((folder / "hard" / "run.json").read_text())["trained_before"]
    items = np.asarray(store.item_ids)[np.asarray(store.timestamps) < cut]
    wanted = np.bincount(items, minlength=store.num_items + 1)
    assert trained_items(folder / "hard", store).tolist() == wanted.tolist()
