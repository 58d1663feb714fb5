"""examples/own_parts by the installed command: trained, asked, compared, exported and served."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_xd.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_parts"
COMMAND = Path(sys.executable).parent / "hstu-xd"
SMALL = ("xd_train.num_epochs = 1", "xd_train.item_embedding_dim = 8")
LAYER = "own_parts.ScaledLayer(initial_share=0.5)"
OBJECTIVE = "own_parts.InBatchSoftmax(temperature=0.1)"
REFUSED = (
    "needs code from outside hstu-xd, which loading it would execute: own_parts; if you trust it, "
    "add --allow-imports or set HSTU_XD_ALLOW_IMPORTS=1"
)


def command(*line: object, here: Path, code: int = 0, **environment: str) -> str:
    """What a command prints; of one that fails, its only line of error."""
    done = subprocess.run(
        [str(COMMAND), *map(str, line)],
        cwd=here,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    if code:
        (error,) = done.stderr.strip().splitlines()[-1:]
        assert "Traceback" not in done.stderr
        return error
    return done.stdout


def bindings() -> list[str]:
    return [word for binding in SMALL for word in ("--gin_bindings", binding)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the example's two files in a folder of it."""
    here = tmp_path_factory.mktemp("desk")
    shutil.copytree(EXAMPLE, here / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    return here


@pytest.fixture(scope="module")
def run(desk: Path, store_path: Path) -> Path:
    line = ["train", "--data", store_path, "--gin_config_file", "mine/mine.gin", *bindings()]
    command(*line, "--out", "run", here=desk)
    return desk / "run"


@pytest.fixture(scope="module")
def ablation(desk: Path, store_path: Path) -> Path:
    line = ["ablate", "--data", store_path, "--variants", "hstu,mine/mine.gin", "--seeds", "1"]
    table = command(*line, *bindings(), "--out", "runs", here=desk)
    assert re.search(r"^\| hstu \| 1 \|.*\n\| mine \| 1 \|", table, re.MULTILINE)
    return desk / "runs"


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_the_example_can_be_read_in_a_minute() -> None:
    files = sorted(file for file in EXAMPLE.iterdir() if file.is_file())
    assert [file.name for file in files] == ["mine.gin", "own_parts.py"]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 85


def test_its_parts_stand_in_the_run_and_in_its_name(run: Path) -> None:
    known = facts(run)
    assert known["parts"] == {"layer": LAYER, "objective": OBJECTIVE, "metric hr5": "own_parts.hr5"}
    assert known["encoder"]["layer"] == LAYER
    assert known["train"]["objective"] == OBJECTIVE
    assert f"layer {LAYER}" in known["variant_name"]
    assert f"objective {OBJECTIVE}" in known["variant_name"]
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["test"]["hr5"] <= summary["test"]["hr@10"]
    assert {"hr5[switch]", "hr5[books]"} <= summary["valid"].keys()


@pytest.mark.parametrize(
    "line",
    [
        "evaluate RUN",
        "recommend RUN --user u00000 --domain books",
        "compare RUNS",
        "export RUN --out OUT",
        "serve RUN --port 0",
        "train --data DATA --out RUN --resume",
    ],
)
def test_no_command_imports_it_unasked(
    line: str,
    run: Path,
    ablation: Path,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HSTU_XD_ALLOW_IMPORTS", "0")
    places = {"RUN": run, "RUNS": ablation, "OUT": tmp_path / "out", "DATA": store_path}
    assert app.run([str(places.get(word, word)) for word in line.split()]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hstu-xd: ")]
    assert error.endswith(REFUSED)
    assert "own_parts" not in sys.modules


def test_evaluate_repeats_the_summary_and_recommend_ranks(run: Path, desk: Path) -> None:
    found = json.loads(command("evaluate", "run", "--json", "--allow-imports", here=desk))
    summary = json.loads((run / "summary.json").read_text())
    assert found["test"] == pytest.approx(summary["test"])
    assert "hr5" in command("evaluate", "run", here=desk, HSTU_XD_ALLOW_IMPORTS="1")
    line = ["recommend", "run", "--user", "u00000", "--domain", "books", "--k", 3]
    assert len(command(*line, "--allow-imports", here=desk).splitlines()) == 3


def test_ablate_takes_its_file_for_a_variant_and_compare_and_report_name_it(
    ablation: Path, desk: Path
) -> None:
    rows = json.loads((ablation / "ablation.json").read_text())
    assert [row["variant"] for row in rows] == ["hstu", "mine"]
    assert facts(ablation / "mine-seed1")["parts"]["objective"] == OBJECTIVE
    assert "parts" not in facts(ablation / "hstu-seed1")
    (found,) = json.loads(command("compare", "runs", "--json", "--allow-imports", here=desk))
    assert found["variant"] == "mine"
    difference = rows[1]["test"]["mrr"] - rows[0]["test"]["mrr"]
    assert found["differences"]["mrr"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert "hr5" in found["differences"]
    command("report", "runs", "--out", "report", here=desk)
    page = (desk / "report" / "index.html").read_text()
    assert f"mine has parts from outside hstu-xd: layer {LAYER}, objective {OBJECTIVE}" in page
    refused = "(mine) is left out of the open questions: it cannot be asked: "
    assert refused in page
    command("report", "runs", "--out", "allowed", "--allow-imports", here=desk)
    page = (desk / "allowed" / "index.html").read_text()
    assert refused not in page
    assert "MRR mine minus hstu" in page


def test_an_ablation_goes_on_where_it_was_stopped(
    ablation: Path, store_path: Path, tmp_path: Path
) -> None:
    """Its own variant's file is the permission to import what the stopped run names."""
    here = tmp_path / "desk"
    shutil.copytree(ablation.parent, here)
    whole = (here / "runs" / "mine-seed1" / "metrics.jsonl").read_text()
    (here / "runs" / "mine-seed1" / "summary.json").unlink()
    shutil.rmtree(here / "runs" / "hstu-seed1")
    line = ["ablate", "--data", store_path, "--variants", "mine/mine.gin", "--seeds", "1"]
    command(*line, *bindings(), "--out", "runs", here=here)
    assert (here / "runs" / "mine-seed1" / "summary.json").is_file()
    assert (here / "runs" / "mine-seed1" / "metrics.jsonl").read_text() == whole
    resume = ["train", "--data", store_path, "--out", "runs/mine-seed1", "--resume"]
    command(*resume, "--allow-imports", here=here)


def test_it_is_exported(run: Path, desk: Path) -> None:
    command("export", "run", "--out", "exported", "--allow-imports", here=desk)
    program = torch.export.load(desk / "exported" / "encoder.pt2").module()
    ids = torch.tensor([[3, 9, 1]]), torch.tensor([[5, 6, 7]]), torch.tensor([1])
    code = f"import hstu_xd, torch; model = hstu_xd.load({str(run)!r}, allow_imports=True); "
    code += "print(model.encode(*torch.load('ids.pt'))[0].tolist())"
    torch.save(ids, desk / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, check=True
    )
    torch.testing.assert_close(
        program(*ids)[0], torch.tensor(json.loads(done.stdout)), rtol=0, atol=1e-5
    )


def test_it_is_served(run: Path, desk: Path) -> None:
    process = subprocess.Popen(
        [str(COMMAND), "serve", "run", "--port", "0", "--allow-imports"],
        cwd=desk,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        served = process.stdout.readline()
        assert served.startswith("serving "), served
        body = json.dumps({"user": "u00000", "domains": ["books"], "k": 3}).encode()
        request = urllib.request.Request(
            f"{served.split()[-1]}/v1/recommend", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (found,) = json.loads(answer.read())["recommendations"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    line = ["recommend", "run", "--user", "u00000", "--domain", "books", "--k", 3, "--json"]
    asked = json.loads(command(*line, "--allow-imports", here=desk))["items"]
    assert [x["item"] for x in found["items"]] == [x["item"] for x in asked]
    scores = [[x["score"] for x in items] for items in (found["items"], asked)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_module_that_has_gone_or_changed_is_named(run: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    shutil.copytree(run.parent, here)
    known = facts(here / "run")
    known["modules"]["own_parts"]["folder"] = str(tmp_path / "gone")
    (here / "run" / "run.json").write_text(json.dumps(known))
    line = ["evaluate", "run", "--allow-imports"]
    message = r"run needs module own_parts, which is not importable from here; .*PYTHONPATH"
    assert re.search(message, command(*line, here=here, code=2))
    (here / "own_parts.py").write_text((here / "mine" / "own_parts.py").read_text() + "\n# New.\n")
    done = subprocess.run(
        [str(COMMAND), *line], cwd=here, capture_output=True, text=True, check=True
    )
    assert "trained with another version of module own_parts" in done.stderr
