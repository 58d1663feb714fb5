"""``xd_evaluate.split = "global"``: a log cut in time, and nothing of what comes later trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_runs import QUICKEST

from hstu_xd.cli.app import run
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.cuts import TimeCuts, cut_in_time, events_before
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import GLOBAL, Protocol
from hstu_xd.experiments.ablation import ablate
from hstu_xd.training import trainer as trainers
from hstu_xd.training.run import train
from hstu_xd.training.run_facts import read_run
from hstu_xd.training.settings import load_settings

DAY = 86_400
START = 1_577_836_800  # 2020-01-01
CUT = ("xd_evaluate.split = 'global'",)


def write_store(folder: Path, histories: dict[str, list[tuple[str, int]]]) -> Path:
    """Write histories of items, whose first letter is their domain, and days."""
    lines = ["user,item,domain,timestamp"]
    for user, events in histories.items():
        lines += [f"{user},{item},{item[0]},{START + day * DAY}" for item, day in events]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    prepare_logs([str(folder / "log.csv")], folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(3)
    histories = {
        f"u{user:02d}": [
            (f"{'ab'[item % 2]}{item}", int(day))
            for item, day in zip(
                random.integers(12, size=10).tolist(), np.sort(random.choice(100, 10, False))
            )
        ]
        for user in range(30)
    }
    # New after the cut: users of one and of several events, and an item.
    histories |= {"new1": [("a1", 95)], "new2": [("a1", 92), ("b3", 97)], "v": [("a1", 85)]}
    histories["old"] = [("a1", 3), ("b3", 5), ("afresh", 99)]
    return write_store(tmp_path_factory.mktemp("cut"), histories)


def targets_of(data: SequenceData, log: InteractionStore) -> dict[str, tuple[list[str], str, int]]:
    """Read of each user of a split the window, the target and its day."""
    batch, targets = data.batch(data.users)
    token, ends = log.catalog.token, batch.offsets.tolist()
    found = {}
    for user, begin, end in zip(log.user_tokens(data.users).to_list(), ends, ends[1:]):
        window = [token(item) for item in batch.item_ids[begin:end].tolist()]
        day = (int(batch.next_timestamps[end - 1]) - START) // DAY
        found[user] = (window, token(int(targets[end - 1])), day)
    return found


def test_targets_of_periods_by_hand(tmp_path: Path) -> None:
    folder = write_store(
        tmp_path,
        {
            "late": [("a1", 25), ("a2", 26)],
            "most": [("a1", 1), ("a2", 2), ("b1", 11), ("b2", 12), ("a3", 21), ("b3", 22)],
            "once": [("a1", 2), ("a2", 3)],
            "skip": [("a2", 4), ("a1", 24)],
            "tie": [("a1", 9), ("a2", 10), ("a3", 20)],
        },
    )
    log = InteractionStore.open(folder)
    cuts = TimeCuts(START + 10 * DAY, START + 20 * DAY)
    found = {s: SequenceData(log, s, 50, cuts) for s in Split}
    assert targets_of(found[Split.TRAIN], log) == {
        "most": (["a1"], "a2", 2),
        "once": (["a1"], "a2", 3),
    }
    assert targets_of(found[Split.VALID], log) == {
        "most": (["a1", "a2", "b1"], "b2", 12),
        "tie": (["a1"], "a2", 10),
    }
    assert targets_of(found[Split.TEST], log) == {
        "most": (["a1", "a2", "b1", "b2", "a3"], "b3", 22),
        "skip": (["a2"], "a1", 24),
        "tie": (["a1", "a2"], "a3", 20),
    }
    assert found[Split.TRAIN].counts == {}
    assert found[Split.VALID].counts == {"count_new_items": 1}
    assert found[Split.TEST].counts == {"count_without_history": 1, "count_new_items": 2}
    assert SequenceData(log, Split.TEST, 50).counts == {}


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    cut=st.integers(-1, 12),
    seed=st.integers(0, 10**6),
)
def test_events_before_a_time_are_counted(sizes: list[int], cut: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    histories = [np.sort(random.integers(10, size=size)) for size in sizes]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    found = events_before(np.concatenate(histories), offsets, cut)
    assert found.tolist() == [int((times < cut).sum()) for times in histories]


def test_cuts_are_dates_times_and_shares() -> None:
    times = START + DAY * np.arange(100)[::-1]

    def cut(valid_from: str | int | float, test_from: str | int | float) -> TimeCuts:
        told = (f"valid_from = {valid_from!r}", f"test_from = {test_from!r}")
        return cut_in_time(times, valid_from, test_from, told=told)

    expected = TimeCuts(START + 80 * DAY, START + 90 * DAY)
    assert cut(0.8, 0.9) == expected
    assert cut("2020-03-21", "2020-03-31T00:00:00Z") == expected
    assert cut(START + 80 * DAY, "2020-03-31") == expected
    with pytest.raises(InputError, match=r"valid_from = 'March': write dates such as 2020-01-30"):
        cut("March", 0.9)
    with pytest.raises(InputError, match=r"test_from = 1.5: a share of the events lies between"):
        cut(0.8, 1.5)
    for pair in ((0.9, 0.8), ("2019-01-01", 0.9), (0.8, "2021-01-01"), (0.5, 0.5)):
        with pytest.raises(InputError, match=r"do not cut the log, .* 1577836800 \(2020-01-01"):
            cut(*pair)


def test_training_reads_nothing_from_the_cut_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    batch_of = SequenceData.batch

    def batch(data: SequenceData, users: np.ndarray):
        found = batch_of(data, users)
        if data.split is Split.TRAIN:
            read.append(int(found[0].next_timestamps.max()))
        return found

    monkeypatch.setattr(SequenceData, "batch", batch)
    train(store, load_settings([], [*QUICKEST, *CUT]), tmp_path / "run")
    cut = read_run(tmp_path / "run")["protocol"]["valid_from"]
    assert max(read) < cut == START + 80 * DAY


def test_events_after_the_cut_change_no_weight(store: Path, tmp_path: Path) -> None:
    log = InteractionStore.open(store)
    cuts = Protocol(split=GLOBAL).cuts(log)
    assert cuts is not None
    histories = {}
    for user in range(log.num_users):
        items, times = log.history(user)
        events = [
            (log.catalog.token(item), (time - START) // DAY)
            for item, time in zip(items.tolist(), times.tolist())
        ]
        # What comes later comes in another order.
        late = [x for x, (_, day) in zip(events, events) if START + day * DAY >= cuts.valid_from]
        swapped = [(item, day) for (item, _), (_, day) in zip(reversed(late), late)]
        histories[log.user_token(user)] = [*events[: len(events) - len(late)], *swapped]
    bindings = [
        *QUICKEST,
        *CUT,
        f"xd_evaluate.valid_from = {cuts.valid_from}",
        f"xd_evaluate.test_from = {cuts.test_from}",
    ]
    weights = []
    for name, folder in (("as it was", store), ("swapped", write_store(tmp_path, histories))):
        train(folder, load_settings([], bindings), tmp_path / name)
        weights.append(trainers.load_checkpoint(tmp_path / name / trainers.MODEL_FILE)[0])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_records_its_cut_and_tables_tell_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = (*CUT, "xd_evaluate.valid_from = 0.7", "xd_evaluate.test_from = '2020-03-25'")
    table = ablate(
        store, ("hstu", "popularity"), (1,), tmp_path / "runs", bindings=[*QUICKEST, *shares]
    )
    told = (
        f"events before {START + 67 * DAY} (2020-03-08 00:00:00) train, and of those from there on "
        f"and from {START + 84 * DAY} (2020-03-25 00:00:00) on a user's last one is the target"
    )
    left_out = "3 users with a target have no earlier event to read and are left out; 1 targets are"
    assert told in table
    assert left_out in table
    # What is there is kept: a share is the same as the time that it became.
    assert table == ablate(
        store, ("hstu", "popularity"), (1,), tmp_path / "runs", bindings=[*QUICKEST, *shares]
    )
    recorded = read_run(tmp_path / "runs" / "hstu-seed1")["protocol"]
    assert recorded["split"] == "global"
    assert (recorded["valid_from"], recorded["test_from"]) == (START + 67 * DAY, START + 84 * DAY)
    capsys.readouterr()
    one = str(tmp_path / "runs" / "hstu-seed1")
    assert run(["evaluate", one, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "runs" / "hstu-seed1" / "summary.json").read_text())
    assert values["test"] == summary["test"]
    assert summary["test"]["count_without_history"] == 3
    for command in (["evaluate", one], ["compare", str(tmp_path / "runs")]):
        assert run(command) == 0
        text = capsys.readouterr().out
        assert told in text
        assert left_out in text


def test_settings_that_cut_nothing(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_settings([], ["xd_evaluate.valid_from = 0.5"])
    assert "xd_evaluate.valid_from = 0.5 does nothing while xd_evaluate.split is" in caplog.text
    with pytest.raises(InputError, match=r"split = 'time'; it must be one of leave-one-out, glob"):
        load_settings([], ["xd_evaluate.split = 'time'"])
    wrong = load_settings([], [*QUICKEST, *CUT, "xd_evaluate.test_from = 'soon'"])
    with pytest.raises(InputError, match=r"xd_evaluate.test_from = 'soon': write dates such as"):
        train(store, wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    nobody = write_store(tmp_path, {"a": [("a1", 1), ("a2", 2)], "b": [("a1", 8), ("a2", 9)]})
    cuts = TimeCuts(START + 4 * DAY, START + 6 * DAY)
    with pytest.raises(InputError, match=r"valid split; users with an event before its time and"):
        SequenceData(InteractionStore.open(nobody), Split.VALID, 5, cuts)
