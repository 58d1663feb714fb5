"""Output folders: what a forced replacement may take away, and what a kill leaves behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from log_files import contents, write_log

from hstu_xd.files import replaced_folder


@pytest.mark.parametrize("place", ["log.csv", "runs/one/best.safetensors"])
def test_force_takes_nothing_away_that_prepare_did_not_write(
    place: str, cli: Callable, tmp_path: Path
) -> None:
    log, out = write_log(tmp_path / "log.csv", [("a", "b", "books", 1)]), tmp_path / "out"
    assert cli("prepare", log, "--out", out).code == 0
    theirs = out / place
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_bytes(log.read_bytes())
    source = theirs if theirs.suffix == ".csv" else log
    outcome = cli("prepare", source, "--out", out, "--force")
    assert outcome.code == 2
    assert f"holds {Path(place).parts[0]!r}" in outcome.err
    assert "move it away" in outcome.err
    assert theirs.read_bytes() == log.read_bytes()


def test_force_replaces_all_that_prepare_wrote(cli: Callable, tmp_path: Path) -> None:
    rows = [("a", f"i{n}", "books", n) for n in range(4)]
    log, out = write_log(tmp_path / "log.csv", rows), tmp_path / "out"
    assert cli("prepare", log, "--out", out, "--write-upstream").code == 0
    assert cli("prepare", log, "--out", out, "--force").code == 0
    assert not (out / "sasrec_format.csv").exists()


def test_leftover_of_a_kill_is_cleared_away(tmp_path: Path) -> None:
    # In a container every start has the same process id.
    leftover = tmp_path / f".out.partial-{os.getpid()}"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("y")
    assert contents(tmp_path / "out") == {"whole": b"y"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_between_the_two_renames_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(out) as folder:
        (folder / "new").write_text("y")
    assert contents(out) == {"old": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
