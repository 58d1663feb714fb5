"""``xd_train.domain`` and the variant ``single``: a model a domain, as if there were no other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_runs import QUICKEST

from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.cuts import TimeCuts
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.experiments.ablation import ablate
from hstu_xd.experiments.comparison import pair_runs
from hstu_xd.experiments.report.shared_data import alone_notes
from hstu_xd.experiments.run_folders import aggregate
from hstu_xd.experiments.tuning import tune
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint
from hstu_xd.training.run import load_trained, train
from hstu_xd.training.settings import load_settings

START = 1_600_000_000


def write_store(folder: Path, histories: dict[str, list[str]]) -> Path:
    """Write histories of items, an event a second, whose first letter is their domain."""
    lines = ["user,item,domain,timestamp"]
    for user, items in histories.items():
        lines += [f"{user},{item},{item[0]},{START + i}" for i, item in enumerate(items)]
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    prepare_logs([str(folder / "log.csv")], folder / "store")
    return folder / "store"


def histories_of(seed: int = 0) -> dict[str, list[str]]:
    random = np.random.default_rng(seed)
    found = {
        f"u{user:02d}": [f"{'ab'[x % 2]}{x // 2}" for x in random.choice(24, 9, replace=False)]
        for user in range(30)
    }
    # Whose targets lie in a domain that is new to them.
    return found | {"v1": ["a1", "a2", "a3", "b1"], "v2": ["a4", "a5", "b2", "b3"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("two"), histories_of())


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "runs"
    ablate(store, ("hstu", "single"), (1,), out, bindings=QUICKEST)
    return out


def read_windows(data: SequenceData, log: InteractionStore) -> dict[str, tuple[str, str]]:
    """Read of each user of a split the window and the target."""
    batch, targets = data.batch(data.users)
    token, ends = log.catalog.token, batch.offsets.tolist()
    return {
        user: (
            " ".join(token(item) for item in batch.item_ids[begin:end].tolist()),
            token(int(targets[end - 1])),
        )
        for user, begin, end in zip(log.user_tokens(data.users).to_list(), ends, ends[1:])
    }


def test_windows_and_targets_of_a_domain_by_hand(tmp_path: Path) -> None:
    folder = write_store(
        tmp_path,
        {
            "long": ["a1", "b1", "a2", "a3", "b2", "a4", "b3"],
            "new": ["a1", "a2", "a3", "b1"],
            "other": ["b1", "b2", "b3", "a1", "b2"],
            "two": ["a1", "a2"],
        },
    )
    log = InteractionStore.open(folder)

    def windows(split: Split, domain: int) -> dict[str, tuple[str, str]]:
        return read_windows(SequenceData(log, split, 9, None, domain), log)

    assert windows(Split.TRAIN, 0) == {"long": ("a1 a2", "a3"), "new": ("a1", "a2")} | {
        "two": ("a1", "a2")
    }
    assert windows(Split.VALID, 0) == {"long": ("a1 a2 a3", "a4"), "new": ("a1 a2", "a3")}
    with pytest.raises(InputError, match=r"test split; .*, and of the domain 'a' 2 each"):
        windows(Split.TEST, 0)
    assert windows(Split.TRAIN, 1) == {"long": ("b1", "b2"), "other": ("b1 b2", "b3")}
    test = SequenceData(log, Split.TEST, 9, None, 1)
    assert read_windows(test, log) == {
        "long": ("b1 b2", "b3"),
        "other": ("b1 b2 b3", "b2"),
    }
    assert test.counts == {"count_without_history": 1}
    assert SequenceData(log, Split.TRAIN, 9, None, 1).counts == {}
    batch, _ = test.batch(test.users[:1])
    assert (batch.timestamps - START).tolist() == [1, 4]
    seen, offsets = test.seen(test.users)
    assert [log.catalog.token(x) for x in seen.tolist()] == ["b1", "b2", "b1", "b2", "b3"]
    assert offsets.tolist() == [0, 2, 5]
    cuts = TimeCuts(START + 3, START + 5)
    cut = SequenceData(log, Split.VALID, 9, cuts, 1)
    assert read_windows(cut, log) == {"long": ("b1", "b2"), "other": ("b1 b2 b3", "b2")}
    assert cut.counts == {"count_without_history": 1}


def test_another_domain_s_events_change_no_weight(tmp_path: Path) -> None:
    histories = histories_of()
    mapped = {f"b{i}": f"b{(i + 5) % 12}" for i in range(12)}
    others = {u: [mapped.get(item, item) for item in items] for u, items in histories.items()}
    weights = []
    for name, found in (("one", histories), ("other", others)):
        settings = load_settings([], [*QUICKEST, "xd_train.domain = 'a'"])
        train(write_store(tmp_path / name, found), settings, tmp_path / name / "run")
        weights.append(load_checkpoint(tmp_path / name / "run" / MODEL_FILE)[0])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_single_is_a_row_over_all_targets(store: Path, runs: Path) -> None:
    rows = json.loads((runs / "ablation.json").read_text())
    whole, a, b = rows
    assert [row.get("domain") for row in rows] == [None, "a", "b"]
    assert {row["variant"] for row in rows[1:]} == {"single"}
    assert b["test"]["count_without_history"] == 1
    hstu, single = aggregate(rows)
    found = {name: spread.mean for name, spread in single.metrics.items()}
    for row, name in ((a, "a"), (b, "b")):
        served = row["test"]["count"]
        asked = served + row["test"].get("count_without_history", 0)
        assert found[f"count[{name}]"] == asked == whole["test"][f"count[{name}]"]
        assert found[f"mrr[{name}]"] == pytest.approx(row["test"]["mrr"] * served / asked)
    assert found["count"] == whole["test"]["count"]
    weighted = sum(found[f"hr@10[{x}]"] * found[f"count[{x}]"] for x in "ab") / found["count"]
    assert found["hr@10"] == pytest.approx(weighted)
    assert (hstu.variant, single.variant, single.seeds) == ("hstu", "single", (1,))
    table = (runs / "ablation.md").read_text()
    assert table.count("| single |") == 2  # the second time by domain
    assert "gives or takes:\n\n| variant | seeds | NDCG@100 [a] % | NDCG@100 [b] % |" in table
    assert [x.variant for x in aggregate([a, b, whole])] == ["single", "hstu"]
    assert "earlier event of the domain is a miss: a 0 of" in table
    assert alone_notes([whole]) == []
    assert ablate(store, ("hstu", "single"), (1,), runs, bindings=QUICKEST) == table


def test_runs_are_compared_user_by_user_over_all_targets(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (paired,) = pair_runs([runs])
    hstu, single = aggregate(json.loads((runs / "ablation.json").read_text()))
    for name in ("hr@10", "mrr", "mrr[a]", "mrr[b]"):
        expected = single.metrics[name].mean - hstu.metrics[name].mean
        assert paired.differences[name].mean == pytest.approx(expected)
    assert paired.seeds == (1,)
    assert paired.differences["mrr"].count == hstu.metrics["count"].mean
    alone = [str(runs / f"single-domain{i}-seed1") for i in (0, 1)]
    assert run(["compare", *alone]) == 2
    assert "was trained on one domain alone, as all runs here" in capsys.readouterr().err
    assert run(["report", str(runs), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "single is one model a domain, each trained on its domain" in page
    assert "differ in" not in page
    assert "repeat a seed" not in page


def test_a_run_of_one_domain_is_a_control_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = runs / "single-domain1-seed1"
    summary = json.loads((one / "summary.json").read_text())
    capsys.readouterr()
    assert run(["evaluate", str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == summary["test"]
    assert run(["evaluate", str(one)]) == 0
    assert "users with a target have no earlier event to read and are left out" in (
        capsys.readouterr().out
    )
    for command in (
        ["recommend", str(one), "--user", "u01", "--domain", "a"],
        ["export", str(one), "--out", str(tmp_path / "exported")],
    ):
        assert run(command) == 2
        assert "was trained on the domain 'b' alone (xd_train.domain)" in capsys.readouterr().err
    with pytest.raises(InputError, match="give a run of all domains, or prepare a log of that"):
        load_trained(one)


def test_what_one_domain_cannot_be(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"xd_train.domain = 'a' trains no item of another dom"):
        load_settings([], ["xd_train.domain = 'a'", "xd_evaluate.candidates = 'all'"])
    unknown = load_settings([], [*QUICKEST, "xd_train.domain = 'c'"])
    with pytest.raises(InputError, match="unknown domain 'c'; known: a, b"):
        train(store, unknown, tmp_path / "run")
    with pytest.raises(InputError, match="'single' is a training a domain, which one search can"):
        tune(store, ("single",), 1, tmp_path / "tuned")
