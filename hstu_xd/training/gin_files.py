"""Gin files of settings: what they may include, what they bind, and errors that name the mend."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from hstu_xd.declaration import nearest_setting, settings_of
from hstu_xd.errors import InputError, nearest
from hstu_xd.files import gin_folder
from hstu_xd.parts import importable_from
from hstu_xd.training.extension import Bound, read_bindings, refuse_lost_values


def read_blocks(
    files: Sequence[Path],
    bindings: Sequence[str],
    blocks: Mapping[str, type],
    *,
    before: Sequence[str] = (),
) -> Bound:
    """Read gin files in order, then bindings, of settings that :func:`register` has told gin of.

    Args:
        files: one that is not in the working folder is looked up among the recipes of this package.
            What they import may lie beside them or in the working folder.
        bindings: single settings.
        blocks: name of each block -> its dataclass of settings.
        before: single settings that files and bindings may bind otherwise.

    Returns:
        What is bound, in the declared types.

    Raises:
        InputError: a file that is not there, a line gin cannot parse, an unknown name (the message
            gives the nearest), a value of the wrong type, or a binding that nothing reads.
    """
    parts = {
        block: [name for name, each in settings_of(cls).items() if each.part]
        for block, cls in blocks.items()
    }
    files = [_found(file) for file in files]
    gin = gin_library()
    gin.clear_config()
    try:
        with importable_from([*(file.parent for file in files), Path.cwd()]):
            gin.parse_config_files_and_bindings([], list(before), finalize_config=False)
            for file in files:
                _parse_file(gin, (file.absolute(),))
            gin.parse_config_files_and_bindings([], list(bindings))
            refuse_lost_values(gin, "\n".join(bindings))
            bound = read_bindings(gin, parts)
        _refuse_unread(bound.unread, blocks)
    except (ValueError, TypeError, SyntaxError, OSError, ImportError, NameError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_explain(error, files, bindings, blocks)) from error
    finally:
        gin.clear_config()
    for name, values in bound.blocks.items():
        check_types(blocks[name], name, values)
    return bound


def find_file(file: Path) -> Path | None:
    """Find a gin file in the working folder, or else among the recipes of this package."""
    shipped = gin_folder().parent / file
    return file if file.is_file() else shipped if shipped.is_file() else None


def _found(file: Path) -> Path:
    if (found := find_file(file)) is not None:
        return found
    shipped = gin_folder().parent
    recipes = sorted(
        x.relative_to(shipped).as_posix() for x in shipped.glob("gin/standalone/*.gin")
    )
    raise InputError(
        f"--gin_config_file {file}: no such file in {Path.cwd()} (of hstu-xd: {', '.join(recipes)})"
    )


def gin_library() -> Any:
    """Import gin-config, or say that it is missing."""
    import gin

    # Run from a folder that has a subfolder gin/, an absent gin-config would import as that folder.
    if not hasattr(gin, "parse_config_files_and_bindings"):
        raise InputError("gin-config is not installed; pip install gin-config")
    return gin


_INCLUDE = re.compile(r"""\s*include\s+(["'])(?P<name>.+?)\1""")


def _parse_file(gin: Any, files: tuple[Path, ...]) -> None:
    """Parse a gin file, and what it includes where it includes it.

    An included file is looked up beside the file that names it, beside those that included that
    one, in the working folder, and among the recipes of this package, ``gin/standalone/xd.gin``;
    gin itself would look into the working folder first.

    Args:
        gin: the library.
        files: the file, behind those that include it.

    Raises:
        InputError: an included file that is not there or that includes itself.
    """
    file = files[-1]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    begin = 0
    for number, line in enumerate(lines):
        if include := _INCLUDE.match(line):
            _parse_lines(gin, file, lines, begin, number)
            _parse_file(gin, (*files, _included(include["name"], files)))
            begin = number + 1
    _parse_lines(gin, file, lines, begin, len(lines))


def _parse_lines(gin: Any, file: Path, lines: Sequence[str], begin: int, end: int) -> None:
    """Parse a part of a file so that gin's errors name the file and the line."""
    part = StringIO("\n" * begin + "".join(lines[begin:end]))
    part.name = str(file)
    gin.parse_config(part)
    refuse_lost_values(gin, part.getvalue())


def _included(name: str, files: Sequence[Path]) -> Path:
    folders = [*(file.parent for file in reversed(files)), Path.cwd(), gin_folder().parent]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{files[-1]} includes {name!r}: no such file beside it, in {Path.cwd()} or among the "
            "recipes of hstu-xd"
        )
    if found.resolve() in (file.resolve() for file in files):
        raise InputError(f"{files[-1]} includes {name!r}, which includes it in turn")
    return found


def register(blocks: Mapping[str, type]) -> dict[str, Any]:
    """Tell gin of blocks of settings; return them as gin sees them: called, they take the bound."""
    make = gin_library().external_configurable
    return {
        name: make(settings, name=name, module="hstu_xd", allowlist=names_in_gin(settings))
        for name, settings in blocks.items()
    }


def names_in_gin(cls: type) -> list[str]:
    """Return the names of the settings that gin binds: all but those that the data decide."""
    return [name for name, each in settings_of(cls).items() if not each.from_data]


def gin_lines(block: str, settings: Any) -> list[str]:
    """Write every setting of a block, defaults included, as lines of a gin file."""
    return [
        f"{block}.{name} = {getattr(settings, name)!r}" for name in names_in_gin(type(settings))
    ]


def _explain(
    error: Exception, files: Sequence[Path], bindings: Sequence[str], blocks: Mapping[str, type]
) -> str:
    """Turn gin's error into one line, with the nearest name where a name is unknown."""
    text = " ".join(str(error).split())
    if "named" not in text and "matching" not in text:
        # A syntax error gives a line number and no text.
        text = f"{', '.join([*map(str, files), *bindings])}: {text}"
    if isinstance(error, ImportError):
        text += (
            "; run the command where the module lies, add its folder to PYTHONPATH, or install it"
        )
    elif "matching reference" in text:
        text += " Import its module in the gin file, and register it there with @gin.configurable."
    near = None
    if wrong := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        near = nearest_setting(wrong[2], blocks, wrong[1])
    elif wrong := re.search(r"matching '([\w./]+)'.* \1\.(\w+)\s*=", text):
        block = nearest(wrong[1], blocks)
        near = block and (nearest_setting(wrong[2], blocks, block) or block)
    return f"gin: {text} Did you mean {near}?" if near else f"gin: {text}"


def _refuse_unread(unread: Sequence[str], blocks: Mapping[str, type]) -> None:
    """Refuse macros and bindings, scoped or of somebody else's, that no setting refers to."""
    if unread:
        # A name without its block, or with that of another trainer, is most often of the training.
        name = unread[0].rpartition(".")[2]
        near = "/" not in name and nearest_setting(name, dict(reversed([*blocks.items()])))
        raise InputError(
            f"gin: nothing reads the binding {unread[0]!r}; remove it or its scope"
            + (f". Did you mean {near}?" if near else "")
        )


def check_types(cls: type, block: str, values: dict[str, Any]) -> None:
    """Bring bound values to their declared types in place, lists to tuples and ints to floats.

    Raises:
        InputError: a value of another type.
    """
    declared = settings_of(cls)
    for name, value in values.items():
        values[name] = declared[name].typed(value, f"gin: {block}.{name} = {value!r}")
