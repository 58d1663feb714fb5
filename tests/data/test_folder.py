"""Output folders: what a forced replacement may take away, and what a kill leaves behind."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from log_files import contents, write_log

from hstu_xd.errors import InputError
from hstu_xd.files import LOCK_FILE, locked_folder, replaced_folder


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
    (tmp_path / ".out.lock").write_text(json.dumps({"pid": 1, "host": "h", "since": "then"}))
    leftover = tmp_path / ".out.partial"
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
    with pytest.raises(KeyboardInterrupt), replaced_folder(out, force=True) as folder:
        (folder / "new").write_text("y")
    assert contents(out) == {"old": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_second_writer_of_a_folder_is_refused(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as folder:
        (folder / "mine").write_text("x")
        with (
            pytest.raises(InputError, match=holder(f"writes {out}")),
            replaced_folder(out, force=force),
        ):
            pass
    assert contents(out) == {"mine": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_while_another_process_does(out: Path) -> None:
    with replaced_folder(out) as folder:
        (folder / "mine").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("y")


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"written by another process meanwhile.*--force"):
        write_while_another_process_does(out)
    assert contents(out) == {"theirs": b"y"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def holder(doing: str) -> str:
    """What a refused process is told of this one."""
    host = re.escape(socket.gethostname())
    return rf"another process \(pid {os.getpid()} on {host} since 2[^)]*\) {re.escape(doing)};"


def test_a_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "run"
    program = (
        "import os, sys, pathlib, hstu_xd.files\n"
        "with hstu_xd.files.locked_folder(pathlib.Path(sys.argv[1]), 'trains into'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    message = rf"another process \(pid {process.pid} on .* since .*\) trains into .*run;"
    with pytest.raises(InputError, match=message), locked_folder(folder, "trains into"):
        pass
    process.kill()
    process.communicate()
    assert (folder / LOCK_FILE).exists()
    with locked_folder(folder, "trains into"):
        (folder / "kept").touch()
    assert contents(folder) == {"kept": b""}


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_folder(tmp_path / "a" / "b", "trains into"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_lock_is_not_that_of_who_came_after(tmp_path: Path) -> None:
    """The folder is removed under its holder, and made again by another process."""
    folder = tmp_path / "run"
    with locked_folder(folder, "trains into"):
        (folder / LOCK_FILE).unlink()
        (folder / LOCK_FILE).write_text("theirs")
    assert (folder / LOCK_FILE).read_text() == "theirs"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked_folder(tmp_path / "run", "trains into"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
