"""What a file holds, told by its first bytes, and its text as a stream of bounded memory.

Names tell little: Parquet files are called ``000000_0``, archives ``log.csv``. Compressed text is
unpacked as it is read, a block at a time, so that a small file cannot fill the memory.
"""

import bz2
import gzip
import io
import mmap
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError, LZMAFile
from pathlib import Path
from typing import BinaryIO, cast

from hstu_xd.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_MAGIC = b"PAR1"
TAR_OFFSET, TAR_MAGIC = 257, b"ustar"
HEAD = 512
BLOCK = 1 << 24
# No log has such lines; a file made to fill the memory has.
LONGEST_LINE = 1 << 24
PROBE_BYTES = 1 << 23


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


# First bytes -> name of the compression, and how to open it.
_COMPRESSIONS: dict[bytes, tuple[str, Callable[[Path], BinaryIO]]] = {
    b"\x1f\x8b": ("gzip", lambda path: cast(BinaryIO, gzip.GzipFile(path))),
    b"BZh": ("bzip2", lambda path: cast(BinaryIO, bz2.BZ2File(path))),
    b"\xfd7zXZ\x00": ("xz", lambda path: cast(BinaryIO, LZMAFile(path))),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": ("zstd", _open_zstd),
}
_NAMES = [name for name, _ in _COMPRESSIONS.values()]
_NO_LETTERS = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_AS_TEXT = "export its table as CSV or Parquet"
_UNPACK = "unpack it and name the log in it"
# First bytes -> what the file is, and the mend.
_REFUSED: dict[bytes, tuple[str, str]] = {
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("an lz4 file", _UNPACK),
    b"\xff\x06\x00\x00sNaPpY": ("a snappy file", _UNPACK),
    b"ORC": ("an ORC file", _AS_TEXT),
    b"Obj\x01": ("an Avro file", _AS_TEXT),
    b"ARROW1": ("an Arrow (Feather) file", _AS_TEXT),
    b"FEA1": ("a Feather file", _AS_TEXT),
    b"\x89HDF": ("an HDF5 file", _AS_TEXT),
    b"SQLite format 3": ("an SQLite database", _AS_TEXT),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", _AS_TEXT),
    b"\x93NUMPY": ("a NumPy file", _AS_TEXT),
    b"%PDF": ("a PDF", _AS_TEXT),
    b"\x80\x02": ("a pickle", _AS_TEXT),
    b"\x80\x03": ("a pickle", _AS_TEXT),
    b"\x80\x04": ("a pickle", _AS_TEXT),
    b"\x80\x05": ("a pickle", _AS_TEXT),
    b"\xff\xfe": ("UTF-16 or UTF-32 text", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save the file as UTF-8"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself with git lfs pull"),
}


def check_readable(path: Path) -> None:
    """Refuse a path that is no regular, readable file.

    Raises:
        InputError: there is no such file, it is a folder or a pipe, or it may not be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a folder; name the log files in it")
        if not stat.S_ISREG(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise InputError(
                f"{path}: is a {kind}; a log is read more than once: write it into a file first"
            )
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link to {path.readlink()}, which does not exist; mend the link"
            ) from error
        raise InputError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def is_parquet(path: Path) -> bool:
    """Tell whether a file is Parquet, whatever it is called.

    Raises:
        InputError: the file is of a kind that is neither text nor Parquet, or is damaged.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(PARQUET_MAGIC):
        return True
    _refuse_foreign(path, head, path)
    if compression_of(path) is not None:
        with open_bytes(path) as file:
            try:
                head = file.read(HEAD)
            except _DAMAGED as error:
                raise _damaged(path, 0, error) from error
        inside = f"{path}: the {compression_of(path)} file holds"
        if (within := _compression_by(head)) is not None:
            raise InputError(f"{inside} a {within} file; unpack it once")
        if head.startswith(PARQUET_MAGIC):
            raise InputError(f"{inside} a Parquet file; unpack it first")
        _refuse_foreign(path, head, inside)
    return False


def _refuse_foreign(path: Path, head: bytes, where: object) -> None:
    start = head.lstrip().lower()
    found = next(
        (
            facts
            for magic, facts in _REFUSED.items()
            if head.startswith(magic) or (magic.startswith(b"<") and start.startswith(magic))
        ),
        None,
    )
    if head[TAR_OFFSET:].startswith(TAR_MAGIC):
        found = ("a tar archive", _UNPACK)
    elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = _zip_facts(path)
    if found is not None:
        verb = "" if str(where).endswith("holds") else ": is"
        raise InputError(f"{where}{verb} {found[0]}, not text; {found[1]}")


def _zip_facts(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        names = []
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook", _AS_TEXT
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"a zip archive ({listed})" if names else "a zip archive", _UNPACK


def compression_of(path: Path) -> str | None:
    """Return the name of a file's compression by its first bytes; None for plain files."""
    with path.open("rb") as file:
        return _compression_by(file.read(8))


def _compression_by(head: bytes) -> str | None:
    return next(
        (name for magic, (name, _) in _COMPRESSIONS.items() if head.startswith(magic)), None
    )


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked; compression is known by its content, not its name."""
    name = compression_of(path)
    for known, opener in _COMPRESSIONS.values():
        if known == name:
            return opener(path)
    return path.open("rb")


_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, LZMAError, OSError)


def _damaged(path: Path, lines: int, error: BaseException) -> InputError:
    """Describe a failure in the middle of a file: of its compression, or of the disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read ({error.strerror}); check the file")
    return InputError(
        f"{path}:{lines + 1}: the {compression_of(path)} file is truncated or damaged after line "
        f"{lines} ({error}); copy or download it again"
    )


def _too_long(path: Path, line: int) -> InputError:
    return InputError(
        f"{path}:{line}: the line is longer than {LONGEST_LINE >> 20} MiB, as no line of a log is; "
        "end lines with a newline"
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a text file with their numbers from 1, without a byte order mark.

    Raises:
        InputError: a compressed file that ends early or is damaged, or an endless line.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            while raw := file.readline(LONGEST_LINE):
                number += 1
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if len(raw) == LONGEST_LINE:
                    raise _too_long(path, number)
                yield number, raw
    except _DAMAGED as error:
        raise _damaged(path, number, error) from error


def text_blocks(path: Path, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the unpacked text in blocks of whole lines, without a byte order mark.

    Raises:
        InputError: a compressed file that ends early or is damaged, or an endless line.
    """
    rest, first = b"", True
    try:
        with open_bytes(path) as file:
            while block := file.read(size):
                if first:
                    block, first = block.removeprefix(BYTE_ORDER_MARK), False
                cut = block.rfind(b"\n") + 1
                if not cut:
                    rest += block
                    if len(rest) > LONGEST_LINE:
                        break
                    continue
                yield rest + block[:cut] if rest else block[:cut]
                rest = block[cut:]
    except _DAMAGED as error:
        for _ in numbered_lines(path):  # raises at the line where the file ends
            pass
        raise _damaged(path, 0, error) from error
    if len(rest) > LONGEST_LINE:
        for _ in numbered_lines(path):
            pass
    if rest:
        yield rest


def holds_byte(path: Path, letter: int) -> bool:
    """Tell whether the unpacked file holds a byte.

    Raises:
        InputError: a compressed file that ends early or is damaged.
    """
    try:
        with open_bytes(path) as file:
            if compression_of(path) is None:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    return text.find(bytes([letter])) >= 0
            while block := file.read(1 << 20):
                if letter in block:
                    return True
    except _DAMAGED as error:
        for _ in numbered_lines(path):  # raises at the line where the file ends
            pass
        raise _damaged(path, 0, error) from error
    return False


def _no_text(path: Path, line: bytes) -> InputError:
    """Describe a first line that is no UTF-8: text in another encoding, or no text at all."""
    if _NO_LETTERS.search(line) is None:
        return InputError(f"{path}:1: not UTF-8 text; save the file as UTF-8")
    return InputError(
        f"{path}: holds bytes that are in no text, and is of no kind that is read; save text as "
        f"UTF-8, tables as CSV or Parquet, and pack with {', '.join(_NAMES)} or not at all"
    )


def first_lines(path: Path, count: int) -> list[str]:
    """Return up to ``count`` lines from the start of a file, line ends removed.

    Later lines that are not UTF-8 are named, or left out, when the events are read.

    Raises:
        InputError: the first line is not UTF-8 text, or the compressed file is damaged.
    """
    lines: list[str] = []
    size = 0
    for number, raw in numbered_lines(path):
        try:
            lines.append(raw.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            if number == 1:
                raise _no_text(path, raw) from error
            lines.append(raw.decode("utf-8", "surrogateescape").rstrip("\r\n"))
        if number == 1 and b"\0" in raw:
            raise _no_text(path, raw)
        size += len(raw)
        if len(lines) == count or size > PROBE_BYTES:
            break
    return lines
