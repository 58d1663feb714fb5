"""``hstu-xd rank``: a run folder with metrics, the same every time, that learns what is there."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.ranking import METRICS
from hstu_xd.files import gin_folder
from hstu_xd.ranking.batches import RequestData
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.settings import (
    BLOCKS,
    InterestSettings,
    RankingSettings,
    RankSettings,
    SearchSettings,
    load_ranking_settings,
)
from hstu_xd.ranking.task import RankingTask, training_events
from hstu_xd.ranking.trainer import RankTrainer

Cli = Callable[..., Any]
NAMES = {
    "counts": "no events + counts",
    "din": "DIN",
    "tin": "TIN",
    "hard": "TIN + hard",
    "soft": "no events + soft",
    "both": "TIN + hard + soft",
    "xd": "TIN + hard + TAPE of candidates + domain states + encoder of 100 + mask + target view"
    " + TAPE + DDSR + dqk=16 + dv=16 + linear_dropout_rate=0.1",
}
QUICK = ("xd_rank.num_epochs = 2", "xd_rank.batch_requests = 32", "xd_search.k = 10")


def trainer_of(
    requests_path: Path, store: InteractionStore, settings: RankingSettings, out: Path
) -> RankTrainer:
    requests = RequestSet.open(requests_path)
    before = requests.manifest["cuts"]["valid_from"]
    return RankTrainer(RankingTask(store, requests, settings, training_events(store, before)), out)


def words(*bindings: str) -> list[str]:
    return [word for binding in bindings for word in ("--gin_bindings", binding)]


@pytest.mark.parametrize("recipe", ["counts", "din", "tin", "hard", "soft", "both", "xd"])
def test_every_recipe_runs(recipe: str, cli: Cli, requests_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    file = f"gin/standalone/rank_{recipe}.gin"
    said = cli(
        *("rank", "--data", requests_path, "--out", out),
        *("--gin_config_file", file, *words(*QUICK)),
    )
    assert said.code == 0, said.err
    assert "test auc 0." in said.out
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "valid", "train", "valid", "test"]
    requests = RequestSet.open(requests_path)
    for name in METRICS:
        for group in ("", "[deal=true]", "[deal=false]", "[d0]", "[d1]"):
            assert 0 <= summary["test"][name + group] < 2
            assert rows[-1][name + group] == summary["test"][name + group]
    assert summary["test"]["rows"] == len(requests.rows(requests.of_split(Split.TEST)))
    assert summary["requests_hash"] == requests.manifest["hash"]
    assert {"best_epoch", "valid", "seconds_per_step", "parameters"} <= set(summary)
    stored = load_ranking_settings([out / "config.gin"])
    assert stored == load_ranking_settings([Path(file)], QUICK)
    facts = json.loads((out / "run.json").read_text())
    assert (facts["kind"], facts["seed"]) == ("ranking", stored.rank.random_seed)
    # The number of events is in the name: a binding sets another one than the recipe.
    assert facts["variant_name"].replace(" + 10 events", "") == NAMES[recipe]


def test_groups_of_fields_are_levels(cli: Cli, requests_path: Path, tmp_path: Path) -> None:
    command = ("rank", "--data", requests_path, "--gin_config_file", "gin/standalone/rank_tin.gin")
    sizes = []
    for name, groups in (("a", ("item", "type+aisle")), ("b", ("all", "all"))):
        bindings = words(*QUICK, f"xd_interest.groups = {groups!r}")
        assert cli(*command, "--out", tmp_path / name, *bindings).code == 0
        sizes.append(json.loads((tmp_path / name / "summary.json").read_text())["parameters"])
    assert sizes[0] == sizes[1]
    said = cli(*command, "--out", tmp_path / "c", *words("xd_interest.groups = ('isle',)"))
    assert (said.code, "names 'isle', which is no field (did you mean 'aisle'?)" in said.err) == (
        2,
        True,
    )


def test_what_users_did_before_is_learnt(
    requests_path: Path, store: InteractionStore, tmp_path: Path
) -> None:
    """Users take what they took: counts see it at once, no history sees nothing of it."""

    def gauc(out: str, **interest: Any) -> float:
        settings = RankingSettings(
            interest=InterestSettings(**interest),
            rank=RankSettings(num_epochs=3, batch_requests=16),
        )
        (tmp_path / out).mkdir()
        return trainer_of(requests_path, store, settings, tmp_path / out).fit()["test"]["gauc"]

    assert gauc("a", kind="none", counts=True) > gauc("b", kind="none") + 0.15


@pytest.mark.parametrize("group", ["history longest", "deal=false"])
def test_the_epoch_is_the_best_one_of_a_group(
    cli: Cli, requests_path: Path, tmp_path: Path, group: str
) -> None:
    name, run = f"auc[{group}]", tmp_path / "run"
    bindings = words(
        *QUICK,
        "xd_rank.num_epochs = 4",
        "xd_rank.early_stop_patience = 4",
        f"xd_rank.select_metric = '{name}'",
    )
    said = cli("rank", "--data", requests_path, "--out", run, *bindings)
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["split"] == "valid"]
    best = max(valid, key=lambda row: row[name])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_epoch"] == best["epoch"]
    assert summary["valid"][name] == best[name]
    assert f"valid {name} " in said.out


def test_equal_seeds_give_equal_runs(cli: Cli, requests_path: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        command = ("rank", "--data", requests_path, "--out", tmp_path / name)
        assert cli(*command, *words(*QUICK)).code == 0
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("a", "b"))
    assert a == b


def test_a_batch_holds_only_what_came_before(requests_path: Path, store: InteractionStore) -> None:
    requests = RequestSet.open(requests_path)
    index = HistoryIndex.of(store)
    for kind in ("recent", "hard"):
        settings = RankingSettings(search=SearchSettings(kind=kind, k=6))
        data = RequestData(index, requests, settings)
        chosen = np.array([5, 2])
        batch = data.batch(chosen)
        groups = 2 if kind == "recent" else 2 * batch.candidates.shape[1]
        assert batch.events.shape == batch.buckets.shape == (groups, 6)
        assert (batch.candidates[1] == _row(requests, 2)).all()
        before = store.history(int(requests.users[5]))
        allowed = set(before[0][before[1] < requests.times[5]].tolist())
        own = batch.events[: groups // 2]
        assert set(own[own > 0].tolist()) <= allowed


def _row(requests: RequestSet, number: int) -> Any:
    import torch

    rows = slice(requests.offsets[number], requests.offsets[number + 1])
    return torch.from_numpy(requests.candidates[rows])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("xd_search.kind = 'soft'", "xd_search.kind = 'soft'; it must be one of recent, hard"),
        ("xd_search.k = 0", "xd_search.k = 0; it must be at least 1"),
        ("xd_rank.hidden = (8, 0)", "it must be widths of at least 1"),
        ("xd_rank.lr = 1.0", "Did you mean xd_rank.learning_rate?"),
        ("xd_train.num_epochs = 3", "xd_train.num_epochs"),
        ("xd_search.k = 'many'", "is a str; a int is needed"),
        ("xd_rank.select_metric = 'logloss'", "one of gauc, auc, ndcg@10, mrr, or one of a group"),
        ("xd_rank.select_metric = 'gauc[]'", "or one of a group, gauc[unseen]"),
        (
            "xd_rank.select_metric = 'gauc[longst]'",
            "has no validation candidates here; of gauc there are gauc, gauc[",
        ),
        ("xd_rank.select_metric = 'gauc[longst]'", "did you mean 'gauc[history longest]'?"),
    ],
)
def test_bad_settings_are_refused(
    binding: str, message: str, cli: Cli, requests_path: Path, tmp_path: Path
) -> None:
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "a", *words(binding))
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "a").exists()


def test_unknown_levels_leave_no_run_behind(cli: Cli, requests_path: Path, tmp_path: Path) -> None:
    bindings = words("xd_search.kind = 'hard'", "xd_search.levels = ('shelf',)")
    said = cli("rank", "--data", requests_path, "--out", tmp_path / "a", *bindings)
    assert (said.code, "names 'shelf'" in said.err) == (2, True)
    assert not (tmp_path / "a").exists()


def test_a_store_is_no_requests(cli: Cli, store_path: Path, tmp_path: Path) -> None:
    said = cli("rank", "--data", store_path, "--out", tmp_path / "a")
    assert said.code == 2
    assert "is a store; make requests of it with hstu-xd requests --data" in said.err


def test_an_existing_run_stays(cli: Cli, requests_path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    said = cli("rank", "--data", requests_path, "--out", tmp_path)
    assert (said.code, "is not a run folder; give another --out" in said.err) == (2, True)


def test_settings_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    load_ranking_settings([], ["xd_interest.kind = 'din'", "xd_interest.order = 2"])
    assert "xd_interest.order = 2 does nothing while xd_interest.kind is 'din'" in caplog.text


def test_an_infinite_loss_is_named(
    requests_path: Path, store: InteractionStore, tmp_path: Path
) -> None:
    settings = RankingSettings(rank=RankSettings(learning_rate=1e30, num_epochs=2))
    trainer = trainer_of(requests_path, store, settings, tmp_path)
    with pytest.raises(HstuXdError, match=r"not finite in epoch \d; lower xd_rank.learning_rate"):
        trainer.fit()


def test_an_undefined_choice_is_named(
    requests_path: Path, store: InteractionStore, tmp_path: Path
) -> None:
    requests = RequestSet.open(requests_path)
    requests.labels[:] = 0
    settings = RankingSettings(rank=RankSettings(num_epochs=1))
    trained = training_events(store, 0)
    trainer = RankTrainer(RankingTask(store, requests, settings, trained), tmp_path)
    with pytest.raises(InputError, match="no user there has candidates of both classes"):
        trainer.fit()


def test_recipes_bind_what_is_there() -> None:
    for file in sorted(gin_folder().glob("standalone/rank_*.gin")):
        assert not math.isnan(load_ranking_settings([file]).rank.init_std)
    assert set(BLOCKS) == {"xd_search", "xd_interest", "xd_rank", "xd_short", "xd_encoder"}
