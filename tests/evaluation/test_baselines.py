"""Baselines on small logs, against counts by hand."""

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import hstu_xd
from hstu_xd.cli import app
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.evaluation import baselines
from hstu_xd.evaluation.baselines import BASELINES, KINDS, Baseline
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.experiments.ablation import ablate
from hstu_xd.experiments.comparison import pair_runs
from hstu_xd.experiments.report.page import write_report
from hstu_xd.training.settings import load_settings

QUICK = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_train.item_embedding_dim = 8",
    "xd_train.num_epochs = 1",
    "xd_train.num_negatives = 20",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path = tmp_path_factory.mktemp("log") / "store"
    synthesize(path, SynthOptions(users=60, domains=2, items_per_domain=25, mean_length=9))
    return InteractionStore.open(path)


def histories(store: InteractionStore) -> list[tuple[list[int], list[int]]]:
    """Items and times of every user."""
    cuts = [int(x) for x in store.offsets]
    items, times = store.item_ids, store.timestamps
    return [(items[a:b].tolist(), times[a:b].tolist()) for a, b in itertools.pairwise(cuts)]


def trained_on(store: InteractionStore) -> list[tuple[list[int], list[int]]]:
    """Leave out the last two events of users who have three."""
    logs = [(i[:-2], t[:-2]) if len(i) >= 3 else (i, t) for i, t in histories(store)]
    return [log for log in logs if len(log[0]) >= 2]


def counted(store: InteractionStore, name: str, share: float = 0.1) -> Baseline:
    kind, data = KINDS[name], SequenceData(store, Split.TRAIN, 5)
    settings = load_settings([]).encoder_settings(store.num_domains)
    return kind(store.catalog, settings, kind.count(store.catalog, data, share))


def by_hand(store: InteractionStore, name: str, last: int, item: int) -> tuple[Fraction | int, ...]:
    """Score an item for a user by definition; tuples are compared from the left."""
    logs = trained_on(store)
    popular = Counter(x for items, _ in logs for x in items)
    if name == "popularity":
        return (popular[item],)
    if name == "popularity-recent":
        times = sorted(t for _, ts in logs for t in ts)
        since = times[len(times) - round(0.1 * len(times))]
        recent = Counter(x for items, ts in logs for x, t in zip(items, ts) if t >= since)
        return (recent[item], popular[item])
    users = {x: {u for u, (items, _) in enumerate(logs) if x in items} for x in (last, item)}
    both = len(users[last] & users[item]) if item != last else 0
    # The square of the cosine, which is exact.
    return (Fraction(both**2, max(1, len(users[last]) * len(users[item]))), len(users[item]))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("split", [Split.VALID, Split.TEST])
@pytest.mark.parametrize("block", [4_000_000, 3])
def test_ranks_are_those_of_the_definition(
    name: str, split: Split, block: int, store: InteractionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_BLOCK_EVENTS", block)
    data, baseline = SequenceData(store, split, 5), counted(store, name)
    found = rank_targets(baseline, data, data.users, scorer=baseline.scorer, batch_size=7).ranks
    logs, domains = histories(store), store.catalog.item_domains
    for user, rank in zip(data.users.tolist(), found.tolist()):
        items = logs[user][0][: None if split is Split.TEST else -1]
        *history, target = items
        pool = [x for x in store.catalog.items_of(int(domains[target])).tolist() if x != target]
        scores = [by_hand(store, name, history[-1], x) for x in pool if x not in history]
        own = by_hand(store, name, history[-1], target)
        # Behind the first number the second one decides only where it is said to.
        key = (lambda s: s if s[0] == 0 else s[:1]) if name == "itemknn" else (lambda s: s)
        expected = 1 + sum(key(x) >= key(own) for x in scores)
        assert rank == expected


@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_the_latest_share_may_be_one_event_or_all(store: InteractionStore, share: float) -> None:
    recent, popular = counted(store, "popularity-recent", share), counted(store, "popularity")
    total = popular.scores.sum()
    assert recent.scores.floor().sum() == total if share == 1 else recent.scores.max() < total


def test_encode_returns_the_last_item(store: InteractionStore) -> None:
    baseline = counted(store, "itemknn")
    items = torch.tensor([[3, 1, 0], [2, 0, 0]])
    assert baseline.encode(items, items, torch.tensor([0, 0])).tolist() == [[1], [2]]
    with pytest.raises(InputError, match="empty history"):
        baseline.encode(torch.zeros(1, 3, dtype=torch.int64), items, torch.tensor([0]))


@pytest.fixture(scope="module")
def runs(store: InteractionStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "runs"
    ablate(store.path, [*BASELINES, "hstu"], [1], out, bindings=QUICK, jobs=2)
    return out


def test_tables_have_them_beside_models(runs: Path, tmp_path: Path) -> None:
    rows = json.loads((runs / "ablation.json").read_text())
    assert [row["variant"] for row in rows] == [*BASELINES, "hstu"]
    assert [row["parameters"] for row in rows[:-1]] == [0, 0, 0]
    assert all(set(row["test"]) == set(rows[-1]["test"]) for row in rows)
    compared = pair_runs([runs])
    assert [one.variant for one in compared] == [*BASELINES[1:], "hstu"]
    assert "itemknn" in write_report([runs], tmp_path / "report").read_text()


@pytest.mark.parametrize("name", BASELINES)
def test_their_runs_are_evaluated_and_recommend(
    name: str, runs: Path, store: InteractionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / f"{name}-seed1"
    assert app.run(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["test"] == summary["test"]
    user, domain = store.user_token(0), store.domain_names[0]
    asked = ["recommend", str(run), "--user", user, "--domain", domain, "--k", "3", "--json"]
    assert app.run(asked) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3


def test_an_interrupted_count_is_done_again(
    store: InteractionStore, tmp_path: Path, runs: Path
) -> None:
    words = ["train", "--data", str(store.path), "--out", str(tmp_path / "run")]
    words += ["--gin_bindings", "xd_train.baseline = 'popularity'"]
    assert app.run(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").unlink()
    assert app.run([*words[:5], "--resume"]) == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["test"] == summary["test"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_needs_a_model_refuses_a_baseline(
    runs: Path, store: InteractionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "popularity-seed1"
    with pytest.raises(InputError, match="is a baseline"):
        hstu_xd.load(run)
    assert app.run(["export", str(run), "--out", str(tmp_path / "exported")]) == 2
    assert "is a baseline" in capsys.readouterr().err
    step = ["bench", "train-step", "--data", str(store.path), "--variants", "popularity"]
    assert app.run(step) == 2
    assert "no training step" in capsys.readouterr().err


def test_a_recipe_names_no_baseline(store: InteractionStore, tmp_path: Path) -> None:
    recipe = ["xd_train.baseline = 'itemknn'"]
    with pytest.raises(InputError, match=r"'hstu' would have xd_train.baseline = 'itemknn'"):
        ablate(store.path, ["hstu"], [1], tmp_path / "out", bindings=recipe)
