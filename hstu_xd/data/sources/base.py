"""What every kind of input file offers: a fast scan, and slow records that know their line."""

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One event of a file as text, with the line it starts on (the header is line 1)."""

    line: int
    user: str | None = None
    item: str | None = None
    domain: str | None = None
    time: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Source(ABC):
    """One input file whose columns are known.

    Attributes:
        path: the file, as the user named it.
        domain: the domain of all its events, or None when a column tells.
        time_divisor: timestamps are divided by this to give seconds (1000 for milliseconds).
    """

    path: Path
    domain: str | None
    time_divisor: int

    @abstractmethod
    def scan(self) -> "pl.LazyFrame":
        """Events as text columns user, item, domain (if not constant) and time of any type."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield the events one by one; a line that cannot be read becomes a record with a problem.

        Slow on purpose: it runs only to name the line of an error that the fast scan has met.
        """

    def at(self, line: int) -> str:
        """Where a line is, for messages."""
        return f"{self.path}:{line}"


def open_bytes(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file for reading; gzip is known by its content, not its name (as in polars)."""
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
    return gzip.open(path, "rb") if zipped else path.open("rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Lines of a text file with their numbers from 1; None for a line that is not UTF-8.

    Raises:
        InputError: a gzip file that ends early or is damaged.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                try:
                    yield number, raw.decode("utf-8")
                except UnicodeDecodeError:
                    yield number, None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}:{number + 1}: the gzip file is truncated or damaged after line {number} "
            f"({error}); copy or download it again"
        ) from error


def first_lines(path: Path, count: int) -> list[str]:
    """Up to ``count`` lines from the start of a file, line ends removed.

    Raises:
        InputError: a line that is not UTF-8 text, or a damaged gzip file.
    """
    lines: list[str] = []
    for number, line in numbered_lines(path):
        if line is None:
            raise InputError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8")
        lines.append(line.rstrip("\r\n"))
        if len(lines) == count:
            break
    return lines
