"""Files that come with the package, and output folders that appear whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from hstu_xd.errors import HstuXdError, InputError

_PACKAGE = Path(__file__).parent


def gin_folder() -> Path:
    """Folder of the gin files that come with this package."""
    return _folder("gin")


def patches_folder() -> Path:
    """Folder of the patches that come with this package, one subfolder a codebase."""
    return _folder("patches")


def _folder(name: str, package: Path = _PACKAGE) -> Path:
    installed = package / "_files" / name
    if installed.is_dir():
        return installed
    # Beside an installed package lies site-packages, whose folder gin/ is the gin-config library:
    # the parent counts only where it is this project's own checkout.
    root = package.parent
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise HstuXdError(
        f"the folder {name}/ of hstu-xd is not at {installed}; install hstu-xd again from its "
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
def replaced_folder(out: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of ``out`` when the block succeeds.

    On any exception the sibling is removed and ``out`` stays as it was. Call
    :func:`check_output` first: this function replaces whatever is there.

    Raises:
        HstuXdError: the disk is full or the folder cannot be written.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    retired = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process of this number that was killed
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rename(retired)
        partial.rename(out)
    except OSError as error:
        raise HstuXdError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        if retired.exists() and not out.exists():
            retired.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


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


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
