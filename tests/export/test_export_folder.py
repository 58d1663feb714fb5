"""``hstu-xd export``: a folder that torch alone can read, whole or not there at all."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from requests_of import requests
from safetensors.torch import load_file

import hstu_xd
from hstu_xd.catalog import DomainCatalog
from hstu_xd.cli import app
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.export import describe_catalog, folder
from hstu_xd.training.checkpoint import save_checkpoint

WINDOW = 12
BINDINGS = (
    "xd_encoder.domain_mask = True",
    "xd_encoder.tape = True",
    "xd_encoder.ddsr = True",
    "xd_encoder.target_view_heads = 1",
    "xd_encoder.target_domain_embedding = True",
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_train.item_embedding_dim = 8",
    f"xd_train.max_sequence_length = {WINDOW}",
    "xd_train.num_epochs = 1",
    "xd_train.num_negatives = 20",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    synthesize(folder / "store", SynthOptions(users=60, domains=3, items_per_domain=20))
    (folder / "all.gin").write_text("\n".join(BINDINGS) + "\n")
    line = ["train", "--data", str(folder / "store"), "--out", str(folder / "run")]
    assert app.run([*line, "--gin_config_file", str(folder / "all.gin")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "exported"
    assert app.run(["export", str(run), "--out", str(out)]) == 0
    return out


def test_torch_alone_answers_as_the_model(run: Path, exported: Path, tmp_path: Path) -> None:
    model = hstu_xd.load(run)
    asked = requests(WINDOW, items=model.catalog.num_items)
    torch.save(asked, tmp_path / "asked.pt")
    here = Path(__file__).parent
    command = [sys.executable, here / "exported_elsewhere.py", exported]
    # As on a machine without a GPU, and away from the checkout.
    blind = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, tmp_path / "asked.pt", tmp_path / "answers.pt"],
        cwd=tmp_path,
        env=blind | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    items = torch.arange(model.catalog.num_items + 1)
    answers = torch.load(tmp_path / "answers.pt")
    assert len(answers) == len(asked)
    for request, (vectors, scores) in zip(asked, answers):
        with torch.no_grad():
            expected = model.encode(*request)
            torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
            expected = expected @ model.item_vectors(items).T
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("later", [0, 10**7])
def test_the_time_of_a_request_counts_as_it_does_for_recommend(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str], later: int
) -> None:
    store = InteractionStore.open(run.parent / "store")
    history, times = (torch.tensor(part[-WINDOW:]).long() for part in store.history(3))
    at, domain = int(times[-1]) + later, store.domain_names[1]
    line = ["recommend", str(run), "--user", store.user_token(3), "--domain", domain, "--json"]
    assert app.run([*line, "--k", "60", "--at", str(at)]) == 0
    rows = json.loads(capsys.readouterr().out)["items"]
    encode = torch.export.load(exported / "encoder.pt2").module()
    padded = torch.nn.functional.pad(history, (0, 1)), torch.cat([times, torch.tensor([at])])
    vector = encode(*(x.unsqueeze(0) for x in padded), torch.tensor([1]))
    scores = (vector @ torch.load(exported / "item_vectors.pt").T).squeeze(0)
    tokens = json.loads((exported / "catalog.json").read_text())["tokens"]
    found = [scores[tokens.index(row["item"])].item() for row in rows]
    assert len(rows) > 1
    assert found == pytest.approx([row["score"] for row in rows], abs=1e-5)


def test_the_folder_says_what_it_holds(run: Path, exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    files = {file.name for file in exported.iterdir()}
    assert files == {*manifest["hashes"], "manifest.json"}
    for name, expected in manifest["hashes"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == expected
    facts = json.loads((run / "run.json").read_text())
    assert manifest["version"] == hstu_xd.__version__
    assert manifest["torch"] == torch.__version__
    assert manifest["window"] == WINDOW
    assert manifest["run"]["data_hashes"] == facts["data_hashes"]
    assert manifest["settings"] == {k: v for k, v in facts["encoder"].items() if k != "impl"}
    assert manifest["format_version"] == 2
    assert "time of the request" in manifest["inputs"]["timestamps"]
    assert set(manifest["inputs"]) == {"item_ids", "timestamps", "target_domains"}
    model = hstu_xd.load(run)
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_catalogue_maps_ids_to_domains_and_tokens(run: Path, exported: Path) -> None:
    catalog = hstu_xd.load(run).catalog
    written = json.loads((exported / "catalog.json").read_text())
    assert [domain["name"] for domain in written["domains"]] == list(catalog.domain_names)
    for domain in written["domains"]:
        ids = [i for first, last in domain["items"] for i in range(first, last + 1)]
        assert ids == catalog.items_of(domain["id"]).tolist()
    assert written["tokens"][0] is None
    assert written["tokens"][1:] == [catalog.token(i) for i in range(1, catalog.num_items + 1)]


def test_domains_that_interleave_and_ids_nobody_bears() -> None:
    catalog = DomainCatalog(torch.tensor([0, 1, 0, 0, -1, 0, 1]), ["books", "films", "games"])
    assert describe_catalog(catalog) == {
        "domains": [
            {"id": 0, "name": "books", "items": [[2, 3], [5, 5]]},
            {"id": 1, "name": "films", "items": [[1, 1], [6, 6]]},
            {"id": 2, "name": "games", "items": []},
        ],
        "tokens": [None, "1", "2", "3", None, "5", "6"],
    }


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds; what is written is not the matter here."""
    monkeypatch.setattr(folder, "export_encoder", lambda model: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"program"))


def test_existing_folders_are_safe(
    run: Path, tmp_path: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["export", str(run), "--out", str(out)]
    assert app.run(line) == 0
    assert app.run(line) == 2
    assert "--force" in capsys.readouterr().err
    assert app.run([*line, "--force"]) == 0
    capsys.readouterr()
    for theirs in ("notes.txt", "checkpoints/best.pt"):
        (out / theirs).parent.mkdir(exist_ok=True)
        (out / theirs).write_text("theirs")
        assert app.run([*line, "--force"]) == 2
        assert f"holds {theirs.partition('/')[0]!r}, which is no part" in capsys.readouterr().err
        assert (out / theirs).read_text() == "theirs"
        (out / theirs).unlink()
    (out / "checkpoints").rmdir()
    (out / "manifest.json").write_text("{}")
    assert app.run([*line, "--force"]) == 2
    assert "is not a hstu-xd export" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["sha256_of", "_item_vectors", "describe_catalog"])
def test_a_failure_leaves_what_was_there(
    run: Path,
    tmp_path: Path,
    untraced: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    line = ["export", str(run), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as broken:
        broken.setattr(folder, step, full)
        assert app.run(line) == 1
        assert "No space left" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    assert app.run(line) == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(folder, step, full)
    assert app.run([*line, "--force"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_model_that_is_saved_meanwhile_is_not_mixed_with_the_one_before(
    run: Path,
    tmp_path: Path,
    untraced: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = shutil.copytree(run, tmp_path / "run")
    weights = load_file(training / "best.safetensors")

    def saves(model: torch.nn.Module) -> None:
        changed = {name: value + 1 for name, value in weights.items()}
        save_checkpoint(training / "best.safetensors", changed, {"epoch": 9})

    monkeypatch.setattr(folder, "export_encoder", saves)
    assert app.run(["export", str(training), "--out", str(tmp_path / "out")]) == 1
    assert "has saved a better model meanwhile; export it again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not a run folder" in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "out").exists()
