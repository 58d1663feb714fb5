"""A small log of baskets with fields and a taxonomy, and requests made of it."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu_xd.cli.app import run
from hstu_xd.data.store import InteractionStore

START, DAY = 1_600_000_000, 86_400


def baskets(users: int = 30, visits: int = 40, seed: int = 0) -> pl.DataFrame:
    """Users who come every few days and take what they took before, or something new."""
    draw = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        liked = draw.choice(120, 12, replace=False)
        days = np.sort(draw.choice(100, visits, replace=False))
        for day in days.tolist():
            usual = draw.choice(liked, 4, replace=False)
            items = np.unique(np.concatenate([usual, draw.integers(0, 120, 3)]))
            rows += [(user, int(item), START + day * DAY + user) for item in items]
    frame = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")
    deals = np.random.default_rng(seed + 1).random(len(frame)) < 0.4
    return frame.select(
        user=pl.format("u{}", "user"),
        item=pl.format("i{}", "item"),
        domain=pl.format("d{}", pl.col("item") % 2),
        time="time",
        deal=pl.Series(deals),
    )


ITEMS = pl.DataFrame(
    {
        "item": [f"i{n}" for n in range(120)],
        "type": [f"t{n % 24}" for n in range(120)],
        "aisle": [None if n == 7 else f"a{n % 6}" for n in range(120)],
    }
)


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    baskets().write_parquet(folder / "log.parquet")
    ITEMS.write_parquet(folder / "items.parquet")
    command = ["prepare", folder / "log.parquet", "--out", folder / "store", "--event-cols", "deal"]
    command += ["--item-features", folder / "items.parquet", "--levels", "type,aisle"]
    assert run([str(word) for word in command]) == 0
    return folder / "store"


@pytest.fixture(scope="session")
def store(store_path: Path) -> InteractionStore:
    return InteractionStore.open(store_path)


@pytest.fixture(scope="session")
def requests_path(store_path: Path) -> Path:
    out = store_path.with_name("requests")
    command = ["requests", "--data", store_path, "--out", out, "--goal", "deal"]
    command += ["--positives", 2, "--min-history", 20]
    assert run([str(word) for word in command]) == 0
    return out
