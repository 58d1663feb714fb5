"""The codebases that the tests run in, and a small log for them."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llms import write_llms, write_texts

from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.plugins.rec.export import write_interactions

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
STANDIN = HERE / "standin"
# Processes leave none of theirs in a checkout.
BYTECODE = tempfile.TemporaryDirectory(prefix="bytecode-")
# Folder of a checkout of each codebase. Its requirements must be importable by this Python.
CHECKOUTS = {"hllm": "HSTU_XD_HLLM", "persrec": "HSTU_XD_PERSREC"}
NEEDED = ("lightning", "transformers", "pandas", "sklearn", "yaml", "tensorboardX")
SMALL = """\
topk: [5, 10, 50]
valid_metric: NDCG@10
train_batch_size: 32
eval_batch_size: 64
MAX_ITEM_LIST_LENGTH: 10
item_embedding_size: 32
hstu_embedding_size: 32
n_heads: 4
"""
SMALL_HLLM = """\
topk: [5, 10, 50]
valid_metric: NDCG@10
train_batch_size: 16
eval_batch_size: 64
MAX_ITEM_LIST_LENGTH: 10
MAX_TEXT_LENGTH: 12
loss: nce
precision: "32"
gradient_checkpointing: False
item_prompt: "Compress "
text_keys: ["title"]
show_progress: False
"""
# Where PerSRec lays user tokens into a history; HLLM's user LLM knows the first cut alone.
CUTS = """\
number_of_user_tokens: 3
pretrain_item_num: 4
insert_method: [[4, 1], [7, 2]]
"""


def code_folder(codebase: str) -> Path:
    """A codebase's code/ folder; skips, saying what is not covered, where there is none."""
    if codebase == "standin":
        return STANDIN
    variable = CHECKOUTS[codebase]
    folder = Path(os.environ.get(variable, "nowhere")) / "code"
    if not folder.is_dir():
        pytest.skip(f"{variable} names no checkout: NOT covered: the plug-in within {codebase}")
    absent = [name for name in NEEDED if not _is_importable(name)]
    if absent:
        pytest.skip(f"{', '.join(absent)} not importable: NOT covered: the plug-in in {codebase}")
    return folder


def _is_importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """store/, data/synth.csv, small.yaml, cuts.yaml; LLMs, texts of the items, small_hllm.yaml."""
    path = tmp_path_factory.mktemp("rec")
    options = SynthOptions(users=80, domains=3, items_per_domain=60, mean_length=14)
    synthesize(path / "store", options)
    (path / "data").mkdir()
    write_interactions(path / "store", path / "data" / "synth.csv")
    (path / "small.yaml").write_text(SMALL, encoding="utf-8")
    (path / "cuts.yaml").write_text(CUTS, encoding="utf-8")
    with (path / "data" / "synth.csv").open(encoding="utf-8") as file:
        items = list(dict.fromkeys(row["item_id"] for row in csv.DictReader(file)))
    write_llms(path, items)
    write_texts(path, items)
    folders = "".join(f"{x}_pretrain_dir: {path / x}_llm\n" for x in ("item", "user"))
    (path / "small_hllm.yaml").write_text(SMALL_HLLM + folders, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in distributed}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": BYTECODE.name}
    return kept | ours | {"HSTU_XD_ALLOW_UNVERIFIED": "1"}  # the stand-in is no verified version


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch() -> Launch:
    """The launcher as a command in a working folder."""

    def run(folder: Path, *arguments: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "hstu_xd.plugins.rec", *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def run_script() -> Launch:
    """A working folder's own run.py, as the one process of a job."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}

    def run(folder: Path, *arguments: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "run.py", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=folder,
            env=environment() | alone,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


_probed: dict[tuple[str, str], Any] = {}


@pytest.fixture
def probed(request: pytest.FixtureRequest, work: Path) -> dict[str, Any]:
    """What probe_hstu.py found in a codebase."""
    return _probe("hstu", request.param, work)


@pytest.fixture
def probed_hllm(request: pytest.FixtureRequest, work: Path) -> dict[str, Any]:
    """What probe_hllm.py found in a codebase."""
    return _probe("hllm", request.param, work)


@pytest.fixture
def probed_personalized_hstu(request: pytest.FixtureRequest, work: Path) -> dict[str, Any]:
    """What probe_personalized_hstu.py found in a codebase."""
    return _probe("personalized_hstu", request.param, work)


@pytest.fixture
def probed_personalized_hllm(request: pytest.FixtureRequest, work: Path) -> dict[str, Any]:
    """What probe_personalized_hllm.py found in a codebase."""
    return _probe("personalized_hllm", request.param, work)


def _probe(model: str, codebase: str, work: Path) -> dict[str, Any]:
    """The probe's figures; it runs once for each codebase."""
    folder = code_folder(codebase)
    key = model, codebase
    if key not in _probed:
        before = _files(folder)
        found = _figures(model, folder, work / f"{model}.{codebase}.json", work)
        _probed[key] = found | {"written": sorted(_files(folder) - before)}
    if "error" in _probed[key]:
        pytest.fail(_probed[key]["error"], pytrace=False)
    return _probed[key]


def _figures(model: str, folder: Path, out: Path, work: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / f"probe_{model}.py"), str(out), str(work)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr[-3000:]}
    return json.loads(out.read_text(encoding="utf-8")) | {"output": done.stdout + done.stderr}


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not {"log_tensorboard", "__pycache__"} & set(path.parts)
    }
