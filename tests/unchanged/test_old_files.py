"""Stores, runs and settings that version 0.1.0 wrote, or that were written for it, still work."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import answers
import pytest
import torch
from recordings import (
    ANSWERS,
    EVENTS,
    RECORDED,
    RUNS,
    STORE,
    USER_FILES,
    ask,
    difference_in_metrics,
    encode_input,
)

import hstu_xd
from hstu_xd.plugins.rec.settings import RecSettings

# Vectors of unit length, and scores of recommendations, where the arithmetic rounds otherwise.
ABSOLUTE = 1e-5


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(ANSWERS.read_text())


@pytest.mark.parametrize("name", answers.FINISHED)
def test_a_run_encodes_as_it_did(name: str, recorded: dict[str, Any], exact: bool) -> None:
    found = hstu_xd.load(RUNS / name).encode(*encode_input())
    expected = torch.tensor(recorded[name]["encode"])
    assert expected.norm(dim=1).min() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else ABSOLUTE)


@pytest.mark.parametrize("name", answers.FINISHED)
def test_a_run_is_evaluated_as_it_was(name: str, recorded: dict[str, Any], exact: bool) -> None:
    found = answers.evaluate(name)
    for split, metrics in recorded[name]["evaluate"].items():
        # With the same weights a rank moves only where two scores are as good as equal.
        assert not difference_in_metrics(found[split], metrics, exact=exact, users=1), split


@pytest.mark.parametrize("name", answers.FINISHED)
def test_a_run_recommends_what_it_did(name: str, recorded: dict[str, Any], exact: bool) -> None:
    for (user, domain), expected in zip(answers.ASKED, recorded[name]["recommend"]):
        found = answers.recommend(name, user, domain)
        # The recorded scores are further apart than another rounding moves them.
        assert [row["item"] for row in found["items"]] == [row["item"] for row in expected["items"]]
        scores = [[row["score"] for row in said["items"]] for said in (found, expected)]
        assert scores[0] == (scores[1] if exact else pytest.approx(scores[1], abs=ABSOLUTE))


def test_runs_are_compared_as_they_were(recorded: dict[str, Any], exact: bool) -> None:
    (found,), (expected,) = answers.compare(), recorded["compare"]
    assert (found["variant"], found["base"]) == (expected["variant"], expected["base"])
    assert found["seeds"] == expected["seeds"]
    assert found["differences"].keys() == expected["differences"].keys()
    for name, old in expected["differences"].items():
        new = found["differences"][name]
        # A user with another rank in either run moves the mean over a group by one of its users.
        near = old if exact else pytest.approx(old, abs=2 / old["count"])
        assert new == near, name


def test_a_report_is_made_of_old_runs(tmp_path: Path) -> None:
    runs = [RUNS / name for name in answers.FINISHED]
    ask("report", *runs, "--out", tmp_path / "report", "--data", STORE)
    page = (tmp_path / "report" / "index.html").read_text()
    for run in runs:
        test = json.loads((run / "summary.json").read_text())["test"]
        assert f"{100 * test['ndcg@100']:.2f}" in page
    assert list((tmp_path / "report").glob("*.png"))


def test_an_old_run_is_exported(tmp_path: Path) -> None:
    ask("export", RUNS / "all", "--out", tmp_path / "exported")
    program = torch.export.load(tmp_path / "exported" / "encoder.pt2").module()
    expected = hstu_xd.load(RUNS / "all").encode(*encode_input())
    torch.testing.assert_close(program(*encode_input()), expected, rtol=0, atol=ABSOLUTE)


def test_a_service_goes_on_with_an_old_log_of_events(
    recorded: dict[str, Any], tmp_path: Path, exact: bool
) -> None:
    events = Path(shutil.copy(EVENTS, tmp_path))
    for found, expected in zip(answers.served(RUNS / "all", events), recorded["served"]):
        assert found["user"] == expected["user"]
        rows = [
            [
                (row["domain"], each["item"], each["score"])
                for row in answer["recommendations"]
                for each in row["items"]
            ]
            for answer in (found, expected)
        ]
        assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
        scores = [[row[2] for row in answer] for answer in rows]
        assert scores[0] == (scores[1] if exact else pytest.approx(scores[1], abs=ABSOLUTE))


@pytest.mark.parametrize("name", answers.GIN_FILES)
def test_a_users_gin_file_sets_what_it_set(
    name: str, recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(answers.ROOT)
    found = answers.settings_of(name, tmp_path / "run")
    for block, settings in recorded["gin"][name].items():
        # A later version may have more settings, never fewer.
        assert {key: found[block].get(key) for key in settings} == settings


def test_a_shipped_recipe_is_included_from_a_folder_that_has_it(
    recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(answers.ROOT / "gin" / "standalone", tmp_path / "gin" / "standalone")
    monkeypatch.chdir(tmp_path)
    found = answers.settings_of("shipped_recipe.gin", tmp_path / "run")
    assert found["encoder"]["linear_dropout_rate"] == 0.5
    assert (found["train"]["temperature"], found["train"]["item_embedding_dim"]) == (0.1, 8)


@pytest.mark.parametrize("name", ["hstu_xd.yaml", "hllm_xd.yaml"])
def test_keys_of_a_users_yaml_file_mean_what_they_did(name: str) -> None:
    lines = [line for line in (USER_FILES / name).read_text().splitlines() if line[0] != "#"]
    # Values are written so that Python reads them as YAML does.
    keys = {key: ast.literal_eval(value) for key, value in (line.split(": ") for line in lines)}
    settings = RecSettings.read(keys)
    encoder = {key.removeprefix("xd_"): value for key, value in keys.items()}
    encoder = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in encoder.items()
        if key in settings.encoder
    }
    assert settings.encoder == encoder
    assert settings.model == keys["model"]
    assert settings.item_domain_path == "items.csv"
    assert settings.candidates == keys["xd_candidates"]
    assert settings.negatives == keys["xd_negatives"]
    assert settings.scopes_negatives == (keys["xd_negatives"] == "auto")
    assert settings.relative_bias == keys.get("xd_relative_bias", False)
    assert settings.warm_start == keys.get("xd_warm_start", "")
    # Nothing of the file went unread.
    assert len(keys) == len(encoder) + 4 + ("xd_relative_bias" in keys) + ("xd_warm_start" in keys)


def test_old_rows_of_benchmarks_are_drawn(recorded: dict[str, Any], tmp_path: Path) -> None:
    assert answers.plot(tmp_path / "figures") == recorded["plot"]


def test_what_was_recorded_names_no_machine() -> None:
    for file in (file for file in RECORDED.rglob("*") if file.is_file()):
        found = re.search(rb"/(?:tmp|root|home|work|Users|var)/[\w/.-]*", file.read_bytes())
        assert found is None, f"{file.name} holds {found[0].decode()}"
    for run in RUNS.iterdir():
        assert json.loads((run / "run.json").read_text())["data"] == "store"
