"""The benchmark command as a user runs it, with tiny sizes."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from hstu_xd.cli import bench
from hstu_xd.cli.app import build_app

# Keys of a row that checks outside the repository rely on.
KEYS = {
    "provider", "seq_len", "num_domains", "skew", "dtype", "device",
    "ms_median", "ms_p20", "ms_p80", "peak_bytes", "correct",
}  # fmt: skip
TINY = {
    "batch_size": 2, "heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1, "threads": 1,
    "repeats": 2,
}  # fmt: skip


def command_line(what: str, *arguments: object, **options: Any) -> list[str]:
    """Words of a benchmark's command; a list is an option that is repeated."""
    return ["bench", what, *map(str, arguments), *_words(options)]


def _words(options: dict[str, Any]) -> Iterator[str]:
    for name, values in options.items():
        option = name if name.startswith("gin_") else name.replace("_", "-")
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, bool):
                yield f"--{option}" if value else f"--no-{option}"
            else:
                yield f"--{option}={value}"


def call(*line: object, **options: Any) -> None:
    """Run a benchmark's command; errors come as they are raised."""
    words = command_line(*map(str, line), **options)
    typer.main.get_command(build_app()).main(words, prog_name="hstu-xd", standalone_mode=False)


def run_bench(capsys: pytest.CaptureFixture[str], what: str, **options: Any) -> list[dict]:
    """Rows that the command prints, as the first thing a user would do with them."""
    heeded = inspect.signature(getattr(bench, what.replace("-", "_"))).parameters
    tiny = {name: value for name, value in TINY.items() if name in heeded}
    capsys.readouterr()
    call(what, json=True, **(tiny | options))
    return json.loads(capsys.readouterr().out)
