"""What the recorded store and runs answer: computed once for the record, and again by the tests."""

import json
import tempfile
from pathlib import Path
from typing import Any

from recordings import RUNS, STORE, USER_FILES, ask, encode_input

import hstu_xd

# Finished runs.
FINISHED = ("all", "all+tokens")
# Users of the store and a domain to recommend from.
ASKED = (("u00001", "books"), ("u00007", "films"), ("u00030", "groceries"))
# Gin files of a user, from the root of the repository where they include others.
GIN_FILES = ("own_settings.gin", "shipped_recipe.gin")
ROOT = Path(__file__).parents[2]


def answers() -> dict[str, Any]:
    """Return all answers by name of the run and of what was asked."""
    found: dict[str, Any] = {name: answers_of(name) for name in FINISHED}
    found["compare"] = compare()
    with tempfile.TemporaryDirectory() as folder:
        found["gin"] = {name: settings_of(name, Path(folder) / name) for name in GIN_FILES}
        found["plot"] = plot(Path(folder) / "figures")
    return found


def answers_of(name: str) -> dict[str, Any]:
    """Return user vectors, metrics and recommendations of one run."""
    return {
        "encode": hstu_xd.load(RUNS / name).encode(*encode_input()).tolist(),
        "evaluate": evaluate(name),
        "recommend": [recommend(name, user, domain) for user, domain in ASKED],
    }


def evaluate(name: str) -> dict[str, Any]:
    """Return what evaluate says of a run, without where it lies."""
    said = json.loads(ask("evaluate", RUNS / name, "--data", STORE, "--json"))
    return {split: said[split] for split in ("valid", "test")}


def recommend(name: str, user: str, domain: str) -> dict[str, Any]:
    """Return five recommendations."""
    asked = ("--user", user, "--domain", domain, "--k", "5")
    return json.loads(ask("recommend", RUNS / name, *asked, "--data", STORE, "--json"))


def compare() -> list[dict[str, Any]]:
    """Return what compare says of the finished runs."""
    runs = [RUNS / name for name in FINISHED]
    return json.loads(ask("compare", *runs, "--data", STORE, "--json"))


def settings_of(name: str, out: Path) -> dict[str, Any]:
    """Return all settings that a gin file of the user sets, as a run with it notes them."""
    quick = ("xd_train.num_epochs = 1", "xd_train.num_negatives = 8")
    words = [word for one in quick for word in ("--gin_bindings", one)]
    ask(*("train", "--data", STORE, "--out", out, "--gin_config_file", USER_FILES / name), *words)
    facts = json.loads((out / "run.json").read_text())
    return {block: facts[block] for block in ("encoder", "train")}


def plot(out: Path) -> dict[str, Any]:
    """Return the table and the names of the figures drawn of stored rows of benchmarks."""
    rows = (USER_FILES / "rows.json", USER_FILES / "rows.csv")
    ask("bench", "plot", *rows, "--out", out)
    figures = sorted(file.name for file in out.iterdir() if file.suffix != ".md")
    return {"figures": figures, "table": (out / "table.md").read_text()}
