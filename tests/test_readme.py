"""The README is the first test: every block runs, top to bottom, as a reader would paste it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(
    r"^(?:<!-- needs: ([\w-]+) -->\n)?```(bash|python)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL
)
# The demo runs a whole ablation, and no block after it needs what it leaves.
SLOW = re.compile(r"hstu-xd demo")
# Installing is what .ci/run does with the test block, to the letter; here the package is installed.
SETUP = re.compile(r"(python3? -m venv|pip install|\. \.venv/bin/activate|-m pytest|git clone|cd )")


def runnable(block: str) -> str:
    commands = re.split(r"\s*&&\s*|\n", block.replace("\\\n", " "))
    return "\n".join(c for c in commands if c.strip() and not SETUP.search(c))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader sits: the checkout's gin files at hand, and a log of their own."""
    here = tmp_path_factory.mktemp("reader")
    (here / "gin").symlink_to(ROOT / "gin")
    (here / "examples").symlink_to(ROOT / "examples")
    rows = ["user_id,item_id,domain,timestamp"]
    for user in range(60):
        for event in range(12):
            domain = ("books", "films")[(user + event) % 3 == 0]
            item = (user * 7 + event * event) % 240
            rows.append(f"u{user},{domain}-{item},{domain},{1_700_000_000 + 86_400 * event}")
    (here / "my_log.csv").write_text("\n".join(rows) + "\n")
    return here


def generative_recommenders() -> Path:
    """The checkout that is importable."""
    spec = importlib.util.find_spec("generative_recommenders")
    for package in (spec and spec.submodule_search_locations) or ():
        if (Path(package).parent / ".git").exists():
            return Path(package).parent
    pytest.skip("no checkout of generative_recommenders is importable: NOT covered: its block")


def hllm() -> Path:
    """The checkout that the environment names."""
    if "HSTU_XD_HLLM" not in os.environ:
        pytest.skip("HSTU_XD_HLLM names no checkout: NOT covered: the block of HLLM and PerSRec")
    return Path(os.environ["HSTU_XD_HLLM"])


# Codebase -> where a checkout is, and the folder within that a reader works in.
CODEBASES = {"generative-recommenders": (generative_recommenders, "."), "HLLM": (hllm, "code")}


def checkout(codebase: str, folder: Path) -> Path:
    """Where the reader sits in a clone of a codebase, their log at hand."""
    find, inside = CODEBASES[codebase]
    subprocess.run(["git", "clone", "-q", find(), folder / codebase], check=True)
    here = folder / codebase / inside
    (here / "my_log.csv").write_text((folder / "my_log.csv").read_text())
    return here


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, marks=[pytest.mark.slow] if SLOW.search(block) else [])
        for index, (_, _, block) in enumerate(BLOCKS)
    ],
)
def test_block_runs(index: int, folder: Path, reader: dict[str, str]) -> None:
    needs, language, block = BLOCKS[index]
    if needs:
        folder = checkout(needs, folder)
    code = runnable(block) if language == "bash" else block
    command = ["bash", "-euo", "pipefail", "-c", code]
    if language == "python":
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=reader, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_readme_is_short_and_points_at_files_that_exist() -> None:
    assert len(TEXT) <= 14_000
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL).splitlines()
    assert not [x for x in prose if len(x) > 105 and not x.startswith(("|", "!["))]
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
