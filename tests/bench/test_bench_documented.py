"""The commands for a GPU in examples/results: each is accepted, with its device replaced."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.bench import passes, providers
from hstu_xd.bench.cases import Case
from hstu_xd.cli.app import run

TEXT = (Path(__file__).parents[2] / "examples" / "results" / "README.md").read_text()


def commands() -> Iterator[list[str]]:
    """Arguments of every command in the list."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    (block,) = (block for block in blocks if "--device cuda" in block)
    variables: dict[str, str] = {}
    for line in block.replace("--device cuda", "--device cpu").splitlines():
        if assigned := re.fullmatch(r'(\w)="(.*)"', line):
            variables[f"${assigned[1]}"] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(name, value)
        yield shlex.split(line)


COMMANDS = list(commands())


@pytest.mark.parametrize("command", COMMANDS, ids=[command[-1] for command in COMMANDS])
def test_a_documented_command_is_accepted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Case] = []

    def measure(
        cases: list[Case], names: list[str], *, against: list[str], **_: Any
    ) -> Iterator[dict]:
        measured.extend(cases)
        assert set(names) <= providers.PROVIDERS[cases[0].what].keys()
        return iter(())

    monkeypatch.setattr(passes, "measure", measure)
    monkeypatch.chdir(tmp_path)
    program, *arguments = command
    assert program == "hstu-xd"
    assert run(arguments) == 0
    assert measured
