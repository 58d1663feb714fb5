"""Small synthetic stores that the tests of this folder share."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu_xd.cli.app import run
from hstu_xd.data.requests import RequestOptions, write_requests
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=60, domains=3, items_per_domain=30, mean_length=14))
    return path


@pytest.fixture(scope="session")
def baskets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of baskets and requests: of both goals, and of any."""
    folder, draw = tmp_path_factory.mktemp("baskets"), np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", f"d{item % 2}", 1_600_000_000 + 86_400 * day + user)
        for user in range(20)
        for day in range(0, 100, 4)
        for item in draw.choice(60, 5, replace=False).tolist()
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "domain", "timestamp"], orient="row")
    log = log.with_columns(deal=pl.Series(draw.random(len(log)) < 0.4))
    log.write_parquet(folder / "log.parquet")
    numbers = range(60)
    pl.DataFrame(
        {"item_id": [f"i{n}" for n in numbers], "type": [f"t{n % 12}" for n in numbers]}
    ).write_parquet(folder / "items.parquet")
    command = ["prepare", folder / "log.parquet", "--out", folder / "store", "--event-cols", "deal"]
    command += ["--item-features", folder / "items.parquet", "--levels", "type"]
    assert run([str(word) for word in command]) == 0
    store = InteractionStore.open(folder / "store")
    for name, goal in (("goals", "deal"), ("any", None)):
        options = RequestOptions(goal=goal, positives=1, negatives=3, min_history=10, per_user=0)
        write_requests(store, folder / name, options)
    return folder
