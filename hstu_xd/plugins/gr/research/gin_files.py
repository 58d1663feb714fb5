"""Copying the gin files into a checkout of generative-recommenders."""

from pathlib import Path

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import copy_files, gin_folder
from hstu_xd.plugins.gr.research import HOST

# Recipes of the trainer of this package; upstream's trainer cannot read them.
_NOT_FOR_UPSTREAM = "standalone"


def copy_gin_files(
    checkout: Path, *, force: bool = False, source: Path | None = None
) -> dict[str, bool]:
    """Copy the gin files for upstream's trainer to ``checkout/gin/``.

    Args:
        checkout: root of a generative-recommenders checkout.
        force: whether files of the same name and other content are replaced.
        source: folder to copy from; default: the files of this package.

    Returns:
        Each file's path relative to ``checkout``, and whether it was written (False: it was there
        already, with the same content).

    Raises:
        InputError: ``checkout`` is none, or files would be replaced and ``force`` is off; nothing
            is written.
    """
    _check_checkout(checkout)
    source = source or gin_folder()
    files = [
        file.relative_to(source)
        for file in sorted(source.rglob("*.gin"))
        if file.relative_to(source).parts[0] != _NOT_FOR_UPSTREAM
    ]
    if not files:
        raise HstuXdError(f"{source}: holds no gin file for generative-recommenders")
    wanted = {Path("gin") / file: (source / file).read_bytes() for file in files}
    return copy_files(wanted, checkout, force=force)


def _check_checkout(checkout: Path) -> None:
    if not checkout.is_dir():
        raise InputError(f"{checkout}: no such folder; give a generative-recommenders checkout")
    missing = HOST.missing_markers(checkout)
    if missing:
        raise InputError(
            f"{checkout}: not a generative-recommenders checkout, {' and '.join(missing)} missing; "
            "give the folder that holds its main.py"
        )
