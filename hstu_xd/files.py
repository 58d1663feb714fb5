"""Files that come with the package, and output folders: whole or not at all, one writer at a time.

A writer holds a lock of the operating system, which ends with the process however it ends: the file
of a lock that a killed process leaves behind holds nobody up.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO

from hstu_xd.errors import HstuXdError, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent


def gin_folder() -> Path:
    """Folder of the gin files that come with this package."""
    return _folder("gin")


def patches_folder() -> Path:
    """Folder of the patches that come with this package, one subfolder a codebase."""
    return _folder("patches")


def example_files() -> dict[Path, bytes]:
    """Return what a newcomer starts from: examples, the recipes they name, and constraints.txt."""
    examples, recipes = _folder("examples"), gin_folder() / "standalone"
    named = {
        **{Path("examples") / file.relative_to(examples): file for file in examples.rglob("*")},
        **{Path("gin/standalone") / file.name: file for file in recipes.glob("*.gin")},
        Path("constraints.txt"): _folder("constraints.txt"),
    }
    return {
        name: file.read_bytes()
        for name, file in sorted(named.items())
        if file.is_file() and not {"results", "__pycache__"} & set(name.parts)
    }


def copy_files(wanted: Mapping[Path, bytes], folder: Path, *, force: bool) -> dict[str, bool]:
    """Write files into a folder that may hold others.

    Args:
        wanted: content of each by its path in the folder.
        folder: an existing one.
        force: whether files of the same name and other content are replaced.

    Returns:
        Each file's path in the folder, and whether it was written (False: it was there already,
        with the same content).

    Raises:
        InputError: something is in the way, or files would be replaced and ``force`` is off;
            nothing is written.
    """
    _check_targets(folder, wanted, force)
    written = {}
    for file, content in wanted.items():
        target = folder / file
        written[file.as_posix()] = not (target.is_file() and target.read_bytes() == content)
        if written[file.as_posix()]:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return written


def _check_targets(folder: Path, wanted: Mapping[Path, bytes], force: bool) -> None:
    blocked = {
        parent.as_posix()
        for file in wanted
        for parent in file.parents
        if (folder / parent).exists() and not (folder / parent).is_dir()
    } | {file.as_posix() for file in wanted if (folder / file).is_dir()}
    if blocked:
        raise InputError(
            f"{folder}: {', '.join(sorted(blocked))} in the way (a file where a folder is "
            "needed, or a folder where a file is); move it and run again. Nothing was written"
        )
    changed = [
        file.as_posix()
        for file, content in wanted.items()
        if (folder / file).is_file() and (folder / file).read_bytes() != content
    ]
    if changed and not force:
        raise InputError(
            f"{folder}: {', '.join(changed)} there with other content; add --force to replace "
            f"{'them' if len(changed) > 1 else 'it'}. Nothing was written"
        )


def _folder(name: str, package: Path = _PACKAGE) -> Path:
    installed = package / "_files" / name
    if installed.exists():
        return installed
    # Beside an installed package lies site-packages, whose folder gin/ is the gin-config library:
    # the parent counts only where it is this project's own checkout.
    root = package.parent
    if (root / "pyproject.toml").is_file() and (root / name).exists():
        return root / name
    raise HstuXdError(
        f"{name} of hstu-xd is not at {installed}; install hstu-xd again from its "
        "wheel or its repository"
    )


_BLOCK = 1 << 20


def check_output(
    out: Path,
    *,
    force: bool,
    ours: Callable[[Path], bool],
    kind: str,
    parts: Sequence[str] = ("*",),
) -> None:
    """Refuse an output path that may not be written, before any work is done.

    Args:
        out: the folder to write.
        force: whether an existing folder of the same kind may be replaced.
        ours: tells whether an existing folder is of the kind that is about to be written.
        kind: what such a folder is called in messages, e.g. ``"prepared store"``.
        parts: patterns of the names that may be in such a folder when it is replaced.

    Raises:
        InputError: ``out`` is a file, is a folder and ``force`` is off, or holds something else.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file, not a folder; choose another --out")
    if out.is_symlink():
        raise InputError(f"{out}: is a link; give the folder itself as --out")
    if not any(out.iterdir()):
        return
    if not ours(out):
        raise InputError(
            f"{out}: exists and is not a {kind}, so it is never overwritten; choose another --out"
        )
    if not force:
        raise InputError(f"{out}: exists; add --force to replace it, or choose another --out")
    for name in sorted(entry.name for entry in out.iterdir()):
        if not any(fnmatch(name, part) for part in parts):
            raise InputError(
                f"{out}: holds {name!r}, which is no part of a {kind} and would be lost with it; "
                "move it away, or choose another --out"
            )


@contextmanager
def replaced_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of ``out`` when the block succeeds.

    On any exception the sibling is removed and ``out`` stays as it was. Call
    :func:`check_output` first: with ``force`` this function replaces whatever is there.

    Args:
        out: the folder to write.
        force: whether an existing folder may be replaced.

    Raises:
        InputError: another process writes ``out``, or has written it meanwhile.
        HstuXdError: the disk is full or the folder cannot be written.
    """
    out = out.absolute()
    with only_writer(out.with_name(f".{out.name}.lock"), f"writes {out}"):
        yield from _replaced(out, force=force)


def _replaced(out: Path, *, force: bool) -> Iterator[Path]:
    partial = out.with_name(f".{out.name}.partial")
    retired = out.with_name(f".{out.name}.replaced")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        if force and out.exists():
            out.rename(retired)
        partial.rename(out)  # an empty folder gives way, no other
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise InputError(
                f"{out}: was written by another process meanwhile; add --force to replace it, or "
                "choose another --out"
            ) from error
        raise HstuXdError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        if retired.exists() and not out.exists():
            retired.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def check_output_file(out: Path, *, force: bool, option: str = "--out") -> None:
    """Refuse an output file that cannot be written, before anything is computed.

    Args:
        out: the file.
        force: whether an existing one may be replaced.
        option: what named it.

    Raises:
        InputError: it exists and ``force`` is off, is a folder, or its folder takes no files.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file as {option}")
    if out.exists() and not force:
        raise InputError(f"{out}: exists; add --force to replace it, or choose another {option}")
    trial = partial_file(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); choose another {option}"
        ) from error


def partial_file(out: Path) -> Path:
    """Name the file beside an output that takes its place when it is whole."""
    return out.with_name(f".{out.name}.partial")


LOCK_FILE = "hstu-xd.lock"
# A holder that has just taken a lock needs a moment to say who it is.
_LOCK_ATTEMPTS, _LOCK_PAUSE = 50, 0.02


@contextmanager
def locked_folder(folder: Path, doing: str) -> Iterator[None]:
    """Be the only process that writes a folder; the folder is made where it is missing.

    A folder that was made for this and is still empty in the end is removed.

    Args:
        folder: the folder.
        doing: what messages say of the process, ``"trains into"``.

    Raises:
        InputError: another process holds the folder; the message says which.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with only_writer(folder / LOCK_FILE, f"{doing} {folder}"):
            yield
    finally:
        for each in missing:
            try:
                each.rmdir()
            except OSError:
                break


@contextmanager
def only_writer(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock file, which is removed in the end.

    Args:
        lock: the file.
        doing: what messages say of the process, ``"trains into runs/a"``.

    Raises:
        InputError: another process holds it; the message says which.
    """
    file = _take(lock, doing)
    try:
        file.truncate(0)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        file.write(json.dumps(holder))
        file.flush()
        yield
    finally:
        if _is_file_at(lock, file):
            lock.unlink()
        file.close()  # which lets go of the lock


def _take(lock: Path, doing: str) -> TextIO:
    """Open a lock file and lock it."""
    told = ""
    gone: FileNotFoundError | None = None
    for _ in range(_LOCK_ATTEMPTS):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a+", encoding="utf-8")
        except FileNotFoundError as error:  # its folder was removed just now
            gone = error
            continue
        gone = None
        if _is_locked(file):
            if _is_file_at(lock, file):
                return file
        else:
            told = _described_holder(file)
        file.close()
        if told:
            break
        time.sleep(_LOCK_PAUSE)
    if gone is not None:  # or is of a kind that holds no files
        raise gone
    raise InputError(f"another process {told}{doing}; wait until it ends, or give another --out")


def _is_locked(file: TextIO) -> bool:
    """Lock an open file unless another process has it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _logger.warning(
            "%s cannot be locked (%s): nothing keeps a second process from writing there",
            *(file.name, error.strerror),
        )
    return True


def _is_file_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is still the one at a path; its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _described_holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"(pid {holder['pid']} on {holder['host']} since {holder['since']}) "
    except (ValueError, KeyError, TypeError):
        return ""


def check_readable(file: Path) -> None:
    """Refuse a file that may not be read, which libraries take for a missing or a damaged one.

    Raises:
        InputError: the permission to read it is denied.
    """
    try:
        file.open("rb").close()
    except PermissionError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); make it readable for this user"
        ) from error
    except OSError:
        pass  # whoever reads it knows what its absence means


class HashedFile:
    """A new file whose SHA-256 is taken while it is written, without reading it again.

    Example:
        >>> with HashedFile(folder / "offsets.npy") as file:
        ...     np.save(file, offsets)
        >>> file.digest
    """

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; return their number."""
        self._hash.update(data)
        return self._stream.write(data)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
