"""The additive patches of HLLM and PerSRec, in clones of the checkouts where those are named."""

import os
import subprocess
from pathlib import Path

import pytest

from hstu_xd.files import patches_folder
from hstu_xd.plugins.patch_files import CODEBASES, apply_patches, inspect_tree, read_patches

VARIABLES = {"hllm": "HSTU_XD_HLLM", "persrec": "HSTU_XD_PERSREC"}


@pytest.mark.parametrize("codebase", list(VARIABLES))
def test_patches_add_and_quote_nothing(codebase: str) -> None:
    patches = read_patches(patches_folder() / codebase)
    assert [patch.name for patch in patches] == ["activate-plugin", "many-config-files"]
    for patch in patches:
        body = patch.text.partition("\n@@ ")[2].splitlines()[1:]
        assert body
        assert all(line.startswith("+") for line in body)


@pytest.mark.parametrize("codebase", list(VARIABLES))
def test_patches_fit_the_verified_commit(codebase: str, tmp_path: Path) -> None:
    source = os.environ.get(VARIABLES[codebase])
    if not source:
        pytest.skip(f"{VARIABLES[codebase]} names no checkout: NOT covered: patches of {codebase}")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", source, str(clone)], check=True)
    before = inspect_tree(clone)
    assert (before.state, before.codebase) == ("applicable", codebase)
    apply_patches(clone)
    assert inspect_tree(clone).state == "applied"
    (clone / "code" / "run.py").write_text("# mine\n", encoding="utf-8")
    assert inspect_tree(clone).reason.startswith("uncommitted changes in code/run.py")


def test_a_fork_is_told_before_its_origin() -> None:
    order = list(CODEBASES)
    assert order.index("persrec") < order.index("hllm")
