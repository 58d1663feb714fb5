"""Rebinding names in a module that is not ours: checked first, logged, and revertible."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from typing import Any

from hstu_xd.errors import HstuXdError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rebinding:
    """One name to rebind.

    Attributes:
        module: dotted name of the module in which callers look the name up.
        name: the name there; dots lead into a class, "Module.to".
        replace: from the original object to the one that takes its place.
        parameters: parameters that the original must have, because the replacement passes them on.
    """

    module: str
    name: str
    replace: Callable[[Any], Any]
    parameters: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"

    def owner(self) -> tuple[Any, str]:
        """Return the object that holds the name, and the last part of the name."""
        *classes, attribute = self.name.split(".")
        return reduce(getattr, classes, import_module(self.module)), attribute


@dataclass
class Patch:
    """Rebindings in force; :meth:`revert` puts the identical originals back.

    Works as a context manager that reverts on leaving.
    """

    _applied: list[tuple[Rebinding, Any, Any]] = field(default_factory=list)

    @property
    def originals(self) -> dict[str, Any]:
        """What stood at each rebound path before the first rebinding of it."""
        first = [(rebinding.path, original) for rebinding, original, _ in self._applied]
        return dict.fromkeys(path for path, _ in first) | dict(reversed(first))

    def add(self, rebindings: Sequence[Rebinding]) -> None:
        """Rebind further names, all of them or none; a name that is rebound already, once more.

        Raises:
            HstuXdError: a name is missing, or its object lacks a parameter the replacement relies
                on.
        """
        planned = []
        for rebinding in rebindings:
            try:
                owner, attribute = rebinding.owner()
                original = getattr(owner, attribute)
            except (ImportError, AttributeError) as error:
                raise HstuXdError(f"{rebinding.path} is not there to rebind: {error}") from error
            _check_parameters(rebinding, original)
            planned.append((rebinding, original, rebinding.replace(original)))
        for rebinding, original, replacement in planned:
            owner, attribute = rebinding.owner()
            setattr(owner, attribute, replacement)
            _logger.debug("%s: %s becomes %s", rebinding.path, _name(original), _name(replacement))
        self._applied += planned
        if planned:
            names = ", ".join(dict.fromkeys(rebinding.name for rebinding, _, _ in planned))
            _logger.info("hstu-xd takes the place of %s; log DEBUG for more", names)

    def revert(self) -> None:
        """Put every original back, last first; does nothing the second time.

        Raises:
            HstuXdError: somebody rebound a name again since; nothing is reverted then.
        """
        latest = {rebinding.path: (rebinding, new) for rebinding, _, new in self._applied}
        for rebinding, replacement in latest.values():
            owner, attribute = rebinding.owner()
            if getattr(owner, attribute) is not replacement:
                raise HstuXdError(
                    f"{rebinding.path} was rebound again by somebody else; revert that first"
                )
        while self._applied:
            rebinding, original, replacement = self._applied.pop()
            owner, attribute = rebinding.owner()
            setattr(owner, attribute, original)
            _logger.debug("%s: %s back to %s", rebinding.path, _name(replacement), _name(original))

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()


def apply(rebindings: Sequence[Rebinding]) -> Patch:
    """Rebind all names, or none.

    Raises:
        HstuXdError: a name is missing, or its object lacks a parameter the replacement relies on.
    """
    patch = Patch()
    patch.add(rebindings)
    return patch


def _check_parameters(rebinding: Rebinding, original: Any) -> None:
    if not rebinding.parameters:
        return
    known = inspect.signature(original).parameters
    missing = [name for name in rebinding.parameters if name not in known]
    if missing:
        raise HstuXdError(
            f"{rebinding.path} takes no parameter {missing[0]!r} but {list(known)}; "
            "this version of the code cannot be extended"
        )


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
