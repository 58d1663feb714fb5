"""What tests of trainings share: a small synthetic store, and a run with its refit."""

import json
from pathlib import Path

import pytest
from refit_runs import RECIPE, facts, log_lines, prepare, train

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=160, domains=3, items_per_domain=40, mean_length=14))
    return path


@pytest.fixture(scope="session")
def store(store_path: Path) -> InteractionStore:
    return InteractionStore.open(store_path)


@pytest.fixture(scope="session")
def refits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a run on it whose best epoch is its fifth, and its refit."""
    folder = tmp_path_factory.mktemp("refit")
    store = prepare(log_lines(), folder / "log.csv")
    assert train("--data", store, "--out", folder / "run", "--name", "HSTU", bindings=RECIPE) == 0
    summary = facts(folder / "run", "summary")
    (folder / "run" / "summary.json").write_text(json.dumps(summary | {"best_epoch": 4}))
    assert train("--refit", folder / "run", "--out", folder / "again") == 0
    return folder
