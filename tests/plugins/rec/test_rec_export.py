import csv
from pathlib import Path

import pytest

from hstu_xd.cli.app import run
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.export import write_interactions


def test_every_event_with_raw_tokens(work: Path) -> None:
    store = InteractionStore.open(work / "store")
    with (work / "data" / "synth.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == store.num_interactions
    assert list(rows[0]) == ["item_id", "user_id", "timestamp"]
    items, times = store.history(0)
    first = [row for row in rows if row["user_id"] == store.user_token(0)]
    assert [row["item_id"] for row in first] == [store.catalog.token(int(i)) for i in items]
    assert [int(row["timestamp"]) for row in first] == times.tolist()


def test_no_folder(work: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_interactions(work / "store", work / "nowhere" / "x.csv")


def test_the_command_says_what_comes_next_and_replaces_nothing_unasked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.csv"
    command = ["rec-dataset", str(work / "store"), "--out", str(out)]
    assert run(command) == 0
    assert out.read_bytes() == (work / "data" / "synth.csv").read_bytes()
    assert f"--dataset mine --item_domain_path {work / 'store'}" in capsys.readouterr().out
    out.write_text("of another")
    assert run(command) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "of another"
    assert run([*command, "--force"]) == 0
    assert out.read_bytes() == (work / "data" / "synth.csv").read_bytes()
