"""``hstu-xd compare``: runs against one another, user by user."""

import json
import shutil
from pathlib import Path

import pytest
from quick_runs import QUICK

from hstu_xd.cli.app import run
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.experiments.variants import variant_bindings
from hstu_xd.training.run import train
from hstu_xd.training.settings import load_settings


@pytest.fixture(scope="module")
def runs(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of an ablation: hstu with two seeds, mask with one."""
    out = tmp_path_factory.mktemp("compared") / "runs"
    for variant, seed in (("hstu", 1), ("hstu", 2), ("mask", 1)):
        seeded = f"xd_train.random_seed = {seed}"
        settings = load_settings([], [*QUICK, *variant_bindings(variant), seeded])
        train(store_path, settings, out / f"{variant}-seed{seed}", name=variant)
    return out


def test_differences_are_those_of_the_rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(runs), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["variant"], found["base"], found["seeds"]) == ("mask", "hstu", [1])
    tests = {
        folder.name: json.loads((folder / "summary.json").read_text())["test"]
        for folder in runs.glob("*-seed*")
    }
    for name, difference in found["differences"].items():
        base = (tests["hstu-seed1"][name] + tests["hstu-seed2"][name]) / 2
        assert difference["mean"] == pytest.approx(tests["mask-seed1"][name] - base, abs=1e-9)
    assert found["differences"]["mrr"]["count"] == tests["mask-seed1"]["count"]


def test_the_table_has_a_row_a_variant(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(runs / "mask-seed1"), str(runs / "hstu-seed1")]) == 0
    head, _, row, _, *notes = capsys.readouterr().out.splitlines()
    assert head.startswith("| minus mask | seeds | HR@10, points |")
    assert row.startswith("| hstu | 1 | ")
    assert row.count("\u00b1") == 6
    assert any("exclude_seen on" in note for note in notes)


def test_what_cannot_be_compared(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(runs / "hstu-seed1")
    assert run(["compare", one, str(runs / "hstu-seed2")]) == 2
    assert "only 'hstu' is there" in capsys.readouterr().err
    assert run(["compare", str(runs), "--split", "train"]) == 2
    assert "split is 'train'; one of valid, test" in capsys.readouterr().err
    synthesize(tmp_path / "other", SynthOptions(users=30, domains=2, items_per_domain=20))
    line = ["train", "--data", str(tmp_path / "other"), "--out", str(tmp_path / "run")]
    for binding in QUICK:
        line += ["--gin_bindings", binding]
    assert run(line) == 0
    capsys.readouterr()
    assert run(["compare", one, str(tmp_path / "run")]) == 2
    assert "trained on different data" in capsys.readouterr().err


def test_what_makes_a_comparison_doubtful(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs / "hstu-seed1", again)
    assert run(["compare", str(runs), str(again)]) == 0
    assert "Runs of hstu repeat a seed" in caplog.text
    (again / "summary.json").unlink()
    capsys.readouterr()
    assert run(["compare", str(runs), str(again)]) == 2
    assert "still training or stopped" in capsys.readouterr().err
