"""``hstu-xd doctor``: whatever breaks, and however, is a line of the report with its cause."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_xd import doctor
from hstu_xd.cli.app import run
from hstu_xd.ops import domain_attention
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.plugins.dlrm_v3 import HOST as DLRM
from hstu_xd.plugins.gr.research import HOST as GR
from hstu_xd.plugins.host import OVERRIDE, hosts
from hstu_xd.plugins.rec import HOST as REC
from hstu_xd.subprocess_checks import QUESTIONS, ask, ask_together

BREAKAGES = {
    "raise ImportError('no such symbol')": "ImportError: no such symbol",
    "raise OSError('libx.so: cannot open\\nmore')": "OSError: libx.so: cannot open",
    "raise RuntimeError": "RuntimeError",
    "raise SystemExit(3)": "SystemExit: 3",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os; os.abort()": "its process died of SIGABRT",
    "import os; os.write(2, b'bad cpu\\n'); os._exit(4)": (
        "its process ended with exit code 4 (bad cpu)"
    ),
    "import os; os._exit(0)": "its process ended with exit code 0",
    "import atexit, os; atexit.register(os.abort)": "answers, then its process died of SIGABRT",
    "print('noise', end='')": "",
}


def fake(folder: Path, name: str, source: str) -> list[str]:
    """A path on which the library ``name`` is this source."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    return [str(folder), *sys.path]


@pytest.mark.parametrize(("source", "error"), BREAKAGES.items(), ids=list(BREAKAGES))
def test_every_way_to_break_is_reported(tmp_path: Path, source: str, error: str) -> None:
    path = fake(tmp_path, "brittle", source)
    assert ask("library", "brittle", timeout_s=60, path=path)["error"] == error


def test_a_hang_is_reported(tmp_path: Path) -> None:
    path = fake(tmp_path, "brittle", "import time; time.sleep(600)")
    found = ask("library", "brittle", timeout_s=1.5, path=path)
    assert found == {"error": "no answer within 1.5 s"}
    questions = [("library", "json"), ("library", "brittle"), ("library", "wave")]
    found = ask_together(questions, timeout_s=1.5, path=path)
    assert [each["error"] for each in found] == ["", "no answer within 1.5 s", ""]


def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions of every process that is started from here on."""
    started: list[str] = []
    really = subprocess.Popen

    def counted(command: list[str], **options: Any) -> Any:
        started.append(command[-1])
        return really(command, **options)

    monkeypatch.setattr(subprocess, "Popen", counted)
    return started


def test_what_works_is_asked_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = processes(monkeypatch)
    questions = [("library", "json"), ("library", "gin")]
    found = ask_together(questions, timeout_s=60, path=[*sys.path])
    assert [each["error"] for each in found] == ["", ""]
    assert len(started) == 1


@pytest.mark.parametrize(("source", "error"), BREAKAGES.items(), ids=list(BREAKAGES))
def test_what_breaks_is_told_from_what_was_asked_with_it(
    tmp_path: Path, source: str, error: str
) -> None:
    path = fake(tmp_path, "brittle", source)
    questions = [("library", "json"), ("library", "brittle"), ("library", "wave")]
    found = ask_together(questions, timeout_s=60, path=path)
    assert [each["error"] for each in found] == ["", error, ""]


def test_torch_is_imported_once_on_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor costs: one process with torch, whatever of the rest is not there."""
    without = [p for p in sys.path if not (Path(p) / "generative_recommenders").is_dir()]
    monkeypatch.setattr(sys, "path", without)
    started = processes(monkeypatch)
    found = doctor.examine()
    assert found["verdict"]["stand_alone"]["ready"]
    assert sum('["torch"]' in questions for questions in started) == 1
    assert sum('["training"]' in questions for questions in started) == 1


def test_an_import_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.5 imports, and infer_schema then refuses the package's operators."""
    broken = {"error": "ValueError: infer_schema(func): unsupported type"}
    found, lines = report(monkeypatch, attention=broken, training=broken)
    text = f"a step of a small model: {broken['error']}"
    assert line(lines, "verdict, stand-alone") == f"not ready: {text}"
    assert line(lines, "training") == f"a step of a small model fails: {broken['error']}"
    assert found["verdict"]["rec"]["blocks"][0] == text


def test_an_empty_folder_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "brittle").mkdir()
    found = ask("library", "brittle", timeout_s=60, path=[*sys.path, str(tmp_path)])
    assert found["error"] == f"ImportError: only a folder of that name, {tmp_path / 'brittle'}"


def answers(**changes: dict[str, Any]) -> Any:
    """A stand-in for ``ask``: a healthy machine without GPU and upstream, but for ``changes``."""
    healthy = {
        "torch": {"version": "2.12.1+cpu", "cuda": None, "devices": []},
        "attention": {"available": ["reference", "eager"], "auto": "eager"},
        "training": {"device": "cpu"},
        "upstream": {"importable": False, "error": "no module named generative_recommenders"},
        "upstream_plugin": {"rebinds": ["generative_recommenders.a.get_reco_dataset"]},
        "rec": {"importable": True, "path": str(Path.cwd() / "REC"), "verified": True},
        "rec_plugin": {"rebinds": ["REC.utils.get_model", "REC.data.utils.get_model"]},
    }
    names = {
        ("host", GR.declared_in): "upstream",
        ("plugin", GR.declared_in): "upstream_plugin",
        ("host", REC.declared_in): "rec",
        ("plugin", REC.declared_in): "rec_plugin",
    }

    def answer(question: str, *arguments: str, timeout_s: float, path: list[str]) -> dict[str, Any]:
        name = names.get((question, *arguments), arguments[0] if arguments else question)
        return {"error": ""} | (healthy | changes).get(name, {})

    return answer


def report(monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> tuple[dict, list[str]]:
    each = answers(**changes)
    monkeypatch.setattr(doctor, "ask", each)
    monkeypatch.setattr(
        doctor, "ask_together", lambda questions, **others: [each(*x, **others) for x in questions]
    )
    found = doctor.examine()
    return found, doctor.render(found).splitlines()


def sit_among(files: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them, empty, and work in their folder."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    monkeypatch.chdir(folder)


def line(lines: list[str], name: str) -> str:
    return next(text.removeprefix(name).strip() for text in lines if text.startswith(name))


def test_the_fbgemm_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"error": "OSError: undefined symbol"}
    found, lines = report(monkeypatch, fbgemm_gpu=broken)
    assert (found["fbgemm_gpu"]["loads"], found["fbgemm_gpu"]["fits"]) == (False, "1.7")
    text = "does not load: OSError: undefined symbol; this torch needs fbgemm-gpu-cpu==1.7.*"
    assert line(lines, "fbgemm_gpu").endswith(text)
    assert found["verdict"]["stand_alone"]["ready"]
    blocks = found["verdict"]["generative_recommenders"]["blocks"]
    assert blocks[0] == "fbgemm_gpu: OSError: undefined symbol"
    cuda = {"version": "2.10.0", "cuda": "12.8", "devices": ["GPU X"]}
    _, lines = report(monkeypatch, fbgemm_gpu=broken, torch=cuda)
    assert line(lines, "fbgemm_gpu").endswith("this torch needs fbgemm-gpu==1.5.*")
    assert line(lines, "torch") == "2.10.0, built for CUDA 12.8; GPU X"
    _, lines = report(monkeypatch, fbgemm_gpu=broken, torch={"version": "2.99.0"})
    assert "known to fit: 1.5 for torch 2.10" in line(lines, "fbgemm_gpu")


def test_a_broken_torch_blocks_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"error": "OSError: libc10.so"}
    found, lines = report(monkeypatch, torch=gone, attention=gone, fbgemm_gpu=gone)
    assert line(lines, "torch") == "does not load: OSError: libc10.so"
    assert line(lines, "attention") == "none: OSError: libc10.so"
    assert line(lines, "verdict, stand-alone") == "not ready: torch: OSError: libc10.so"
    assert not found["verdict"]["generative_recommenders"]["ready"]


@pytest.mark.parametrize(
    ("torch_says", "triton", "why"),
    [
        ({}, "", "the Triton kernel needs a GPU, and PyTorch sees none"),
        ({"devices": ["X"]}, "OSError: ptx", "triton does not load: OSError: ptx"),
    ],
)
def test_why_not_a_faster_attention(
    monkeypatch: pytest.MonkeyPatch, torch_says: dict, triton: str, why: str
) -> None:
    attention = {"available": ["reference", "eager"], "auto": "eager"}
    changes = {"torch": torch_says, "triton": {"error": triton}, "attention": attention}
    found, lines = report(monkeypatch, **changes)
    assert found["attention"]["why_not_faster"] == why
    assert line(lines, "attention") == f'"auto" is eager (of reference, eager); {why}'


def test_why_no_loops_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {"available": ["reference", "eager"], "auto": "eager", "loops": "no C compiler"}
    _, lines = report(monkeypatch, attention=attention)
    assert line(lines, "attention").endswith("sees none; no loops in C: no C compiler")


def test_upstream_and_its_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upstream = {"importable": True, "path": str(tmp_path / "generative_recommenders")}
    upstream |= {"verified": True, "commit": "db1bf8f" + 33 * "0", "problems": []}
    found, lines = report(monkeypatch, upstream=upstream)
    assert line(lines, "generative_recommenders").endswith("commit db1bf8f, verified")
    assert line(lines, "  plug-in") == "works; rebinds get_reco_dataset"
    assert line(lines, "  source patches").startswith("refused: not a codebase with patches")
    assert line(lines, "verdict, upstream") == "ready (no GPU: use hstu-xd upstream-train)"
    upstream |= {"verified": False, "commit": "", "problems": ["train.setup: not there"]}
    plugin = {"error": "HstuXdError: differs from the verified commits"}
    found, lines = report(monkeypatch, upstream=upstream, upstream_plugin=plugin)
    assert line(lines, "generative_recommenders").endswith("commit unknown, not verified")
    assert line(lines, "  problem") == "train.setup: not there"
    assert found["verdict"]["generative_recommenders"]["blocks"] == [f"plug-in: {plugin['error']}"]


def test_command_prints_one_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is really asked here but upstream, whose import would take as long again."""
    without = [p for p in sys.path if not (Path(p) / "generative_recommenders").is_dir()]
    monkeypatch.setattr(sys, "path", without)
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "hstu_xd",
        "python",
        "torch",
        "libraries",
        "fbgemm_gpu",
        "attention",
        "training",
        "generative_recommenders",
        "rec",
        "verdict",
    } | {host.name for host in hosts()}
    assert found["torch"]["version"] == torch.__version__
    assert found["verdict"]["stand_alone"] == {"ready": True, "blocks": []}
    assert found["attention"]["auto"] in found["attention"]["available"]
    assert found["training"] == {"device": "cpu", "error": ""}


def test_what_auto_is_said_to_be_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    module = import_module("hstu_xd.ops.domain_attention.api")
    ran = []

    def spy(name: str, impl: Any) -> Any:
        return lambda *a, **b: (ran.append(name), impl(*a, **b))[1]

    spies = {name: spy(name, impl) for name, impl in module._IMPLS["silu"].items()}
    monkeypatch.setitem(module._IMPLS, "silu", spies)
    x = torch.ones(3, 1, 4)
    grouping = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)
    auto = QUESTIONS["attention"]()["auto"]
    ran.clear()
    domain_attention(x, x, x, grouping, norm_length=3)
    assert ran == [auto]


def test_a_checkout_in_the_current_folder_is_found_as_main_py_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sit_among(GR.markers, tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    upstream = {"importable": True, "path": str(tmp_path / "generative_recommenders")}
    found, lines = report(monkeypatch, upstream=upstream)
    assert found["generative_recommenders"]["through_current_folder"]
    assert "through the current folder" in line(lines, "generative_recommenders")


def test_rec_is_looked_for_where_the_launcher_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found, lines = report(monkeypatch)
    assert "code/ folder of HLLM or PerSRec" in line(lines, "REC")
    assert not found["verdict"]["rec"]["ready"]
    sit_among(REC.markers, tmp_path / "code", monkeypatch)
    found, lines = report(monkeypatch)
    assert line(lines, "REC") == f"{tmp_path / 'code' / 'REC'}, verified"
    assert line(lines, "  plug-in") == "works; rebinds get_model"
    assert line(lines, "verdict, REC") == "ready (no GPU: on the CPU)"
    absent = {"error": "HstuXdError: REC.utils: No module named 'colorlog'"}
    differing = {"importable": True, "path": str(Path.cwd() / "REC"), "problems": ["a.py: A"]}
    found, lines = report(monkeypatch, rec=differing, rec_plugin=absent)
    assert line(lines, "REC").endswith("not verified")
    assert line(lines, "  problem") == "a.py: A"
    assert found["verdict"]["rec"] == {"ready": False, "blocks": [f"REC: {absent['error']}"]}


def test_rec_is_really_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sit_among(REC.markers, tmp_path, monkeypatch)
    path = [str(tmp_path), *sys.path]
    found = ask("host", REC.declared_in, timeout_s=60, path=path)
    assert found["path"] == str(tmp_path / "REC")
    assert "trainer/trainer.py: Trainer is not there" in found["problems"]
    plugin = ask("plugin", REC.declared_in, timeout_s=60, path=path)
    assert "differs from the versions that hstu-xd was verified with" in plugin["error"]
    monkeypatch.setenv(OVERRIDE, "1")
    plugin = ask("plugin", REC.declared_in, timeout_s=60, path=path)
    assert "not there to rebind" in plugin["error"]


def test_libraries_that_do_not_fit_a_plugin_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torchrec": "1.9.2", "torchmetrics": "1.9.0", "triton": "3.9.0"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: versions.get(name, "1"))
    here = {DLRM.declared_in: {"importable": True, "path": str(Path.cwd() / "upstream")}}
    found, lines = report(monkeypatch, **here)
    text = line(lines, "  libraries")
    assert "torchrec 1.9.2 fits" in text
    metrics = "torchmetrics 1.9.0 does not fit: torchmetrics>=1.0.3,<1.0.4 is needed"
    assert metrics in text
    assert "on a GPU: triton 3.9.0 does not fit: triton<3.8 is needed" in text
    blocks = found["verdict"]["dlrm_v3"]["blocks"]
    assert [block for block in blocks if block.startswith("torchmetrics 1.9.0 does not fit")]
    assert not [block for block in blocks if block.startswith("triton")]
    gpu = {"version": "2.13.0", "cuda": "12.8", "devices": ["GPU X"]}
    found, _ = report(monkeypatch, torch=gpu, **here)
    blocks = found["verdict"]["dlrm_v3"]["blocks"]
    assert [block for block in blocks if block.startswith("triton 3.9.0 does not fit")]
