"""Turns the arguments of ``prepare`` into files: NAME=PATH, folders of parts, Hive partitions.

A path is a path: nothing in it is a pattern.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hstu_xd.data.sources.columns import ALIASES
from hstu_xd.data.sources.content import check_readable
from hstu_xd.errors import InputError

COMPRESSED = {".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz"}
# Endings that tell how a file is written, not what it is about.
_CODECS = {*COMPRESSED, ".snappy", ".lz4", ".parquet", ".c000"}
_TABLES = {
    "",
    *[".csv", ".tsv", ".txt", ".dat", ".data", ".json", ".jsonl", ".ndjson", ".inter", ".pq"],
}
_MARKERS = re.compile(r"(_(SUCCESS|committed|started|metadata|common_metadata).*|.*\.crc)")
_PART = re.compile(
    r"(.*[-_.])?(part|chunk|shard|split|batch|block|file)[-_.]?([rm][-_.])?\d+.*"  # Spark, dask
    r"|[\d_\-]+(_copy_\d+)?"  # Hive's 000000_0, years, days
    r"|.*\d{4,}-of-\d{4,}.*|.*\d{12}"  # TensorFlow, BigQuery
    r"|data[-_]?\d.*|run-\d.*"
    r"|.*[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}.*",
    re.IGNORECASE,
)
_SPLITS = ["train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval"]
_NO_DOMAINS = re.compile(
    rf"(.*[-_.])?({'|'.join(_SPLITS)})|data|logs?|out|output|export|dump|all|full|sample|results?",
    re.IGNORECASE,
)
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Input:
    """One file to read.

    Attributes:
        path: the file.
        domain: as given by NAME=PATH.
        partition: the domain that a Hive folder ``domain=NAME`` around the file tells.
        folder: the folder it was found in, when a folder was given.
    """

    path: Path
    domain: str | None = None
    partition: str | None = None
    folder: Path | None = None

    @property
    def stem(self) -> str:
        """Name of the folder given, or of the file without its endings."""
        if self.folder is not None:
            return self.folder.resolve().name
        name = self.path
        while name.suffix.lower() in _CODECS:
            name = name.with_suffix("")
        return name.stem if name.suffix.lower() not in _CODECS else name.name

    @property
    def kind(self) -> str:
        """The ending that tells the file type, compression left out."""
        name = self.path.with_suffix("") if self.path.suffix in COMPRESSED else self.path
        return name.suffix.lower()


def list_inputs(texts: Sequence[str], domain_column: str | None) -> tuple[list[Input], list[str]]:
    """List the files that the arguments name.

    Args:
        texts: ``PATH`` or ``NAME=PATH``; a folder stands for the parts of one log in it.
        domain_column: a further name of Hive partitions that are domains.

    Returns:
        The files, and notes on what was left out.

    Raises:
        InputError: a path that cannot be read, a folder without a log, or a file given twice.
    """
    keys = {*ALIASES["domain"], (domain_column or "domain").lower()}
    found: list[Input] = []
    skipped: list[Path] = []
    for text in texts:
        domain, path = _split(text)
        if path.is_dir():
            files = _parts_of(path, skipped)
            found += [Input(f, domain, _partition(f, keys), folder=path) for f in files]
            continue
        check_readable(path)
        if len(texts) > 1 and (_MARKERS.fullmatch(path.name)):
            skipped.append(path)
        else:
            found.append(Input(path, domain, _partition(path, keys)))
    by_place: dict[tuple[int, int], Path] = {}
    for one in found:
        status = one.path.stat()
        known = by_place.setdefault((status.st_dev, status.st_ino), one.path)
        if known is not one.path:
            also = "" if str(known) == str(one.path) else f" (also as {known})"
            raise InputError(f"{one.path}: given twice{also}; name every file once")
    empty = [one for one in found if not one.path.stat().st_size]
    if len(empty) < len(found):
        skipped += [one.path for one in empty]
        found = [one for one in found if one not in empty]
    if not found:
        raise InputError(f"{', '.join(texts)}: no log there; name at least one")
    return found, [f"left out {path}: {_reason(path)}" for path in skipped]


def _reason(path: Path) -> str:
    if _MARKERS.fullmatch(path.name):
        return "a marker, no part of the log"
    return "empty" if not path.stat().st_size else "hidden"


def _split(text: str) -> tuple[str | None, Path]:
    """Split ``NAME=PATH``; an existing file whose name holds "=" is taken as it is."""
    name, equals, rest = text.partition("=")
    if not equals or os.path.lexists(text):
        return None, Path(text)
    if not name.strip():
        raise InputError(f"{text!r}: the domain before '=' is empty; write NAME=PATH")
    return name.strip(), Path(rest)


def _parts_of(folder: Path, skipped: list[Path]) -> list[Path]:
    """List the data files below a folder; they must be parts of one log.

    Raises:
        InputError: the folder cannot be read, holds no file, or files of several types.
    """
    files: list[Path] = []

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check the folder")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in sorted(names):
            hidden = name[0] in "._" or _MARKERS.fullmatch(name)
            (skipped if hidden else files).append(Path(place, name))
    if not files:
        raise InputError(f"{folder}: is a folder without a log; name the log files")
    kinds = {file.suffix.lower() for file in files}
    foreign = [f for f in files if f.parent != folder and "=" not in f.parent.name]
    foreign += [f for f in files if f.suffix.lower() not in {*_TABLES, *_CODECS}]
    if len(kinds) > 1 or foreign:
        odd = foreign[0] if foreign else files[-1]
        raise InputError(
            f"{folder}: is a folder that holds more than the parts of one log "
            f"({odd.relative_to(folder)}); name the log files in it"
        )
    for file in files:
        check_readable(file)
    return files


def _partition(path: Path, keys: set[str]) -> str | None:
    """Return the domain that a folder ``domain=NAME`` around a file tells.

    Raises:
        InputError: the partition of events without a domain.
    """
    for folder in reversed(path.parts[:-1]):
        key, equals, value = folder.partition("=")
        if equals and key.lower() in keys:
            if value == _NULL_PARTITION:
                raise InputError(
                    f"{path}: the partition of events without a {key}; leave it out, or give it a "
                    f"domain as NAME={path}"
                )
            return unquote(value)
    return None


def check_domain_of_name(one: Input, others: Sequence[str]) -> None:
    """Refuse to take a file's name for a domain where it looks like a part of a log.

    Args:
        one: the file.
        others: the names of the other files that would be domains.

    Raises:
        InputError: the name is one of a part, of a split, or differs from another in digits only.
    """
    name = one.stem
    twin = next((o for o in others if o != name and _digits_out(o) == _digits_out(name)), None)
    if twin is not None:
        reason = f"differs from {twin!r} in its digits only, as parts of one log do"
    elif _PART.fullmatch(name) or _NO_DOMAINS.fullmatch(name):
        reason = "looks like a part of a log"
    else:
        return
    raise InputError(
        f"{one.path}: no column tells the domain, and the name {name!r} {reason}; give the file "
        f"its domain as NAME=PATH (the same NAME for several files), or name the column with "
        "--domain-col"
    )


def _digits_out(name: str) -> str:
    return re.sub(r"\d+", "", name)
