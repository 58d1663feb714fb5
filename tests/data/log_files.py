"""Logs for tests: written from rows, and stores compared byte by byte."""

from collections.abc import Iterable, Sequence
from pathlib import Path

HEADER = ("user_id", "item_id", "domain", "timestamp")


def write_log(
    path: Path,
    rows: Iterable[Sequence[object]],
    header: Sequence[str] | None = HEADER,
    separator: str = ",",
) -> Path:
    lines = [] if header is None else [separator.join(header)]
    lines += [separator.join(str(field) for field in row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
