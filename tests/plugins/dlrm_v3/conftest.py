"""A small synthetic store that the tests of this folder share."""

from pathlib import Path

import pytest

from hstu_xd.data.synthetic import SynthOptions, synthesize


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=60, domains=3, items_per_domain=30, mean_length=14))
    return path
