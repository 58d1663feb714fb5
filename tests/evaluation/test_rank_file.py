"""``evaluate --ranks``: what stands in the file gives the metrics, without this package."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repeats import repeating_run, repeating_store
from test_ranking import make

from hstu_xd.cli.app import run
from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.metrics import UNREACHABLE
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.evaluation.rank_file import SCHEMA, writing_ranks
from hstu_xd.evaluation.ranks import best_candidates, target_ranks
from hstu_xd.objectives.objective import DotProduct


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_store(tmp_path_factory.mktemp("repeats"))


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_run(store, tmp_path_factory.mktemp("runs") / "run")


def evaluated(trained: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    assert run(["evaluate", str(trained), "--ranks", str(out), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def metrics_of(file: Path, ks: tuple[int, ...]) -> dict[str, float]:
    """Measure as anybody would: where the target stands in each user's list."""
    rows = pl.read_parquet(file)
    users = rows["user_id"].n_unique()
    found = rows.filter(pl.col("item_id") == pl.col("target_item_id"))
    values = {}
    for k in ks:
        hits = found.filter(pl.col("rank") <= k)
        values[f"hr@{k}"] = len(hits) / users
        if k > 1:
            values[f"ndcg@{k}"] = (1 / (hits["rank"] + 1).log(2)).sum() / users
    of_users = rows.group_by("user_id").agg(pl.col("target_rank").first())
    return values | {"mrr": (1 / of_users["target_rank"]).sum() / users}


@pytest.mark.parametrize(
    "options",
    [(), ("--include-seen",), ("--candidates", "all", "--ks", "3"), ("--ties", "favour")],
)
def test_metrics_from_the_file_are_those_of_the_evaluation(
    trained: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluated(trained, tmp_path / "ranks.parquet", capsys, *options)
    found = metrics_of(tmp_path / "ranks.parquet", tuple(told["protocol"]["ks"]))
    assert found == pytest.approx({name: told["test"][name] for name in found}, rel=1e-12)


@pytest.mark.parametrize("baseline", ["popularity", "itemknn"])
def test_equal_scores_stand_as_the_protocol_ranks_them(
    store: Path, tmp_path: Path, baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = repeating_run(store, tmp_path / "run", f"xd_train.baseline = '{baseline}'")
    for ties in ("against", "favour"):
        told = evaluated(counted, tmp_path / f"{ties}.parquet", capsys, "--ties", ties)
        found = metrics_of(tmp_path / f"{ties}.parquet", (1, 10, 100))
        assert found == pytest.approx({name: told["test"][name] for name in found}, rel=1e-12)


def test_rows_are_ordered_and_hold_no_item_that_was_met(
    store: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluated(trained, tmp_path / "ranks.parquet", capsys, "--ks", "1,4")
    rows, log = pl.read_parquet(tmp_path / "ranks.parquet"), InteractionStore.open(store)
    assert rows.columns == SCHEMA.names
    assert rows["user_id"].n_unique() == log.num_users == told["test"]["count"]
    unreachable = rows.filter(pl.col("target_rank").is_null())["user_id"].n_unique()
    assert unreachable == told["test"]["count_unreachable"]
    for (user,), mine in rows.group_by("user_id", maintain_order=True):
        items, _ = log.history(log.user_index(str(user)))
        met = {log.catalog.token(item) for item in items[:-1].tolist()}
        assert not met & set(mine["item_id"].drop_nulls())
        listed = mine["rank"].drop_nulls().to_list()
        assert listed == list(range(1, len(listed) + 1))
        assert len(mine) <= 4
        assert mine["score"].drop_nulls().is_sorted(descending=True)
        assert set(mine["target_item_id"]) == {log.catalog.token(int(items[-1]))}
        assert mine["domain"].str.starts_with("jazz").to_list() == (
            mine["target_item_id"].str.starts_with("jazz").to_list()
        )


def test_a_user_without_candidates_keeps_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{user},{item},films,{time}"
        for user, items in {"u": "abca", "v": "abcd", "w": "bcad"}.items()
        for time, item in enumerate(items, 1_600_000_000)
    ]
    # Of a domain with one item that the user has met before, nothing is left to rank.
    lines += [f"x,{item},{domain},{time}" for item, domain, time in (
        ("a", "films", 1_600_000_000), ("z", "books", 1_600_000_001), ("b", "films", 1_600_000_002),
        ("z", "books", 1_600_000_003),
    )]  # fmt: skip
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["user,item,domain,timestamp", *lines]) + "\n")
    assert run(["prepare", str(log), "--out", str(tmp_path / "store")]) == 0
    trained = repeating_run(tmp_path / "store", tmp_path / "run")
    told = evaluated(trained, tmp_path / "ranks.parquet", capsys)
    mine = pl.read_parquet(tmp_path / "ranks.parquet").filter(pl.col("user_id") == "x")
    assert mine.rows() == [("x", "books", None, None, None, "z", None)]
    found = metrics_of(tmp_path / "ranks.parquet", (1, 10, 100))
    assert found == pytest.approx({name: told["test"][name] for name in found})


@given(
    seed=st.integers(0, 10**6),
    num_items=st.integers(1, 30),
    num_domains=st.integers(1, 3),
    k=st.integers(1, 12),
    block=st.sampled_from([1, 17, 10**6]),
    candidates=st.sampled_from(["domain", "all"]),
    ties=st.sampled_from(["against", "favour"]),
)
def test_lists_are_the_best_candidates_with_the_target_at_its_rank(
    seed: int, num_items: int, num_domains: int, k: int, block: int, candidates: str, ties: str
) -> None:
    protocol = Protocol(candidates=candidates, ties=ties)
    items, users, targets, seen = make(seed, num_items, num_domains, 6)
    offsets = torch.tensor([0] + [len(s) for s in seen]).cumsum(0)
    flat = torch.tensor([item for s in seen for item in s], dtype=torch.int64)
    asked = (flat, offsets, items.catalog, DotProduct(items.item_vectors))
    ranks, others = target_ranks(users, targets, *asked, protocol=protocol)
    found, scores = best_candidates(
        users, targets, ranks, *asked, k, protocol=protocol, block_scores=block
    )
    domains = items.catalog.item_domains.tolist()
    for user, target, rank, number, mine, theirs, met in zip(
        users, targets.tolist(), ranks.tolist(), others.tolist(), found, scores, seen
    ):
        size = min(k, number + (rank != UNREACHABLE))
        listed = mine[:size].tolist()
        assert mine[size:].eq(0).all()
        assert theirs[:size].tolist() == [float(user @ items.item_vectors(x)) for x in mine[:size]]
        assert theirs[:size].tolist() == sorted(theirs[:size].tolist(), reverse=True)
        assert len(set(listed)) == size
        assert not {0, *met} & set(listed)
        assert candidates == "all" or {domains[x] for x in listed} <= {domains[target]}
        assert (listed.index(target) + 1 if target in listed else None) == (
            rank if rank <= k else None
        )


def test_files_that_cannot_be_written(
    store: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        assert run(["evaluate", str(trained), *options]) == 2
        return capsys.readouterr().err

    csv, there = tmp_path / "ranks.csv", tmp_path / "ranks.parquet"
    there.write_text("mine")
    assert f"--ranks {csv}: ranks are written as Parquet" in refused("--ranks", str(csv))
    assert "exists; add --force to replace it, or choose another --ranks" in (
        refused("--ranks", str(there))
    )
    assert there.read_text() == "mine"
    assert "--force replaces an existing --ranks, which is not given" in refused("--force")
    assert run(["evaluate", str(trained), "--ranks", str(there), "--force"]) == 0
    assert len(pl.read_parquet(there)) > 40
    (folder := tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match="is a folder; give the name of a file as --ranks"):
        writing_ranks(folder, InteractionStore.open(store)).__enter__()


def test_a_failure_leaves_what_was_there(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks.parquet"
    out.write_text("mine")
    with (
        pytest.raises(HstuXdError, match=r"ranks\.parquet: cannot be written \(disk full\)"),
        writing_ranks(out, InteractionStore.open(store), force=True),
    ):
        raise OSError("disk full")
    assert out.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["ranks.parquet"]


def test_only_test_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_file = evaluated(trained, tmp_path / "ranks.parquet", capsys)
    assert run(["evaluate", str(trained), "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert with_file == without
    rows = pl.read_parquet(tmp_path / "ranks.parquet")
    assert rows["user_id"].n_unique() == without[Split.TEST.value]["count"]
