"""The synthetic log: labelled, repeatable, adjustable, and with a signal between domains."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from log_files import contents
from numpy.typing import NDArray

from hstu_xd.data import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, make_world, stationary, synthesize

SMALL = SynthOptions(users=60, domains=3, items_per_domain=30, mean_length=12)


def test_label_and_repeatability(cli: Callable, tmp_path: Path) -> None:
    args = ("--users", 50, "--domains", 6, "--items-per-domain", 25, "--mean-length", 10)
    first = cli("synth", "--out", tmp_path / "a", *args)
    assert first.code == 0
    assert "SYNTHETIC" in first.out
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["synthetic"] is True
    assert manifest["users"] == 50
    assert set(manifest["domains"]) >= {"books", "films", "domain_06"}
    assert cli("synth", "--out", tmp_path / "b", *args).code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert cli("synth", "--out", tmp_path / "c", *args, "--seed", 1).code == 0
    assert contents(tmp_path / "a")["item_ids.npy"] != contents(tmp_path / "c")["item_ids.npy"]


def test_same_format_as_a_prepared_log(tmp_path: Path) -> None:
    manifest = synthesize(tmp_path / "out", SMALL)
    store = InteractionStore.open(tmp_path / "out")
    assert store.num_users == 60
    assert store.num_interactions == manifest["interactions"]
    assert manifest["history_length"]["mean"] == pytest.approx(SMALL.mean_length, rel=0.25)
    for user in range(store.num_users):
        items, times = store.history(user)
        assert len(items) >= 5
        assert (np.diff(times) > 0).all()
        assert items.min() >= 1
        assert items.max() <= store.num_items


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.9])
def test_skew(skew: float, tmp_path: Path) -> None:
    options = SynthOptions(users=500, domains=4, items_per_domain=40, mean_length=20, skew=skew)
    share = 1 / 4 + skew * (1 - 1 / 4)
    transitions = make_world(options, np.random.default_rng(0)).transitions
    np.testing.assert_allclose(transitions.sum(1), 1)
    np.testing.assert_allclose(stationary(transitions)[0], share, atol=1e-6)
    manifest = synthesize(tmp_path / "out", options)
    books = manifest["domains"]["books"]["interactions"] / manifest["interactions"]
    assert books == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(("domains", "items"), [(1, 50), (2, 2), (40, 3), (3, 21)])
def test_odd_shapes(domains: int, items: int, tmp_path: Path) -> None:
    options = SynthOptions(users=30, domains=domains, items_per_domain=items, mean_length=8)
    manifest = synthesize(tmp_path / "out", options)
    assert manifest["users"] == 30
    assert manifest["items"] <= domains * items
    assert any("one domain only" in text for text in manifest["warnings"]) == (domains == 1)


def rank(scores: NDArray[np.float64], seen: NDArray[np.int32], target: int) -> int:
    """Rank of the target among unseen items; ties count against it."""
    at_least = scores >= scores[target]
    at_least[np.setdiff1d(seen, [target])] = False
    return int(at_least.sum())


def test_the_other_domain_tells_about_the_next_item(tmp_path: Path) -> None:
    """After a switch, what followed the last item elsewhere beats popularity by far."""
    synthesize(tmp_path / "out", SynthOptions(users=800, items_per_domain=100, domains=4))
    store = InteractionStore.open(tmp_path / "out")
    domain = store.catalog.item_domains.numpy()
    size = store.num_items + 1
    popularity, follows = np.zeros(size), np.zeros((size, size))
    train = [store.history(user)[0][:-1] for user in range(store.num_users)]
    for items in train:
        np.add.at(popularity, items, 1)
        np.add.at(follows, (items[:-1], items[1:]), 1)
    hits = {"popularity": 0, "last item": 0}
    switches = 0
    for user, items in enumerate(train):
        target, last = store.history(user)[0][-1], items[-1]
        if domain[target] == domain[last]:
            continue
        switches += 1
        inside = domain == domain[target]
        for name, scores in (
            ("popularity", popularity),
            ("last item", follows[last] + 1e-6 * popularity),
        ):
            hits[name] += rank(np.where(inside, scores, -1.0), items, target) <= 5
    assert switches > 200
    assert hits["last item"] > 2 * hits["popularity"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--users", 0], ["--users 0", "at least 1"]),
        (["--domains", 0], ["--domains 0", "at least 1"]),
        (["--items-per-domain", 1], ["--items-per-domain 1", "at least 2"]),
        (["--mean-length", "nan"], ["--mean-length nan", "at least 5"]),
        (["--skew", 1.0], ["--skew 1.0", "0 to below 1"]),
        (["--seed", -1], ["--seed -1", "at least 0"]),
    ],
)
def test_bad_options(args: list, words: list[str], cli: Callable, tmp_path: Path) -> None:
    outcome = cli("synth", "--out", tmp_path / "out", *args)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words)
    assert not list(tmp_path.iterdir())


def test_never_overwrites(cli: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("synth", "--out", out, "--users", 20, "--items-per-domain", 20, "--mean-length", 6)
    assert cli(*args).code == 0
    outcome = cli(*args)
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert cli(*args, "--force").code == 0
    (out / "manifest.json").unlink()
    assert cli(*args, "--force").code == 2


def test_length_beyond_the_catalogue_is_cut_to_it(cli: Callable, tmp_path: Path) -> None:
    args = ("synth", "--users", 20, "--domains", 2, "--items-per-domain", 30)
    for mean in ("1e300", "inf"):
        out = tmp_path / mean
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli(*args, "--mean-length", mean, "--out", out).code == 0
        lengths = json.loads((out / "manifest.json").read_text())["history_length"]
        assert lengths["mean"] == lengths["max"] == 30
