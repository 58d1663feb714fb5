"""Which generative_recommenders the tests beside run on: an installed one, or the stand-in."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

FORCE = "HSTU_XD_TEST_STANDIN"
STANDIN = Path(__file__).parent / "standin"
_PACKAGES = ("generative_recommenders", "fbgemm_gpu")


def _why_standin() -> str:
    if os.environ.get(FORCE) == "1":
        return f"{FORCE}=1"
    try:
        import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)

        # An optimiser loads it, which fails beside upstream's folders without an __init__.py: the
        # order of test files would decide.
        import_module("torch._dynamo")
        import generative_recommenders.research.trainer.train  # noqa: F401
    except (ImportError, OSError) as error:
        return f"not importable: {error}"
    return ""


WHY_STANDIN = _why_standin()
NOT_COVERED = (
    "upstream's own code: its bit-equality with HSTU_XD, its samples, its trainer, the hashes of "
    "its files"
)
_standin_modules: dict[str, ModuleType] = {}


def report() -> str:
    """One line that says what the tests ran on."""
    if not WHY_STANDIN:
        import generative_recommenders

        return f"generative_recommenders: the real one, {generative_recommenders.__path__[0]}"
    return f"generative_recommenders: a STAND-IN ({WHY_STANDIN}). NOT covered: {NOT_COVERED}"


def real_upstream_only(covers: str) -> pytest.MarkDecorator:
    """Mark of a test that says nothing on the stand-in."""
    reason = f"a stand-in runs ({WHY_STANDIN}): NOT covered in this run: {covers}"
    return pytest.mark.skipif(bool(WHY_STANDIN), reason=reason)


@contextmanager
def in_force() -> Iterator[None]:
    """The stand-in, where it is needed, for this process and those it starts; gone afterwards.

    So tests elsewhere, which skip or report an upstream that is not there, never see it.
    """
    if not WHY_STANDIN:
        yield
        return
    others = _take_modules()
    sys.modules.update(_standin_modules)
    sys.path.insert(0, str(STANDIN))
    path = os.pathsep.join(filter(None, [str(STANDIN), os.environ.get("PYTHONPATH")]))
    try:
        with patch.dict(os.environ, PYTHONPATH=path, HSTU_XD_ALLOW_UNVERIFIED="1"):
            yield
    finally:
        sys.path.remove(str(STANDIN))
        _standin_modules.update(_take_modules())
        sys.modules.update(others)


def _take_modules() -> dict[str, ModuleType]:
    taken = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in taken}
