"""Runs the command line in-process, so that a test takes milliseconds."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from hstu_xd.cli.app import run


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``cli("prepare", log, "--out", folder)`` gives exit code, stdout and stderr."""

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Outcome(code, *capsys.readouterr())

    return call
