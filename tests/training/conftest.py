"""A small synthetic store that the trainer's tests share."""

from pathlib import Path

import pytest

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
