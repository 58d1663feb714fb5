"""What the recorded store and runs answer: computed once for the record, and again by the tests."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recordings import EVENTS, RUNS, STORE, USER_FILES, ask, encode_input

import hstu_xd

# Finished runs.
FINISHED = ("all", "all+tokens")
# Users of the store and a domain to recommend from.
ASKED = (("u00001", "books"), ("u00007", "films"), ("u00030", "groceries"))
# Gin files of a user, from the root of the repository where they include others.
GIN_FILES = ("defaults.gin", "own_settings.gin", "shipped_recipe.gin")
ROOT = Path(__file__).parents[2]
# Users whom the service is asked about: one with events in the log alone, one with earlier ones in
# the store besides, one with earlier ones only, one who was forgotten, and a stranger.
SERVED = ("new", "u00007", "u00030", "u00001", "stranger")


def answers() -> dict[str, Any]:
    """Return all answers by name of the run and of what was asked."""
    found: dict[str, Any] = {name: answers_of(name) for name in FINISHED}
    found["compare"] = compare()
    with tempfile.TemporaryDirectory() as folder:
        found["gin"] = {name: settings_of(name, Path(folder) / name) for name in GIN_FILES}
        events = shutil.copy(EVENTS, folder)
        found["served"] = served(RUNS / "all", Path(events))
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


@contextmanager
def service(run: Path, events: Path) -> Iterator[Callable[..., Any]]:
    """Serve a run in a process of its own; gives a function that asks it."""
    command = [sys.executable, "-m", "hstu_xd", "serve", str(run), "--data", str(STORE)]
    process = subprocess.Popen(
        [*command, "--events", str(events), "--port", "0", "--threads", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]

    def asked(method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(address.rstrip("/") + path, method=method)
        request.add_header("content-type", "application/json")
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, data, timeout=60) as answer:
            return json.loads(answer.read())

    try:
        yield asked
    finally:
        process.terminate()
        process.communicate(timeout=60)


def served(run: Path, events: Path) -> list[dict[str, Any]]:
    """Return what a service with a log of events recommends."""
    # The time is given: answers shall not depend on when they are asked for.
    asked = {"domains": ["books", "films"], "k": 4, "timestamp": 2_000_000_000}
    bodies = [{"user": user, **asked} for user in SERVED]
    with service(run, events) as ask_service:
        return [ask_service("POST", "/v1/recommend", body) for body in bodies]
