"""Parts of a run that are not of this package: what settings say of them, and who may import them.

A user's gin file imports a module and binds what it defines: an objective, a layer, a sampler, a
metric. A setting holds such a part as its name, which is what run folders and tables show, and the
object goes along with it.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hstu_xd.errors import InputError

ALLOW_IMPORTS = "HSTU_XD_ALLOW_IMPORTS"
_OWN = "hstu_xd"


class Part(str):
    """The name of something that a user brought, ``my_package.MyLayer(gain=2)``, and the thing.

    It equals the text in a run's ``run.json`` and is stored there as that text.

    Attributes:
        value: the object itself.
        reference: how gin files write it: ``@my_package.MyLayer``.
    """

    value: Any
    reference: str

    def __new__(cls, name: str, value: Any, reference: str = "") -> "Part":
        """Name an object."""
        part = super().__new__(cls, name)
        part.value, part.reference = value, reference or f"@{name}"
        return part

    @classmethod
    def from_object(cls, value: Any) -> "Part":
        """Name a class or a function after where it is defined."""
        return cls(f"{value.__module__}.{value.__qualname__}", value)

    @property
    def short_name(self) -> str:
        """The name without its module and what is bound to it: ``MyLayer``, ``scope/my_metric``."""
        scoped = self.reference.removeprefix("@").removesuffix("()")
        scope, slash, selector = scoped.rpartition("/")
        return scope + slash + selector.rpartition(".")[2]

    def __repr__(self) -> str:
        return self.reference

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        return self


def is_foreign(module: str) -> bool:
    """Whether a module is none of this package's."""
    return module.partition(".")[0] != _OWN


def imports_allowed(allow_imports: bool) -> bool:
    """Whether run folders may import foreign modules: the caller says so, or the environment."""
    return allow_imports or os.environ.get(ALLOW_IMPORTS, "") not in ("", "0")


@contextmanager
def importable_from(folders: Sequence[Path]) -> Iterator[None]:
    """Look for modules in some folders, too, behind everything Python knows of.

    The folders of modules that were imported stay known: their functions may import more.
    """
    added = [str(x) for x in dict.fromkeys(f.resolve() for f in folders) if str(x) not in sys.path]
    sys.path.extend(added)
    before = set(sys.modules)
    try:
        yield
    finally:
        used = {folder_of(name) for name in set(sys.modules) - before if "." not in name}
        for folder in added:
            if Path(folder) not in used:
                sys.path.remove(folder)


def folder_of(module: str) -> Path | None:
    """Find the folder that an imported module, or the package it is in, lies in."""
    found = sys.modules.get(module.partition(".")[0])
    if found is None:
        return None
    # A package lies one folder higher than its file; one without a file knows its folder alone.
    if paths := list(getattr(found, "__path__", [])):
        return Path(paths[0]).resolve().parent
    return Path(found.__file__).resolve().parent if getattr(found, "__file__", None) else None


def module_file(module: str) -> Path | None:
    """Find the file of an imported module; None for what has none."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def import_foreign(module: str, owner: str) -> None:
    """Import a module that a run or a gin file needs.

    Args:
        module: dotted name.
        owner: who needs it, for the message.

    Raises:
        InputError: it is not there, or its own imports fail.
    """
    try:
        import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and is_part_of(module, missing):
            raise InputError(
                f"{owner} needs module {module}, which is not importable from here; run the "
                "command in the folder it lies in, add that folder to PYTHONPATH, or install it"
            ) from error
        raise InputError(
            f"{owner} needs module {module}, whose import fails: {error}; mend the module"
        ) from error


def is_part_of(module: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return f"{module}.".startswith(f"{package}.")
