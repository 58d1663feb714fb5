"""The additive patches of HLLM and PerSRec, in clones of the checkouts where those are named."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.files import patches_folder
from hstu_xd.plugins.source_patches import apply_patches, codebases, inspect_tree, read_patches

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


def test_results_of_a_patched_run_are_visible(run_script: Any, tmp_path: Path, work: Path) -> None:
    """PerSRec's run.py configures no logging."""
    standin, ignored = Path(__file__).parent / "standin", shutil.ignore_patterns("__pycache__")
    code = Path(shutil.copytree(standin, tmp_path / "code", ignore=ignored))
    text = (code / "run.py").read_text(encoding="utf-8").replace("    init_logger(config)\n", "")
    text = text.replace("from REC.config", "import hstu_xd.plugins.rec.activated\nfrom REC.config")
    (code / "run.py").write_text(text, encoding="utf-8")
    files = ["overall/ID.yaml", "IDNet/hstu.yaml", str(work / "small.yaml")]
    pairs = {"model": "HSTU_XD", "data_path": work / "data", "dataset": "synth", "epochs": 1}
    pairs |= {"item_domain_path": work / "store", "checkpoint_dir": tmp_path / "saved"}
    words = [word for key, value in pairs.items() for word in (f"--{key}", str(value))]
    done = run_script(code, "--config_file", *files, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "valid result" in done.stdout
    assert "recall@10[books]" in done.stdout.partition("valid result")[2].partition("\n")[0]


def test_a_fork_is_told_before_its_origin() -> None:
    order = list(codebases())
    assert order.index("persrec") < order.index("hllm")
