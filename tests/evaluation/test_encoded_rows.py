"""Who reads one vector of a history asks the model for that one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EVERYTHING, draw_histories, encode, tiny_model
from torch import Tensor

from hstu_xd.batch import JaggedBatch
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.evaluation.baselines import Popularity
from hstu_xd.evaluation.ranks import rank_targets, recommend_items
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving.bulk import Histories, user_vectors
from hstu_xd.serving.session import EncoderSession

LENGTHS = [9, 1, 20, 5]
HISTORIES = draw_histories(LENGTHS)
WINDOWS = Histories(
    torch.tensor([item for each in HISTORIES for item in each.items]),
    torch.tensor([time for each in HISTORIES for time in each.times]),
    torch.tensor([0, 9, 10, 30, 35]),
)
SOFTMAX = {"tape": True, "normalization": "softmax"}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows that models are asked for, call by call."""
    asked: list[list[int]] = []
    forward = CrossDomainHSTU.forward

    def spied(self: Any, batch: JaggedBatch, **named: Any) -> Tensor:
        found = named.get("asked")
        asked.append(["every"] if found is None else found.tolist())
        return forward(self, batch, **named)

    monkeypatch.setattr(CrossDomainHSTU, "forward", spied)
    return asked


@pytest.fixture
def data(tmp_path: Path) -> Callable[[Split], SequenceData]:
    sizes = SynthOptions(users=30, domains=3, items_per_domain=20, mean_length=12)
    synthesize(tmp_path / "store", sizes)
    store = InteractionStore.open(tmp_path / "store")
    return lambda split: SequenceData(store, split, 10)


@pytest.mark.parametrize("split", [Split.VALID, Split.TEST])
def test_evaluation(
    split: Split, data: Callable[[Split], SequenceData], tmp_path: Path, rows: list[list[int]]
) -> None:
    held_out, catalog = data(split), InteractionStore.open(tmp_path / "store").catalog
    settings = EncoderSettings(num_domains=3, norm_length=10, **EVERYTHING)
    found = rank_targets(CrossDomainHSTU(catalog, settings), held_out, held_out.users)
    batch, _ = held_out.batch(held_out.users)
    assert rows == [(batch.offsets[1:] - 1).tolist()]
    assert len(found.ranks) == len(held_out.users)


def test_a_baseline_is_asked_alike(data: Callable[[Split], SequenceData], tmp_path: Path) -> None:
    held_out, catalog = data(Split.TEST), InteractionStore.open(tmp_path / "store").catalog
    counted = Popularity.count(catalog, data(Split.TRAIN), 0.1)
    model = Popularity(catalog, EncoderSettings(num_domains=3, norm_length=10), counted)
    batch, _ = held_out.batch(held_out.users)
    last = batch.offsets[1:] - 1
    assert torch.equal(model(batch, asked=last), model(batch)[last])


@torch.no_grad()
@pytest.mark.parametrize(
    ("switches", "domains", "needed"),
    [
        (EVERYTHING, [1], [[8, 9, 29, 34]]),
        (EVERYTHING, [2, 0, 1], [[8, 35, 36, 9, 37, 38, 29, 39, 40, 34, 41, 42]]),
        (SOFTMAX, [2, 0], [[8, 9, 29, 34]] * 2),
        ({}, [2, 0], [[8, 9, 29, 34]]),
    ],
)
def test_recommendations_and_scores_for_many(
    switches: dict[str, Any], domains: list[int], needed: list[list[int]], rows: list[list[int]]
) -> None:
    """The last rows, and of several domains the answers of the questions for the others."""
    model = tiny_model(**switches)
    found = user_vectors(model, WINDOWS, domains, at=10**8)
    assert rows == needed
    for place, domain in enumerate(domains):
        asked = [type(h)(h.items, h.times, domain, 10**8) for h in HISTORIES]
        torch.testing.assert_close(found[:, place], encode(model, asked), rtol=0, atol=1e-5)


def test_one_user(rows: list[list[int]]) -> None:
    model, history = tiny_model(**EVERYTHING), HISTORIES[2]
    recommend_items(model, np.array(history.items), np.array(history.times), 1, 3, window=24)
    assert rows == [[19]]


def test_a_session_begins_without_a_row(rows: list[list[int]]) -> None:
    """Its first encoding is for what later events read; the vectors come from its steps."""
    model, history = tiny_model(**EVERYTHING), HISTORIES[2]
    session = EncoderSession(model)
    session.append(["ann"] * 20, history.items, history.times)
    found = session.query(["ann"], [history.request_domain], [history.request_time])
    assert rows == [[]]
    torch.testing.assert_close(found, encode(model, [history]), rtol=0, atol=1e-5)
