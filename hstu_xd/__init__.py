"""Cross-domain HSTU: intra-domain jagged attention, TAPE and DDSR.

Importing the package is cheap: torch is loaded by the first name that needs it, so that
``hstu-xd prepare`` never pays for it, and nothing of any upstream codebase is touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hstu_xd.version import __version__

if TYPE_CHECKING:
    from hstu_xd import ops
    from hstu_xd.catalog import DomainCatalog
    from hstu_xd.model.hstu import CrossDomainHSTU
    from hstu_xd.ops.grouping import DomainGrouping
    from hstu_xd.training.run import load

__all__ = ["CrossDomainHSTU", "DomainCatalog", "DomainGrouping", "__version__", "load", "ops"]

_HOME = {
    "CrossDomainHSTU": "hstu_xd.model.hstu",
    "DomainCatalog": "hstu_xd.catalog",
    "DomainGrouping": "hstu_xd.ops.grouping",
    "load": "hstu_xd.training.run",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("hstu_xd.ops")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hstu_xd' has no attribute {name!r}")
