"""Ablations and searches of settings take requests as they take a store."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.experiments.ablation import ablate
from hstu_xd.experiments.kinds import runs_on
from hstu_xd.experiments.run_folders import aggregate
from hstu_xd.experiments.tuning import tune
from hstu_xd.ranking.run import train
from hstu_xd.ranking.settings import load_ranking_settings

Cli = Callable[..., Any]
QUICK = ("xd_rank.num_epochs = 1", "xd_rank.batch_requests = 64", "xd_search.k = 5")
WORDS = [word for binding in QUICK for word in ("--gin_bindings", binding)]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("variants")
    (folder / "counted.gin").write_text(
        'include "gin/standalone/rank_counts.gin"\nxd_rank.hidden = (8,)\n'
    )
    (folder / "hard.gin").write_text('include "gin/standalone/rank_hard.gin"\n')
    return [str(folder / "counted.gin"), str(folder / "hard.gin")]


@pytest.fixture(scope="module")
def ablated(
    requests_path: Path, variants: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("ablations") / "out"
    return out, ablate(requests_path, variants, [1, 2], out, bindings=QUICK, jobs=2)


def test_variants_are_gin_files_over_seeds(ablated: tuple[Path, str], cli: Cli) -> None:
    out, table = ablated
    rows = json.loads((out / "ablation.json").read_text())
    told = [(row["variant"], row["seed"]) for row in rows]
    assert told == [(name, seed) for name in ("counted", "hard") for seed in (1, 2)]
    assert (out / "ablation.md").read_text() == table
    head, _, *lines = table.splitlines()
    assert "GAUC" in head
    results = aggregate(rows)
    for line, result in zip(lines, results):
        assert line.startswith(f"| {result.variant}")
        assert f"{100 * result.metrics['gauc'].mean:.2f}" in line
    assert "GAUC is the mean of the users' own AUC" in table
    facts = json.loads((out / "hard-seed2" / "run.json").read_text())
    assert (facts["kind"], facts["rank"]["random_seed"]) == ("ranking", 2)
    assert facts["search"]["kind"] == "hard"
    said = cli("compare", out)
    assert (said.code, "hard" in said.out) == (0, True)


def test_an_ablation_goes_on_and_refuses_what_does_not_belong(
    ablated: tuple[Path, str], requests_path: Path, variants: list[str], tmp_path: Path
) -> None:
    out, table = ablated
    lines: list[str] = []
    again = ablate(requests_path, variants, [1, 2], out, bindings=QUICK, announce=lines.append)
    assert (again, lines[0]) == (table, f"0 of 4 runs to train, 1 at a time, into {out}")
    other = (*QUICK, "xd_search.k = 7")
    with pytest.raises(InputError, match=r"with other settings \(not xd_search.k = 7 but 5\)"):
        ablate(requests_path, variants, [1], out, bindings=other)
    requests = tmp_path / "requests"
    shutil.copytree(requests_path, requests)
    manifest = json.loads((requests / "requests.json").read_text())
    facts = json.loads((out / "hard-seed1" / "run.json").read_text())
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    for run in copied.glob("*-seed*"):
        (run / "run.json").write_text(json.dumps(facts | {"requests_hash": "0"}))
    with pytest.raises(InputError, match=r"on other requests than .* now holds"):
        ablate(requests, variants, [1], copied, bindings=QUICK)
    assert manifest["hash"] == facts["requests_hash"]


def test_what_is_compared_by_default(requests_path: Path, store: InteractionStore) -> None:
    kind = runs_on(requests_path)
    assert {Path(name).stem for name in kind.compared} >= {"rank_tin", "rank_hard", "rank_counts"}
    assert kind.load([Path(name) for name in kind.compared][:1], []).search_space
    assert "hstu" in runs_on(store.path).compared


def test_names_are_of_retrieval(requests_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"variant 'mask' is one of hstu-xd train, and"):
        ablate(requests_path, ["mask"], [1], tmp_path / "out")
    pytest.importorskip("optuna", reason="no optuna here: tune of ranking runs is NOT covered")
    with pytest.raises(InputError, match=r"name gin files, such as gin/standalone/rank_tin.gin"):
        tune(requests_path, ["mask"], 1, tmp_path / "tuned")
    assert not (tmp_path / "out" / "mask-seed1").exists()


def test_the_test_split_may_stay_unread(requests_path: Path, tmp_path: Path, cli: Cli) -> None:
    command = ("rank", "--data", requests_path, "--out", tmp_path / "run")
    said = cli(*command, *WORDS, "--skip-test")
    assert (said.code, "valid auc" in said.out) == (0, True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "test" not in summary
    assert '"split": "test"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert cli(*command, "--resume").code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["gauc"] > 0


SPACE = (
    "xd_tune.space = ('xd_rank.learning_rate = (1e-3, 1e-2, \"log\")', 'xd_search.k = [3, 5]', "
    "'xd_short.events, xd_encoder.ddsr = [(0, False), (4, True)]')"
)


def test_a_search_tries_settings_on_validation(requests_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="no optuna here: tune of ranking runs is NOT covered")
    out = tmp_path / "out"
    table = tune(requests_path, [], 3, out, bindings=(*QUICK, SPACE))
    assert "GAUC valid" in table
    rows = json.loads((out / "trials.json").read_text())
    assert [row["metric"] for row in rows] == ["gauc"] * 3
    begun = {"xd_rank.learning_rate": 3e-3, "xd_search.k": 5}
    assert rows[0]["settings"] == begun | {"xd_short.events": 0, "xd_encoder.ddsr": False}
    assert {row["settings"]["xd_short.events"] for row in rows} == {0, 4}
    for row in rows:
        assert "test" not in json.loads((out / row["run"] / "summary.json").read_text())
    best = max(rows, key=lambda row: row["value"])
    settings = load_ranking_settings([out / "best.gin"])
    assert {name: settings.flat[name] for name in best["settings"]} == best["settings"]
    summary = train(requests_path, settings, tmp_path / "run", read_test=False)
    assert summary["valid"]["gauc"] == pytest.approx(best["value"], abs=1e-6)
    with pytest.raises(InputError, match="was tuned with other settings"):
        tune(requests_path, [], 3, out, bindings=(*QUICK, SPACE, "xd_rank.hidden = (9,)"))


def test_a_space_names_settings_of_ranking(requests_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names 'xd_train.learning_rate', which is no setting"):
        load_ranking_settings([], ["xd_tune.space = ('xd_train.learning_rate = [0.1]',)"])
