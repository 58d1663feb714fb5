"""The command line explains itself: plain text that fits a screen, sentences that are whole."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from hstu_xd.cli.app import COMMANDS, build_app, run


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command and all below it, with the words that call them."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


ALL = dict(commands(typer.main.get_command(build_app())))


@pytest.fixture(params=ALL, ids=" ".join)
def path(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_the_screen(
    path: tuple[str, ...],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([*path, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.isascii()
    assert "\x1b" not in said.out
    assert max(map(len, said.out.splitlines())) <= columns
    _, _, text = said.out.partition("\n\n")
    assert not re.search(r"\.\.\.$", text, re.MULTILINE), "a sentence is cut off"


def test_every_option_and_argument_is_explained(path: tuple[str, ...]) -> None:
    for parameter in ALL[path].params:
        assert parameter.help, parameter.name


def test_a_short_help_is_one_sentence_on_one_line(path: tuple[str, ...]) -> None:
    """In a terminal of 80 columns, beside the longest name of its list."""
    if path:
        names = ALL[path[:-1]].commands
        short = ALL[path].get_short_help_str(1000)
        assert short[0].isupper()
        assert short.endswith(".")
        assert len(short) <= 80 - 6 - max(map(len, names))


@pytest.mark.parametrize("words", [[], ["bench"]], ids=["hstu-xd", "bench"])
def test_a_group_alone_prints_its_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    wanted = capsys.readouterr()
    assert run(words) == 0
    assert capsys.readouterr() == wanted


def test_commands_stand_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    text = capsys.readouterr().out
    sections = dict.fromkeys(section for _, section in COMMANDS.values())
    places = [text.index(f"\n{section}:\n") for section in sections]
    assert places == sorted(places)
    for name, (_, section) in COMMANDS.items():
        start = text.index(f"\n{section}:\n")
        assert re.search(rf"^  {name} ", text[start:].split("\n\n")[0], re.MULTILINE)


def test_a_usage_error_says_where_the_usage_is_described(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["trian"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hstu-xd: No such command 'trian'. Did you mean 'train'")
    assert said.endswith("? See hstu-xd --help\n")
    assert run(["synth", "--skew", "0"]) == 2
    said = capsys.readouterr().err
    assert said == "hstu-xd: Missing option '--out'. See hstu-xd synth --help\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hstu-xd upstream-", {"upstream-train", "upstream-evaluate"}),
        ("hstu-xd bench s", {"serving", "service", "sampler", "suite"}),
        ("hstu-xd bench encoder --dtype b", {"bfloat16"}),
    ],
)
def test_tab_completes(typed: str, offered: set[str]) -> None:
    environment = {
        **os.environ,
        "_HSTU_XD_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "hstu_xd"], env=environment, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == offered


def test_help_loads_no_library() -> None:
    """So that it is there at once, and completion too."""
    program = (
        "import sys; from hstu_xd.cli.app import run; run(['bench', 'encoder', '--help']);"
        "sys.exit(bool({'torch', 'numpy', 'polars'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
