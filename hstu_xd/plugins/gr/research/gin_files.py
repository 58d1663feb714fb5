"""Copying the gin files into a checkout of generative-recommenders."""

from pathlib import Path

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import gin_folder
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
    _check_targets(checkout, wanted, force)
    written = {}
    for file, content in wanted.items():
        target = checkout / file
        written[file.as_posix()] = not (target.is_file() and target.read_bytes() == content)
        if written[file.as_posix()]:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return written


def _check_checkout(checkout: Path) -> None:
    if not checkout.is_dir():
        raise InputError(f"{checkout}: no such folder; give a generative-recommenders checkout")
    missing = HOST.missing_markers(checkout)
    if missing:
        raise InputError(
            f"{checkout}: not a generative-recommenders checkout, {' and '.join(missing)} missing; "
            "give the folder that holds its main.py"
        )


def _check_targets(checkout: Path, wanted: dict[Path, bytes], force: bool) -> None:
    blocked = {
        folder.as_posix()
        for file in wanted
        for folder in file.parents
        if (checkout / folder).exists() and not (checkout / folder).is_dir()
    } | {file.as_posix() for file in wanted if (checkout / file).is_dir()}
    if blocked:
        raise InputError(
            f"{checkout}: {', '.join(sorted(blocked))} in the way (a file where a folder is "
            "needed, or a folder where a file is); move it and run again. Nothing was written"
        )
    changed = [
        file.as_posix()
        for file, content in wanted.items()
        if (checkout / file).is_file() and (checkout / file).read_bytes() != content
    ]
    if changed and not force:
        raise InputError(
            f"{checkout}: {', '.join(changed)} there with other content; add --force to replace "
            f"{'them' if len(changed) > 1 else 'it'}. Nothing was written"
        )
