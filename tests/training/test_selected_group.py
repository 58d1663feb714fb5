"""The epoch may be picked by a group of the validation targets, which has to be there."""

import json
from pathlib import Path

import pytest
from quick_runs import QUICKEST

from hstu_xd.cli import app
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.training.run import load_trained


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    synthesize(folder / "store", SynthOptions(users=60, domains=2, items_per_domain=20))
    return folder / "store"


def train(store: Path, out: Path, *bindings: str) -> int:
    line = ["train", "--data", str(store), "--out", str(out)]
    for binding in (*QUICKEST, *bindings):
        line += ["--gin_bindings", binding]
    return app.run(line)


def valid_rows(run: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "valid"]


@pytest.mark.parametrize("group", ["switch", "stay", "macro", "books"])
def test_the_epoch_is_the_best_one_of_the_group(store: Path, tmp_path: Path, group: str) -> None:
    name = f"ndcg@10[{group}]"
    bindings = ("xd_train.num_epochs = 4", f"xd_train.select_metric = '{name}'")
    assert train(store, tmp_path / "run", *bindings) == 0
    rows, summary = valid_rows(tmp_path / "run"), tmp_path / "run" / "summary.json"
    picked = json.loads(summary.read_text())
    best = max(range(len(rows)), key=lambda epoch: rows[epoch][name])
    assert picked["best_epoch"] == rows[best]["epoch"]
    assert picked["valid"][name] == rows[best][name]
    assert load_trained(tmp_path / "run").model is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndcg@10[swich]", "did you mean 'ndcg@10[switch]'?"),
        ("hr@10[cold]", "has no validation targets here; of hr@10 there are hr@10, hr@10[switch]"),
        ("mrr[nowhere]", "of mrr there are mrr, mrr[switch], mrr[stay], mrr[books]"),
    ],
)
def test_a_group_without_targets_is_named_and_nothing_is_written(
    store: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(store, tmp_path / "run", f"xd_train.select_metric = '{name}'") == 2
    said = capsys.readouterr().err
    assert f"xd_train.select_metric = '{name}'" in said
    assert message in said
    assert not (tmp_path / "run").exists()
