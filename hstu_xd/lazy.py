"""Attributes that are computed on their first use and kept."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy_property(Generic[T]):
    """``functools.cached_property`` without the lock it takes before Python 3.12.

    ``torch.compile`` cannot trace that lock, and what is computed here may be computed twice.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        # Kept in the instance, where the next look-up finds it before this descriptor.
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
