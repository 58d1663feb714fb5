"""The stand-in says what the real upstream says: the same names, parameters and defaults."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from upstream_choice import FORCE, STANDIN, real_upstream_only

from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.host import inspect_host

FILES = sorted((STANDIN / "generative_recommenders" / "research").rglob("*.py"))
PRIVATE_CLASSES = {"Bias", "Layer"}  # the stand-in's own


def signatures(source: str) -> dict[str, dict[str, str]]:
    """Function or ``Class.method`` -> parameter or field -> its default; no private methods."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node)
        if isinstance(node, ast.ClassDef) and node.name not in PRIVATE_CLASSES:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            found[node.name] = {ast.unparse(field.target): "" for field in fields}
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = parameters(method)
    return found


def parameters(function: ast.FunctionDef) -> dict[str, str]:
    names = [argument.arg for argument in function.args.args]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    return dict(zip(names, [""] * (len(names) - len(defaults)) + defaults))


@real_upstream_only("that the stand-in's names and signatures are upstream's")
@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_names_and_signatures_are_upstreams(file: Path) -> None:
    name = ".".join(file.relative_to(STANDIN).with_suffix("").parts)
    real = importlib.import_module(name)
    theirs = signatures(Path(real.__file__ or "").read_text())
    for path, ours in signatures(file.read_text()).items():
        owner, _, method = path.rpartition(".")
        if owner and path not in theirs and hasattr(getattr(real, owner), method):
            continue  # inherited there
        if path.startswith("_") and path not in theirs:
            continue
        assert path in theirs
        for parameter, default in ours.items():
            assert parameter in theirs[path], path
            assert default == theirs[path][parameter], f"{path}({parameter})"


@real_upstream_only("that upstream's files are those of a verified commit, by their hashes")
def test_the_upstream_that_the_tests_run_on_is_a_verified_one() -> None:
    status = inspect_host(HOST)
    assert status.problems == ()
    assert status.verified


def test_the_stand_in_is_gone_outside_of_these_tests() -> None:
    code = (
        "import sys, upstream_choice as c\n"
        "before = set(sys.modules), list(sys.path)\n"
        "with c.in_force():\n"
        "    import generative_recommenders.research.trainer.train as first\n"
        "    assert str(c.STANDIN) in first.__file__\n"
        "assert not [m for m in sys.modules if m.startswith('generative_recommenders')]\n"
        "assert sys.path == before[1]\n"
        "with c.in_force():\n"
        "    import generative_recommenders.research.trainer.train as second\n"
        "assert first is second\n"
    )
    environment = os.environ | {FORCE: "1"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, check=True
    )
