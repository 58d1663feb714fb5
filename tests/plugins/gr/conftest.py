"""A small synthetic store that the plug-in's tests share."""

from pathlib import Path

import pytest

from hstu_xd.data.synthetic import synthesize
from hstu_xd.data.world import SynthOptions


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=160, domains=3, items_per_domain=40, mean_length=14))
    return path
