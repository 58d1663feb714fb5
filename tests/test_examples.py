"""Every example runs as its docstring says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_upstream_hstu(tmp_path: Path, reader: dict[str, str]) -> None:
    spec = importlib.util.find_spec("generative_recommenders")
    if spec is None or not (source := Path(str(spec.origin)).parents[1]).joinpath(".git").exists():
        pytest.skip(
            "no checkout of generative_recommenders is importable: NOT covered: the example on it"
        )
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", source, checkout], check=True)
    script = Path(__file__).parents[1] / "examples" / "from_upstream_hstu.sh"
    done = subprocess.run(
        ["bash", script, "1", "200"], cwd=checkout, env=reader, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mrr/switch") == 2
