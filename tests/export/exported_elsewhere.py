"""Answers requests by an exported folder where nothing but torch and what it needs can be imported.

Given the folder, a file of requests and a file for the answers.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# torch and the packages that it requires.
ALLOWED = {
    "torch", "torchgen", "functorch", "filelock", "typing_extensions", "sympy", "mpmath",
    "networkx", "jinja2", "markupsafe", "fsspec", "_distutils_hack",
}  # fmt: skip


class OnlyTorch(MetaPathFinder):
    """Finds what the usual finders do, and of packages only those that torch needs."""

    def __init__(self, finders: Sequence[Any]) -> None:
        self._finders = finders

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = name.partition(".")[0]
        # The standard library names one of its modules after the platform.
        standard = package in sys.stdlib_module_names or package.startswith("_sysconfigdata")
        if package not in ALLOWED and not standard:
            return None
        found = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in found if spec is not None), None)


if __name__ == "__main__":
    sys.meta_path[:] = [OnlyTorch(tuple(sys.meta_path))]
    import torch

    folder = Path(sys.argv[1])
    encode = torch.export.load(folder / "encoder.pt2").module()
    item_vectors = torch.load(folder / "item_vectors.pt")
    answers = []
    for request in torch.load(sys.argv[2]):
        vectors = encode(*request)
        answers.append((vectors, vectors @ item_vectors.T))
    torch.save(answers, sys.argv[3])
    strangers = {name.partition(".")[0] for name in sys.modules} - ALLOWED
    print(*sorted(strangers & {"hstu_xd", "polars", "gin", "safetensors", "numpy", "pyarrow"}))
