"""Attributes that are computed on their first use and kept."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class lazy_property(Generic[T]):
    """``functools.cached_property`` that ``torch.compile`` can trace.

    The standard one takes a lock before Python 3.12. While a graph is traced nothing is kept, as a
    graph cannot hand frozen dataclasses on; what it then computes twice its compiler merges.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value = self._compute(instance)
        if not torch.compiler.is_dynamo_compiling():
            # Kept in the instance, where the next look-up finds it before this descriptor.
            instance.__dict__[self._name] = value
        return value
