"""The report's tables on popularity, sharpness, order of domains and several logs side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest
from quick_runs import QUICKEST

from hstu_xd.cli.app import run
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.experiments.ablation import ablate
from hstu_xd.experiments.report.model_lists import list_models, tape_pairs
from hstu_xd.experiments.report.open_questions import questions_file
from hstu_xd.experiments.report.shared_data import compare_runs
from hstu_xd.experiments.run_folders import read_runs

VARIANTS = ("mask", "mask+tape", "popularity")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two logs, one with nearly all events in one domain, and runs on both."""
    root = tmp_path_factory.mktemp("open")
    for name, skew, variants in (("even", 0.0, VARIANTS), ("skewed", 0.9, VARIANTS[:2])):
        size = SynthOptions(users=60, domains=3, items_per_domain=20, mean_length=9, skew=skew)
        synthesize(root / name, size)
        ablate(root / name, variants, (1,), root / f"{name}-runs", bindings=QUICKEST)
    return root


@pytest.fixture(scope="module")
def page(workplace: Path) -> tuple[str, str]:
    """The page of the runs on the even log, and the tables beside it."""
    out = workplace / "report"
    assert run(["report", str(workplace / "even-runs"), "--out", str(out)]) == 0
    return (out / "index.html").read_text(), (out / "open_questions.md").read_text()


def rows_of(tables: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of a table of the Markdown file by the first one of their row."""
    part = tables.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_every_question_has_a_table(page: tuple[str, str]) -> None:
    html, tables = page
    for heading in ("Popularity of the targets", "What is recommended", "Ranking sharpness",
                    "Order of domains, and TAPE"):  # fmt: skip
        assert f"<h3>{heading}</h3>" in html
        assert f"### {heading}" in tables
    assert "side by side" not in html


def test_tenths_join_to_what_the_runs_have_recorded(workplace: Path, page: tuple[str, str]) -> None:
    rows = rows_of(page[1], "Popularity of the targets")
    heads = rows["metric, variant"]
    sizes = [int(re.search(r"\((\d+)\)", head)[1]) for head in heads]  # type: ignore[index]
    for recorded in json.loads((workplace / "even-runs" / "ablation.json").read_text()):
        values = [float(cell) for cell in rows[f"HR@10 {recorded['variant']}"]]
        joined = sum(v * size for v, size in zip(values, sizes)) / sum(sizes)
        assert joined == pytest.approx(100 * recorded["test"]["hr@10"], abs=0.01)
        assert sum(sizes) == recorded["test"]["count"]
    assert "HR@10 popularity minus mask" in rows
    assert "HR@10 mask minus mask" not in rows


def test_the_popular_recommend_few_and_popular_items(page: tuple[str, str]) -> None:
    rows = rows_of(page[1], "What is recommended")
    coverage, gini, popularity = (rows["variant"].index(f"{x}@10") for x in (
        "coverage", "gini", "popularity"))  # fmt: skip
    model, counted = rows["mask"], rows["popularity"]
    assert float(counted[gini]) > float(model[gini])
    assert float(counted[popularity]) > float(model[popularity])
    assert float(counted[coverage]) <= float(model[coverage])


def test_sharpness_is_that_of_the_runs(workplace: Path, page: tuple[str, str]) -> None:
    rows = rows_of(page[1], "Ranking sharpness")
    for recorded in json.loads((workplace / "even-runs" / "ablation.json").read_text()):
        cells, test = rows[recorded["variant"]], recorded["test"]
        for place, metric in ((0, "hr@1"), (2, "mrr"), (4, "hr@100")):
            assert float(cells[place]) == pytest.approx(100 * test[metric], abs=0.005)
        assert float(cells[6]) == pytest.approx(100 * test["hr@1"] / test["hr@100"], abs=0.005)


def test_tape_stands_beside_the_entropy(workplace: Path, page: tuple[str, str]) -> None:
    runs = read_runs([workplace / "even-runs"])
    assert list(tape_pairs(runs)) == [("mask", "mask+tape")]
    rows = rows_of(page[1], "Order of domains, and TAPE")
    assert {f"mask+tape minus mask{x}" for x in ("", " [switch]", " [stay]")} < rows.keys()
    assert "bits, without it by" in page[1]
    alone = compare_runs([one for one in runs if one.variant == "mask"], None)
    assert "No two variants have all but TAPE in common" in questions_file([alone])


def test_logs_stand_side_by_side(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "both"
    folders = [str(workplace / f"{name}-runs") for name in ("even", "skewed")]
    assert run(["report", *folders, "--out", str(out), "--allow-mixed-data"]) == 0
    assert "lists of mask+tape-seed1 (mask+tape)" in capsys.readouterr().err
    assert "<h3>The logs side by side</h3>" in (out / "index.html").read_text()
    tables = (out / "open_questions.md").read_text()
    lines = [line for line in tables.splitlines() if line.startswith(("| even ", "| skewed "))]
    assert len(lines) == 3  # two variants beside the first on one log, one on the other
    shares = {}
    for line in lines:
        name, _, domains, share, delta, given, without, _, variant, pairs, hits, *_ = (
            cell.strip() for cell in line.strip("| ").split("|")
        )
        stats = compare_runs(read_runs([workplace / f"{name}-runs"]), None).stats
        assert stats is not None
        assert (domains, share) == ("3", f"{100 * stats.largest_share:.2f}")
        assert float(delta) == pytest.approx(stats.mean_delta, abs=0.0006)
        assert float(given) <= float(without)
        assert variant.endswith(" minus mask")
        assert pairs == ("100.00" if "tape" in variant else "-")
        assert "\u00b1" in hits
        shares[name] = float(share)
    assert shares["skewed"] > 85 > shares["even"]


def test_lists_may_be_left_out(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "without"
    words = ["report", str(workplace / "even-runs"), "--out", str(out), "--skip-lists"]
    assert run(words) == 0
    assert "lists of" not in capsys.readouterr().err
    tables = (out / "open_questions.md").read_text()
    assert "Popularity of the targets" not in tables
    assert "\u00b1" not in "".join(
        rows_of(tables, "Order of domains, and TAPE")["mask+tape minus mask"]
    )


def test_runs_that_cannot_be_asked_are_told_in_words(workplace: Path, tmp_path: Path) -> None:
    copied = tmp_path / "runs"
    shutil.copytree(workplace / "even-runs", copied)
    names = sorted(path.parent.name for path in copied.glob("*/run.json"))
    (copied / names[0] / "best.safetensors").unlink()
    (copied / names[1] / "best.safetensors").write_bytes(b"cut short")
    summary = copied / names[2] / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"test": {}}))
    found, notes = list_models(read_runs([copied]), InteractionStore.open(workplace / "even"))
    assert found is None
    told = " ".join(notes)
    assert len(notes) == 3
    assert "holds no best.safetensors; restore it or train again" in told
    assert "cannot be asked: " in told
    assert "has not read its test, and report does not read it in its place" in told
    assert run(["report", str(copied), "--out", str(tmp_path / "report")]) == 0
    assert "is left out of the open questions" in (tmp_path / "report" / "index.html").read_text()


def test_another_protocol_and_a_single_domain_are_told(workplace: Path, tmp_path: Path) -> None:
    copied = tmp_path / "runs"
    shutil.copytree(workplace / "even-runs", copied)
    runs = read_runs([copied])
    changed = {1: {"protocol": {"ties": "favour"}}, 2: {"train": {"domain": "books"}}}
    for place, facts in changed.items():
        file = runs[place].path / "run.json"
        info = json.loads(file.read_text())
        for key, values in facts.items():
            info[key] |= values
        file.write_text(json.dumps(info))
    found, notes = list_models(read_runs([copied]), InteractionStore.open(workplace / "even"))
    assert found is not None
    assert list(found.ranked) == [runs[0].variant]
    assert "was measured by another protocol than the first" in notes[0]
    assert "is a model of one domain alone, whose lists do not compare" in notes[1]
