"""Fixtures of the report's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from workshop import Workshop

from hstu_xd.cli.experiments import report
from hstu_xd.errors import HstuXdError


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def hstu_xd_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``hstu-xd report`` in this process; gives the exit code and stderr."""
    app = typer.Typer()
    app.command()(report)

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = typer.main.get_command(app).main([str(w) for w in words], standalone_mode=False)
        except HstuXdError as error:
            return error.exit_code, str(error)
        return code or 0, capsys.readouterr().err

    return call
