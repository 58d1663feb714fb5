import csv
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.cli.app import run
from hstu_xd.data.prepare import prepare_logs
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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["u,NA,a,1", "u,y,a,2", "u,z,a,3"], "item 'NA' would be read as no item at all"),
        (["null,x,a,1", "null,y,a,2", "null,z,a,3"], "user 'null' would be read as no user at all"),
        (["u,x,a,1", "u,y,a,2"], "no user has three events"),
    ],
)
def test_what_their_reader_cannot_take(tmp_path: Path, rows: list[str], said: str) -> None:
    prepared(tmp_path, rows)
    with pytest.raises(InputError, match=said):
        write_interactions(tmp_path / "store", tmp_path / "log_out.csv")
    assert not list(tmp_path.glob("log_out*"))


def test_users_that_they_cannot_evaluate_are_left_out(tmp_path: Path, caplog: Any) -> None:
    prepared(tmp_path, ["v,x,a,1", "u,x,a,1", "u,y,a,2", "u,z,b,3", "w,z,b,3", "w,x,a,4"])
    assert write_interactions(tmp_path / "store", tmp_path / "log_out.csv") == 3
    text = (tmp_path / "log_out.csv").read_text(encoding="utf-8")
    assert text.splitlines() == ["item_id,user_id,timestamp", "x,u,1", "y,u,2", "z,u,3"]
    assert "2 users with fewer than three events are left out" in caplog.text


def prepared(folder: Path, rows: list[str]) -> None:
    text = "\n".join(["user,item,domain,time", *rows])
    (folder / "log.csv").write_text(text, encoding="utf-8")
    prepare_logs([str(folder / "log.csv")], folder / "store")


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
