"""Differences of rankers, user by user, and their errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_xd.cli.app import run as run_command
from hstu_xd.evaluation.paired import paired_ranking_differences
from hstu_xd.evaluation.ranking import (
    ScoredRows,
    grouped_ranking_metrics,
    ranking_estimates,
    ranking_metrics,
)

Cli = Callable[..., Any]
QUICK = ("xd_rank.num_epochs = 1", "xd_rank.batch_requests = 32", "xd_search.k = 10")


def draw(seed: int, users: int = 7, per_user: int = 12) -> ScoredRows:
    """Candidates with ties, of requests of four, the same but for their scores."""
    of_all, own = np.random.default_rng(0), np.random.default_rng(seed)
    count = users * per_user
    labels = (of_all.random(count) < 0.4).astype(np.float32)
    labels[:per_user] = 0  # a user of one class
    scores = np.clip(own.normal(0.4 + 0.1 * labels, 0.2), 0.05, 0.95).round(2)
    return ScoredRows(
        scores, labels, np.arange(count) // 4, np.repeat(np.arange(users) * 3, per_user)
    )


def copies(rows: ScoredRows, weights: np.ndarray) -> ScoredRows:
    """Every user so many times over, each copy another user with requests of its own."""
    kept = np.arange(weights.max())[:, None] < weights[rows.users // 3]
    copy, place = np.nonzero(kept)
    return ScoredRows(
        rows.scores[place],
        rows.labels[place],
        rows.requests[place] + 1000 * copy,
        rows.users[place] + 1000 * copy,
    )


def test_values_are_those_of_the_metrics() -> None:
    rows = draw(1)
    metrics = ranking_metrics(rows)
    for name, estimate in ranking_estimates(rows).items():
        assert estimate.value == metrics[name]
        assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)


def test_an_influence_is_what_one_more_of_a_user_changes() -> None:
    rows, many = draw(2), 400
    estimates = ranking_estimates(rows)
    whole = np.full(7, many)
    before = ranking_metrics(copies(rows, whole))
    for user in range(7):
        after = ranking_metrics(copies(rows, whole + (np.arange(7) == user)))
        for name, estimate in estimates.items():
            found = estimate.influence[estimate.users == 3 * user]
            wanted = (after[name] - before[name]) * many
            assert found.sum() == pytest.approx(wanted, rel=0.02, abs=1e-4), (name, user)


def test_the_error_of_a_mean_over_users_is_the_plain_one() -> None:
    base, other = [draw(3), draw(4)], [draw(5)]
    found = paired_ranking_differences(base, other, [])["gauc"]
    each = []
    for rows in (*base, *other):
        own = [ranking_metrics(rows.where(rows.users == user))["auc"] for user in range(0, 21, 3)]
        each.append([auc for auc in own if auc is not None])
    differences = np.array(each[2]) - np.mean(each[:2], 0)
    assert found.count == len(differences) < 7
    assert found.mean == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(found.count))


def test_differences_are_those_of_what_evaluate_says() -> None:
    base, other = draw(6), draw(7)
    groupings = [(("a", "b"), np.arange(len(base.scores)) % 3 - 1), (("none",), base.users * 0 - 1)]
    found = paired_ranking_differences([base], [other], groupings)
    one, two = (grouped_ranking_metrics(rows, groupings) for rows in (base, other))
    assert {"auc", "mrr[a]", "calibration[b]"} <= set(found)
    assert "auc[none]" not in found
    for name, difference in found.items():
        assert difference.mean == pytest.approx(two[name] - one[name])
    same = paired_ranking_differences([base], [base], groupings)["auc"]
    assert (same.mean, same.standard_error, same.is_clear) == (0, 0, False)


@pytest.fixture(scope="module")
def runs(requests_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts with two seeds, and mean with one."""
    out = tmp_path_factory.mktemp("runs")
    for kind, seed in (("none", 1), ("none", 2), ("mean", 1)):
        command = ["rank", "--data", requests_path, "--out", out / f"{kind}{seed}"]
        own = (f"xd_interest.kind = {kind!r}", f"xd_rank.random_seed = {seed}")
        for binding in (*QUICK, *own, f"xd_interest.counts = {kind == 'none'}"):
            command += ["--gin_bindings", binding]
        assert run_command([str(word) for word in command]) == 0
    return out


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_compare_pairs_ranking_runs(runs: Path, cli: Cli) -> None:
    order = [runs / "none1", runs / "none2", runs / "mean1"]
    said = cli("compare", *order, "--json")
    assert said.code == 0, said.err
    (found,) = json.loads(said.out)
    named = (found["base"], found["variant"], found["seeds"])
    assert named == ("no events + 10 events + counts", "mean + 10 events", [1])
    tests = [summary(run)["test"] for run in order]
    for name, difference in found["differences"].items():
        wanted = tests[2][name] - (tests[0][name] + tests[1][name]) / 2
        assert difference["mean"] == pytest.approx(wanted, abs=1e-9)
    gauc = found["differences"]["gauc"]
    assert gauc["count"] == tests[0]["users"]
    assert 0 < gauc["standard_error"] < 0.1
    assert {"auc[deal=true]", "logloss[d0]"} <= set(found["differences"])


def test_compare_prints_a_table(runs: Path, cli: Cli) -> None:
    said = cli("compare", runs / "none1", runs / "mean1", "--split", "valid")
    head, _, row, _, *notes = said.out.splitlines()
    wanted = "AUC, points | GAUC, points | logloss | calibration | NDCG@10, points | MRR, points |"
    assert head == f"| minus no events + 10 events + counts | seeds | {wanted}"
    assert row.startswith("| mean + 10 events | 1 | ")
    assert row.count("\u00b1") == 6
    assert any("equal scores count half" in note for note in notes)


def test_what_cannot_be_compared(runs: Path, cli: Cli, store_path: Path, tmp_path: Path) -> None:
    one, other = runs / "none1", runs / "mean1"
    for options, told in (
        (("--candidates", "99"), "candidates = 99 has no meaning there; leave it out"),
        (("--include-seen",), "exclude_seen = False has no meaning there"),
        (("--allow-imports",), "allow_imports = True has no meaning there"),
    ):
        said = cli("compare", one, other, *options)
        assert (said.code, told in said.err) == (2, True)
    moved = tmp_path / "run"
    shutil.copytree(other, moved)
    facts = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(facts | {"requests_hash": "0"}))
    said = cli("compare", one, moved)
    assert (said.code, "trained on different requests" in said.err) == (2, True)
    (moved / "run.json").write_text(json.dumps(facts | {"kind": "retrieval"}))
    said = cli("compare", one, moved)
    wanted = "one is a retrieval run and the other a ranking run"
    assert (said.code, wanted in said.err) == (2, True)


def test_report_shows_ranking_runs(runs: Path, cli: Cli, tmp_path: Path) -> None:
    said = cli("report", runs, "--out", tmp_path / "page")
    assert said.code == 0, said.err
    page = (tmp_path / "page" / "index.html").read_text()
    for name in ("curve_gauc", "domains_gauc", "goals_auc", "history_gauc"):
        assert (tmp_path / "page" / f"{name}.png").is_file()
    assert f"{summary(runs / 'mean1')['test']['logloss']:.4f}" in page
    for words in (
        "GAUC deal=true\u00a0%",
        "By length of the history, and candidates never met before",
        "equal scores count half",
        "A request is a user, a time, a goal and candidates",
    ):
        assert words in page
    assert "HR@k" not in page
    assert "attention pairs a user" not in page


def test_report_takes_both_kinds_in_sections_of_their_own(
    runs: Path, cli: Cli, store_path: Path, tmp_path: Path
) -> None:
    command = ("train", "--data", store_path, "--out", tmp_path / "popular")
    assert cli(*command, "--gin_bindings", "xd_train.baseline = 'popularity'").code == 0
    both = ("report", runs / "none1", tmp_path / "popular", "--out", tmp_path / "page")
    said = cli(*both)
    assert said.code == 2
    assert "one is a ranking run and the other a retrieval run, so their numbers" in said.err
    assert cli(*both, "--allow-mixed-data").code == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "HR@100" in page
    assert "GAUC" in page
