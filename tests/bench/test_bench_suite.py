"""``hstu-xd bench suite``: parts in their order, rows that stay, goals, and time that ends."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench_runs import call

from hstu_xd.bench import suite as suites
from hstu_xd.bench.rows import environment, write_rows
from hstu_xd.bench.suite import Goal, Part, Suite, column, ratio
from hstu_xd.bench.suite_parts import SUITES
from hstu_xd.cli.app import run
from hstu_xd.errors import InputError

PARTS = [Part(name, "attention", {"seq_len": 4, "device": "cpu"}) for name in ("first", "second")]


def row(provider: str, **columns: Any) -> dict[str, Any]:
    return {"provider": provider, "correct": True, **environment("cpu"), **columns}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is started; every command writes one row and says nothing."""
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        started.append(command)
        write_rows(Path(command[command.index("--out") + 1]), [row("a", ms_median=2.0)])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(suites.subprocess, "run", start)
    return started


def said(suite: Suite, out: Path, minutes: float = 1.0, *, rehearsal: bool = False) -> list[str]:
    lines: list[str] = []
    suites.run(suite, out, minutes=minutes, rehearsal=rehearsal, say=lines.append)
    return lines


def test_what_is_stored_is_not_measured_again(commands: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "rows"
    for _ in range(2):
        assert said(Suite(PARTS, []), out)[:2] == ["first: stored", "second: stored"]
    assert [command[-1] for command in commands] == [
        str(out / f"{part.name}.unfinished.json") for part in PARTS
    ]
    assert sorted(file.name for file in out.iterdir()) == ["first.json", "second.json"]
    write_rows(out / "second.json", [row("a", failed="OutOfMemoryError: so much")])
    said(Suite(PARTS, []), out)
    assert len(commands) == 3


def test_the_rest_is_said_when_the_time_is_over(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said(Suite(PARTS, []), tmp_path, minutes=0)
    assert not commands
    assert lines[:2] == [f"{part.name}: the time was over" for part in PARTS]
    assert lines[-1] == "not measured: second: the time was over"

    def late(command: list[str], *, timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(suites.subprocess, "run", late)
    lines = said(Suite(PARTS, []), tmp_path)
    assert lines[0] == "first: it took longer than the time that was left"


def test_a_part_that_dies_costs_only_itself(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = suites.subprocess.run

    def start(command: list[str], **given: Any) -> Any:
        if "first" in command[-1]:
            return subprocess.CompletedProcess(command, -6, "", "at\nillegal memory access\n")
        return works(command, **given)

    monkeypatch.setattr(suites.subprocess, "run", start)
    lines = said(Suite(PARTS, []), tmp_path)
    assert lines[:2] == ["first: illegal memory access", "second: stored"]


def test_rows_of_another_machine_are_refused(commands: list[list[str]], tmp_path: Path) -> None:
    write_rows(tmp_path / "first.json", [row("a") | {"device_name": "NVIDIA X"}])
    with pytest.raises(
        InputError, match=r'first.json was measured with device_name "NVIDIA X", he'
    ):
        said(Suite(PARTS, []), tmp_path)


def test_goals_are_read_from_rows() -> None:
    found = {
        "p": [row("a", ms_median=6.0, num_domains=5), row("a", ms_median=9.0, num_domains=8)],
        "q": [row("b", ms_median=3.0, variant="all")],
    }
    of_a = column("p", "a", "ms_median", num_domains=8)
    assert Goal("g", 9, of_a).line(found) == ["g", "at least 9", "9.00", "yes"]
    assert Goal("g", 8, of_a, at_most=True).line(found) == ["g", "at most 8", "9.00", "NO"]
    share = ratio(of_a, column("q", "all", "ms_median"))
    assert Goal("g", 4, share).line(found)[2:] == ["3.00", "NO"]
    assert Goal("g", 4, share).line({"p": found["p"]})[2:] == ["-", "unmeasured"]


@pytest.mark.parametrize("device", SUITES)
def test_every_goal_reads_a_part_and_all_have_names_of_their_own(device: str) -> None:
    suite = SUITES[device]([Path("kuairand7"), Path("amazon4"), Path("fk")])
    names = [part.name for part in suite.parts]
    assert len(set(names)) == len(names)

    class Asked(dict):
        def get(self, name: str, default: Any = None) -> Any:
            asked.append(name)
            return default

    for goal in suite.goals:
        asked: list[str] = []
        assert goal.read(Asked()) is None
        assert asked
        assert set(asked) <= set(names), goal.text


@pytest.mark.parametrize("device", SUITES)
def test_the_command_takes_every_part(
    device: str, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a command line that hstu-xd understands; what it measures is checked elsewhere."""
    import typer

    from hstu_xd.cli.app import build_app

    store = tmp_path / "kuairand7"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    call("suite", f"--device={device}", f"--out={tmp_path / 'rows'}", "--rehearse", data=str(store))
    assert "This was a rehearsal" in capsys.readouterr().out
    bench = typer.main.get_command(build_app()).commands["bench"]  # type: ignore[attr-defined]
    assert commands
    for command in commands:
        what, *words = command[command.index("bench") + 1 :]
        bench.commands[what].make_context(what, words)
    assert (tmp_path / "rows" / "rehearsal" / "train-step-kuairand7.json").exists()


@pytest.mark.slow
def test_a_rehearsal_runs(tmp_path: Path) -> None:
    """Real processes; of the GPU's suite the first part, by Triton's interpreter."""
    first = Suite(SUITES["cuda"]([]).parts[:1], [])
    assert said(first, tmp_path, minutes=5, rehearsal=True)[0] == "encoder-1024-5: stored"
    rows = json.loads((tmp_path / "rehearsal" / "encoder-1024-5.json").read_text())
    assert rows[0]["provider"] == "triton"
    assert rows[0]["correct"]
    assert rows[0]["peak_bytes"] is not None


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "suite", "--out", str(tmp_path), "--device"]
    assert run([*words, "cpu", "--data", str(tmp_path / "none")]) == 2
    assert "no prepared store; make it with hstu-xd prepare" in capsys.readouterr().err


def test_a_gpu_is_needed_for_its_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench", "suite", "--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "PyTorch finds no GPU; use --device cpu, or --rehearse" in capsys.readouterr().err
