"""Item vectors of features: what an item without events is ranked by, and where it appears."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from quick_runs import QUICKEST
from torch import Tensor

import hstu_xd
from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.featured_items import FeaturedItemEmbedding, FeatureTable
from hstu_xd.objectives.retrieval import sample_negatives
from hstu_xd.serving import EncoderSession
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint, save_checkpoint

Cli = Callable[..., Any]
ROWS = "_embedding_module._item_emb.weight"
FEATURES = 'xd_item.features = ("brand", "price", "text")'
COLD = ("a8", "a9", "b8")


def log_of(users: int, events: int, last: str = "") -> str:
    """Users of so many events in two domains each, and in the end one of a given item."""
    lines = ["user,item,domain,time"]
    for user in range(users):
        for event in range(events):
            domain = "ab"[(user + event) % 2]
            lines.append(f"u{user},{domain}{(user * event) % 8},{domain},{1_500_000_000 + event}")
        if last and user % 2:
            lines.append(f"u{user},{last},{last[0]},{1_500_000_900}")
    return "\n".join(lines) + "\n"


def items_of(brands: int = 3, width: int = 2) -> pl.DataFrame:
    """Ten items of two domains; b8 and a9 have the same features, and a7 has none."""
    rows = []
    for number in range(20):
        alike = {18: 9}.get(number, number)
        row: dict[str, Any] = {"item": f"{'ab'[number // 10]}{number % 10}"}
        row |= {"domain": row["item"][0], "brand": f"x{alike % brands}", "price": float(alike)}
        row["text"] = [alike / 10] * width
        rows.append(row | dict.fromkeys(("brand", "price", "text")) if number == 7 else row)
    return pl.DataFrame(rows)


def prepare(cli: Cli, folder: Path, log: str, items: pl.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(log)
    items.write_parquet(folder / "items.parquet")
    said = cli(
        *("prepare", folder / "log.csv", "--out", folder / "store", "--cold-items"),
        *("--item-features", folder / "items.parquet", "--features", "brand,price,text"),
        *("--time-unit", "s"),
    )
    assert said.code == 0, said.err
    return folder / "store"


def train(cli: Cli, store: Path, out: Path, *more: str, code: int = 0) -> str:
    bindings = [word for each in (*QUICKEST, FEATURES, *more) for word in ("--gin_bindings", each)]
    said = cli("train", "--data", store, "--out", out, *bindings)
    assert said.code == code, said.err
    return said.err


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Path:
    """A run whose test targets are an item without events before for every second user."""
    store = prepare(cli, tmp_path, log_of(12, 9, last="a9"), items_of())
    train(cli, store, tmp_path / "run")
    return tmp_path / "run"


def ids_of(catalog: DomainCatalog, *items: str) -> Tensor:
    tokens = [catalog.token(i) for i in range(1, catalog.num_items + 1)]
    return torch.tensor([tokens.index(item) + 1 for item in items])


def test_an_item_without_events_is_its_features(run: Path) -> None:
    model = hstu_xd.load(run)
    assert model.met_items is not None
    met = {model.catalog.token(i) for i in model.met_items.nonzero().squeeze(1).tolist()}
    assert not met & {"a8", "a9", "b8", "b9"}
    vectors = model.item_vectors(ids_of(model.catalog, "a9", "b8", "a8", "a7"))
    assert torch.equal(vectors[0], vectors[1])  # though their rows differ
    assert not torch.equal(vectors[0], vectors[2])
    weights, told = load_checkpoint(run / MODEL_FILE)
    rows = ~model.met_items
    weights[ROWS][rows] = torch.randn(int(rows.sum()), 8)
    save_checkpoint(run / MODEL_FILE, weights, told)
    every = torch.arange(model.catalog.num_items + 1)
    assert torch.equal(hstu_xd.load(run).item_vectors(every), model.item_vectors(every))


def test_targets_that_training_never_met_are_told_apart(cli: Cli, run: Path) -> None:
    test = json.loads((run / "summary.json").read_text())["test"]
    assert (test["count"], test["count[cold]"]) == (12, 6)
    assert test["hr@100[cold]"] == 1.0  # of ten candidates
    said = cli("evaluate", run)
    assert [line for line in said.out.splitlines() if line.startswith("[cold]")]
    assert "count[cold]" in json.loads(cli("evaluate", run, "--json").out)["test"]


def test_a_refit_has_met_what_was_held_out_for_validation(cli: Cli, tmp_path: Path) -> None:
    """In comparisons those targets are cold that no run has met."""
    log = log_of(12, 9, last="a9")
    for user in range(1, 12, 2):
        last = "a9" if user < 6 else "b8"
        log += f"u{user},{last},{last[0]},1500000950\n"
    store, run, again = prepare(cli, tmp_path, log, items_of()), tmp_path / "run", tmp_path / "two"
    train(cli, store, run, "xd_evaluate.exclude_seen = False")
    assert cli("train", "--refit", run, "--out", again).code == 0
    counts = [json.loads((r / "summary.json").read_text())["test"] for r in (run, again)]
    assert [each["count[cold]"] for each in counts] == [6, 3]
    model = hstu_xd.load(again)
    assert model.met_items is not None
    assert model.met_items[ids_of(model.catalog, "a9", "b8")].tolist() == [True, False]
    for pair in ((run, again), (again, run)):
        (found,) = json.loads(cli("compare", *pair, "--json").out)
        assert found["differences"]["mrr[cold]"]["count"] == 3


def test_reports_and_comparisons_tell_them_apart(cli: Cli, run: Path, tmp_path: Path) -> None:
    """Of a model without features, too, which by itself knows nothing of them."""
    plain = [word for each in QUICKEST for word in ("--gin_bindings", each)]
    store = tmp_path / "store"
    assert cli("train", "--data", store, "--out", tmp_path / "plain", *plain).code == 0
    said = cli("compare", tmp_path / "plain", run)
    head, _, row = said.out.splitlines()[:3]
    assert head.endswith("| HR@100 [cold], points |")
    assert row.count("|") == head.count("|")
    (found,) = json.loads(cli("compare", tmp_path / "plain", run, "--json").out)
    assert found["differences"]["ndcg@100[cold]"]["count"] == 6
    assert cli("report", tmp_path / "plain", run, "--out", tmp_path / "page").code == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Targets that training never met" in page
    assert {file.name for file in (tmp_path / "page").glob("cold_*.png")} == {
        "cold_hr_at_100.png",
        "cold_ndcg_at_100.png",
    }
    assert cli("report", tmp_path / "plain", "--out", tmp_path / "without").code == 0
    assert not list((tmp_path / "without").glob("cold_*"))


def test_items_without_events_are_recommended_and_exported(
    cli: Cli, run: Path, tmp_path: Path
) -> None:
    ask = ("recommend", run, "--k", "10", "--include-seen")
    alone = json.loads(cli(*ask, "--user", "u0", "--domain", "a", "--json").out)["items"]
    assert {"a8", "a9"} < {row["item"] for row in alone}
    assert cli(*ask, "--all-users", "--out", tmp_path / "all.parquet").code == 0
    own = pl.read_parquet(tmp_path / "all.parquet").filter(user="u0", domain="a")
    assert dict(zip(own["item"], own["score"])) == pytest.approx(
        {row["item"]: row["score"] for row in alone}, abs=1e-5
    )
    assert cli("export", run, "--out", tmp_path / "export").code == 0
    model = hstu_xd.load(run)
    encode = torch.export.load(tmp_path / "export" / "encoder.pt2").module()
    items = torch.cat([ids_of(model.catalog, "a9", "b1"), torch.zeros(1, dtype=torch.int64)])
    asked = items[None], torch.tensor([[5, 6, 0]]), torch.tensor([1])
    torch.testing.assert_close(encode(*asked), model.encode(*asked), rtol=0, atol=1e-5)
    vectors = torch.load(tmp_path / "export" / "item_vectors.pt")
    assert torch.equal(vectors, model.item_vectors(torch.arange(model.catalog.num_items + 1)))


def test_a_session_serves_them(run: Path) -> None:
    model = hstu_xd.load(run)
    session = EncoderSession(model)
    items = ids_of(model.catalog, "b1", "a9", "b8", "a2").tolist()
    session.append(["u"] * 4, items, [10, 20, 30, 40])
    times = torch.tensor([[10, 20, 30, 40]])
    wanted = model.encode(torch.tensor([items]), times, torch.tensor([0]))
    torch.testing.assert_close(session.query(["u"], [0]), wanted, rtol=0, atol=1e-5)
    found = session.recommend(["u"], [0], 10, exclude_seen=False)[0]
    assert set(ids_of(model.catalog, "a8", "a9").tolist()) < {item for item, _ in found}


def test_a_benchmark_of_steps_reads_them(cli: Cli, run: Path, tmp_path: Path) -> None:
    said = cli(
        *("bench", "train-step", "--data", tmp_path / "store", "--variants", "hstu"),
        *("--gin_config_file", run / "config.gin", "--repeats", "2", "--json"),
    )
    assert said.code == 0, said.err
    assert all(row["correct"] for row in json.loads(said.out))


def test_a_continued_run_keeps_values_by_name(cli: Cli, run: Path, tmp_path: Path) -> None:
    """A brand more shifts the numbers of the others; what was cold and sold has a row now."""
    items = items_of().with_columns(
        brand=pl.when(pl.col("item") == "a0").then(pl.lit("a brand")).otherwise("brand")
    )
    log = log_of(12, 9, last="a9") + "".join(
        f"u{user},{item},{item[0]},{1_500_001_000 + 60 * place}\n"
        for user in range(12)
        for place, item in enumerate(("a0", "b8", "a2", "b3"))
    )
    store = prepare(cli, tmp_path / "newer", log, items)
    words = ("--gin_bindings", "xd_train.learning_rate = 1e-12")
    config = ("--gin_config_file", run / "config.gin")
    said = cli(
        *("train", "--data", store, "--continue-from", run, "--out", tmp_path / "next"),
        *(*config, *words),
    )
    assert said.code == 0, said.err
    first, second = hstu_xd.load(run), hstu_xd.load(tmp_path / "next")
    assert first.item_features is not None
    assert second.item_features is not None
    assert second.item_features.values[0] == ("brand", "a brand")
    same = ("a2", "b3", "a8", "a7")
    torch.testing.assert_close(
        second.item_vectors(ids_of(second.catalog, *same)),
        first.item_vectors(ids_of(first.catalog, *same)),
        rtol=0,
        atol=1e-5,
    )
    assert second.met_items is not None
    assert bool(second.met_items[ids_of(second.catalog, "b8")])
    wider = prepare(cli, tmp_path / "wider", log, items_of(width=3))
    said = cli("train", "--data", wider, "--continue-from", run, "--out", tmp_path / "no")
    assert said.code == 2
    assert "trained with 2 numbers as the feature 'text', and the newer store has 3" in said.err


def test_a_stopped_run_goes_on_with_the_features_that_it_began_with(
    cli: Cli, run: Path, tmp_path: Path
) -> None:
    whole = train(cli, tmp_path / "store", tmp_path / "two", "xd_train.num_epochs = 2")
    assert "Traceback" not in whole
    config = (run / "config.gin").read_text()
    (run / "config.gin").write_text(config.replace("num_epochs = 1", "num_epochs = 2"))
    assert cli("train", "--data", tmp_path / "store", "--out", run, "--resume").code == 0
    one, two = (load_checkpoint(x / "last.safetensors")[0] for x in (run, tmp_path / "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def table(met: list[int]) -> FeatureTable:
    """Four items: the second has a category alone, the last one nothing."""
    nan = float("nan")
    return FeatureTable(
        {"brand": ["x", "y"]},
        {"price": 1},
        torch.tensor([[0], [1], [2], [1], [0]]),
        torch.tensor([[nan], [1.0], [nan], [5.0], [nan]]),
        torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(met), True),
    )


def test_the_sum_of_row_values_and_numbers() -> None:
    module = FeaturedItemEmbedding(4, 3, table([1, 3, 4]), 0.5).eval()
    weights = module.state_dict()
    rows, values = weights["_item_emb.weight"], weights["_values.weight"]
    price = weights["_projection.weight"].squeeze(1)  # of (1, 5), which are one apart from the mean
    expected = torch.stack(
        [
            torch.zeros(3),
            rows[1] + values[1] - price,
            torch.zeros(3),  # never met, and so is its brand
            rows[3] + values[1] + price,
            rows[4],
        ]
    )
    torch.testing.assert_close(module(torch.arange(5)), expected)


def test_rows_are_dropped_in_training_where_features_stand_for_them() -> None:
    module = FeaturedItemEmbedding(4, 3, table([1, 3, 4]), 0.5)
    ids = torch.arange(5).repeat(4000, 1)
    drawn = module(ids) - (module.eval()(ids) - module.state_dict()["_item_emb.weight"])
    kept = (drawn.abs().sum(-1) > 1e-6).float().mean(0)
    assert kept[[1, 3]].tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert kept[4] == 1.0


def test_with_all_rows_dropped_features_alone_rank() -> None:
    module = FeaturedItemEmbedding(4, 3, table([1, 3, 4]), 1.0)
    weights = module.state_dict()
    rows, values = weights["_item_emb.weight"], weights["_values.weight"]
    price = weights["_projection.weight"].squeeze(1)
    zero = torch.zeros(3)  # item 4 has no feature that could stand for its row
    expected = torch.stack([zero, values[1] - price, zero, values[1] + price, rows[4]])
    for each in (module.train(), module.eval()):
        torch.testing.assert_close(each(torch.arange(5)), expected)


def test_no_negative_is_an_item_that_training_never_meets() -> None:
    catalog = DomainCatalog(torch.tensor([0, 0, 0, 0, 1, 1]), ["a", "b"])
    among = torch.tensor([False, True, False, True, False, False])
    draw = torch.Generator().manual_seed(0)
    drawn = sample_negatives(catalog, 9, draw, scope="domain", among=among)
    assert [ids.tolist() for ids in drawn] == [[1, 3], []]
    assert sample_negatives(catalog, 9, draw, scope="catalogue", among=among)[0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ('xd_item.features = ("prise",)', "names 'prise'; did you mean 'price'.*brand, price"),
        ("xd_item.row_dropout = 1.5", "xd_item.row_dropout = 1.5; it must be at most 1"),
        ('xd_item.features = "brand"', "xd_item.features = 'brand' is a str; a tuple is needed"),
    ],
)
def test_bad_settings(cli: Cli, tmp_path: Path, binding: str, message: str) -> None:
    store = prepare(cli, tmp_path, log_of(12, 9), items_of())
    said = train(cli, store, tmp_path / "run", binding, code=2)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_a_store_without_features(
    cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log.csv").write_text(log_of(12, 9))
    assert cli("prepare", tmp_path / "log.csv", "--out", tmp_path / "plain").code == 0
    said = train(cli, tmp_path / "plain", tmp_path / "run", code=2)
    assert "has none: prepare the log with --item-features FILE --features NAMES" in said
    off = ("xd_item.features = ()", "xd_item.row_dropout = 0.5")
    train(cli, tmp_path / "plain", tmp_path / "run", *off)
    assert "xd_item.row_dropout = 0.5 does nothing while xd_item.features is ()" in caplog.text
    assert not (tmp_path / "run" / "item_features.safetensors").exists()
    assert "count[cold]" not in json.loads((tmp_path / "run" / "summary.json").read_text())["test"]


def test_a_domain_may_be_called_cold_without_features(cli: Cli, tmp_path: Path) -> None:
    items = items_of().with_columns(pl.col("domain").replace("a", "cold"))
    store = prepare(cli, tmp_path, log_of(12, 9).replace(",a,", ",cold,"), items)
    said = train(cli, store, tmp_path / "run", code=2)
    assert "domain 'cold' is also the name of a group of targets where xd_item.features" in said
    train(cli, store, tmp_path / "run", "xd_item.features = ()")
    lines = cli("evaluate", tmp_path / "run").out.splitlines()
    assert len([line for line in lines if line.startswith("[cold]")]) == 2  # valid and test
