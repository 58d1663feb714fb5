"""``xd_evaluate``: evaluation, recommendation and tables ask the same question and say which."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quick_runs import QUICKEST
from repeats import repeating_run, repeating_store

from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import Protocol, common_until, protocol_notes
from hstu_xd.evaluation.ranks import rank_targets, recommend_items
from hstu_xd.experiments.ablation import ablate
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import read_run
from hstu_xd.training.settings import load_settings

Say = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_store(tmp_path_factory.mktemp("repeats"))


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeating_run(store, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command that must succeed and return what it printed."""

    def said(*words: str | Path) -> str:
        capsys.readouterr()
        assert run([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return said


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_evaluation_hits_what_recommendation_gives(
    store: Path, trained: Path, exclude_seen: bool
) -> None:
    log, best = InteractionStore.open(store), load_trained(trained)
    data = SequenceData(log, Split.TEST, 8)
    protocol = Protocol(exclude_seen=exclude_seen)
    ranks = rank_targets(best.model, data, data.users, protocol=protocol).ranks
    for user, rank in zip(data.users.tolist(), ranks.tolist()):
        items, times = log.history(user)
        domain = int(best.model.catalog.item_domains[items[-1]])
        given = recommend_items(
            best.model, items[:-1], times[:-1], domain, 5, window=8, protocol=protocol
        )
        assert (int(items[-1]) in [item for item, _ in given]) == (rank <= 5)


def test_targets_that_were_met_are_counted_and_said(store: Path, trained: Path, say: Say) -> None:
    log = InteractionStore.open(store)
    histories = [log.history(user)[0] for user in range(log.num_users)]
    met = sum(int(items[-1] in items[:-1]) for items in histories)
    assert log.manifest["targets"]["test"]["met_before"] == met > 0
    values = json.loads(say("evaluate", trained, "--json"))
    assert values["protocol"]["exclude_seen"] is True
    assert values["test"]["count_unreachable"] == met
    assert values["test"]["hr@100"] <= 1 - met / values["test"]["count"]
    assert f"{met} of {log.num_users} targets are items that the user had met" in (
        text := say("evaluate", trained)
    )
    assert "exclude_seen on" in text
    values = json.loads(say("evaluate", trained, "--include-seen", "--json"))
    assert values["protocol"]["exclude_seen"] is False
    assert values["test"]["hr@100"] == 1
    assert "exclude_seen off" in say("evaluate", trained, "--include-seen")


def test_the_setting_of_the_run_decides(store: Path, tmp_path: Path, say: Say) -> None:
    one = repeating_run(store, tmp_path / "one", "xd_evaluate.exclude_seen = False")
    assert read_run(one)["protocol"]["exclude_seen"] is False
    assert not load_trained(one).protocol.exclude_seen
    summary = json.loads((one / "summary.json").read_text())
    assert "count_unreachable" not in summary["test"]
    assert json.loads(say("evaluate", one, "--json"))["test"] == summary["test"]
    ask = ("recommend", one, "--user", "u00", "--domain", "jazz", "--k", "99", "--json")
    everything = {row["item"] for row in json.loads(say(*ask))["items"]}
    unseen = {row["item"] for row in json.loads(say(*ask, "--exclude-seen"))["items"]}
    log = InteractionStore.open(store)
    met = {log.catalog.token(item) for item in log.history(log.user_index("u00"))[0].tolist()}
    assert everything - unseen == {item for item in met if item.startswith("jazz")}


def test_every_table_says_by_what_it_was_measured(
    store: Path, trained: Path, tmp_path: Path, say: Say
) -> None:
    table = ablate(store, ("hstu", "mask"), (1,), tmp_path / "runs", bindings=QUICKEST, jobs=2)
    assert "exclude_seen on" in table
    assert "targets are items that the user had met before" in table
    assert table == (tmp_path / "runs" / "ablation.md").read_text()
    assert "exclude_seen on" in say("compare", tmp_path / "runs")
    assert "exclude_seen off" in say("compare", tmp_path / "runs", "--include-seen")
    say("report", tmp_path / "runs", "--out", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "exclude_seen on" in page
    assert "cannot be recommended and count as misses" in page
    row = json.loads((tmp_path / "runs" / "ablation.json").read_text())[0]
    assert row["test"]["count_unreachable"] > 0


def test_rows_of_two_protocols_are_not_compared(
    store: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = repeating_run(
        store,
        tmp_path / "mask",
        "xd_encoder.domain_mask = True",
        "xd_evaluate.exclude_seen = False",
    )
    assert run(["compare", str(trained), str(other)]) == 2
    assert "is evaluated by Protocol(exclude_seen=False" in capsys.readouterr().err
    assert run(["compare", str(trained), str(other), "--exclude-seen"]) == 0
    variant = tmp_path / "own.gin"
    variant.write_text("xd_evaluate.exclude_seen = False\n")
    with pytest.raises(InputError, match=r"variant .*own\.gin is evaluated by Protocol"):
        ablate(store, ("hstu", str(variant)), (1,), tmp_path / "runs", bindings=QUICKEST)


def test_notes_of_old_and_of_differing_runs() -> None:
    new: dict[str, Any] = {"protocol": Protocol().as_json()}
    other = {"protocol": Protocol(exclude_seen=False).as_json()}
    assert "Runs of an earlier version" in " ".join(protocol_notes([new, {}], {}))
    (note,) = protocol_notes([new, other], {})
    assert "different protocols (xd_evaluate.exclude_seen)" in note


def test_notes_of_runs_that_were_trained_on_more() -> None:
    """A table says what all of its runs were trained on; one of them may know more."""
    recorded = {"split": "global", "valid_from": 100, "test_from": 200}
    runs = [{"protocol": recorded, "train": {"train_until": until}} for until in ("valid", "train")]
    for some in (runs, runs[::-1], [*runs, {"protocol": recorded}]):
        assert common_until(some) is Split.TRAIN
        (told, *_) = protocol_notes(some, {"count": 1})
        assert "is the target of validation and of test" in told
    assert common_until(runs[:1]) is Split.VALID
    assert "is the target of test." in protocol_notes(runs[:1], {"count": 1})[0]


def test_options_of_evaluate_change_the_protocol(store: Path, trained: Path, say: Say) -> None:
    def measured(*options: str) -> dict[str, Any]:
        return json.loads(say("evaluate", trained, "--json", *options))

    plain = measured()
    assert plain["protocol"] == {
        "exclude_seen": True,
        "candidates": "domain",
        "ties": "against",
        "ks": [1, 10, 100],
        "split": "leave-one-out",
        "valid_from": 0.8,
        "test_from": 0.9,
    }
    everything = measured("--candidates", "all")
    assert everything["protocol"]["candidates"] == "all"
    assert everything["test"]["mrr"] < plain["test"]["mrr"]
    some = measured("--candidates", "3", "--ks", "2,1")
    assert some["protocol"] == plain["protocol"] | {"candidates": 3, "ks": [1, 2]}
    assert {"hr@1", "hr@2", "ndcg@2", "mrr", "mrr[jazz]"} < some["test"].keys()
    assert not {"hr@10", "ndcg@1"} & some["test"].keys()
    assert some["test"]["mrr"] > plain["test"]["mrr"]
    # A domain has no more than ten songs.
    many = measured("--candidates", "999")["test"]
    assert many == pytest.approx(plain["test"], rel=1e-9)
    text = say("evaluate", trained, "--candidates", "3", "--ties", "favour", "--ks", "2")
    assert "expectation over 3 random candidates of the target's domain" in text
    assert "ties count in the target's favour" in text
    assert "hr@2    ndcg@2       mrr" in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--candidates", "some"), "candidates = 'some'; it must be one of domain, all, or a num"),
        (("--candidates", "0"), "candidates = 0; it must be at least 1"),
        (("--ties", "for"), "ties = 'for'; it must be one of against, favour"),
        (("--ks", "1,ten"), "--ks 1,ten: numbers with commas are needed, 5,10,50"),
        (("--ks", "0,5"), "ks = (0, 5); it must be at least 1"),
    ],
)
def test_options_that_are_none(
    trained: Path, option: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(trained), *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("xd_evaluate.ks = ()", r"ks = \(\); numbers in ascending order are needed"),
        ("xd_evaluate.ks = (10, 5)", r"ks = \(10, 5\); numbers in ascending order"),
        ("xd_evaluate.ks = (5.5,)", "5.5 is a float; a int is needed"),
        ("xd_evaluate.candidates = True", "is a bool; a str or a int is needed"),
        ("xd_evaluate.ks = (5, 10)", "select_metric = 'ndcg@100'; it must be one of hr@5, hr@10"),
    ],
)
def test_settings_that_are_none(binding: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings([], [binding])


def test_a_run_is_measured_and_shown_by_its_own_protocol(
    store: Path, tmp_path: Path, say: Say
) -> None:
    bindings = (
        *QUICKEST,
        "xd_evaluate.ks = (2, 5)",
        "xd_evaluate.candidates = 4",
        "xd_train.select_metric = 'hr@2'",
    )
    table = ablate(store, ("hstu", "popularity"), (1,), tmp_path / "runs", bindings=bindings)
    assert "| HR@2 % | HR@5 % | NDCG@5 % | MRR % | HR@5 [switch] % | HR@5 [stay] % |" in table
    assert "expectation over 4 random candidates" in table
    one = tmp_path / "runs" / "hstu-seed1"
    summary = json.loads((one / "summary.json").read_text())
    found = json.loads(say("evaluate", one, "--json"))
    assert found["test"] == summary["test"]
    assert Protocol.from_run(read_run(one)) == load_trained(one).protocol
    assert "NDCG@5, points" in say("compare", tmp_path / "runs")
    assert "HR@3, points" in say("compare", tmp_path / "runs", "--ks", "1,3")
    say("report", tmp_path / "runs", "--out", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "NDCG@5 by domain as a table" in page
    assert "HR@100" not in page
    assert (tmp_path / "report" / "curve_hr_at_5.png").is_file()
