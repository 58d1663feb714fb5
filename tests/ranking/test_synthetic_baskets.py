"""Synthetic shoppers: a taxonomy, deals, and habits that a newcomer's rankers find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_xd.data.store import InteractionStore

Cli = Callable[..., Any]
SIZE = ("--users", 200, "--domains", 3, "--items-per-domain", 95, "--mean-length", 150)


@pytest.fixture
def folder(cli: Cli, tmp_path: Path) -> Path:
    assert cli("synth", "--out", tmp_path / "store", "--baskets", *SIZE).code == 0
    return tmp_path


def test_store_has_levels_deals_and_baskets(cli: Cli, folder: Path) -> None:
    store = InteractionStore.open(folder / "store", verify=True)
    assert store.manifest["synthetic"]
    assert store.manifest["synth"]["baskets"]
    assert store.taxonomy is not None
    assert store.taxonomy.names == ("type", "aisle")
    assert store.fields.values == (["no", "yes"],)
    types, aisles = store.taxonomy.nodes
    domains = store.catalog.item_domains.numpy()[1:]
    for fine, coarse in ((types, aisles), (aisles, domains)):
        assert all(len(set(coarse[fine == node])) == 1 for node in np.unique(fine))
    same = np.diff(store.timestamps) == 0
    assert same.mean() > 0.6
    assert np.diff(store.offsets).mean() == pytest.approx(150, rel=0.2)
    assert cli("synth", "--out", folder / "again", "--baskets", *SIZE).code == 0
    again = json.loads((folder / "again" / "manifest.json").read_text())
    assert again["hashes"] == store.manifest["hashes"]


def test_habits_are_worth_more_than_the_latest_events(cli: Cli, folder: Path) -> None:
    requests = ("requests", "--data", folder / "store", "--out", folder / "requests")
    assert cli(*requests, "--goal", "deal", "--positives", 2).code == 0
    found = {}
    for name, recipe, kind in (("counts", "counts", "none"), ("nothing", "tin", "none")):
        run = ("rank", "--data", folder / "requests", "--out", folder / name)
        settings = (f'xd_interest.kind = "{kind}"', "xd_rank.num_epochs = 2")
        bindings = [word for each in settings for word in ("--gin_bindings", each)]
        recipe_file = f"gin/standalone/rank_{recipe}.gin"
        assert cli(*run, "--gin_config_file", recipe_file, *bindings).code == 0
        found[name] = json.loads((folder / name / "summary.json").read_text())["test"]["gauc"]
    assert found["counts"] > found["nothing"] + 0.1


def test_skew_is_refused(cli: Cli, tmp_path: Path) -> None:
    said = cli("synth", "--out", tmp_path / "a", "--baskets", "--skew", 0.5)
    assert (said.code, "--skew 0.5: does nothing with --baskets" in said.err) == (2, True)
