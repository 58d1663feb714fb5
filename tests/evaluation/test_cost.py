"""Pairs and bytes of a split, counted by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.evaluation.cost import attention_cost
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving import EncoderSession

WINDOW = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SequenceData:
    path: Path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=30, domains=3, items_per_domain=20, mean_length=12))
    return SequenceData(InteractionStore.open(path), Split.TEST, WINDOW)


def model(**switches: Any) -> CrossDomainHSTU:
    catalog = DomainCatalog(torch.tensor([0, *(i // 20 for i in range(60))]), ["a", "b", "c"])
    settings = EncoderSettings(num_domains=3, norm_length=WINDOW, dqk=16, dv=16, **switches)
    return CrossDomainHSTU(catalog, settings)


def test_full_attention(data: SequenceData) -> None:
    lengths = data.lengths(data.users)
    cost = attention_cost(model(), data, batch_size=7)
    assert cost.pairs == pytest.approx((lengths * (lengths + 1) / 2).mean())
    assert cost.state_bytes == pytest.approx(lengths.mean() * 2 * 4 * 32 * 4)


def test_segments_of_the_whole_history(data: SequenceData) -> None:
    """Segments of 4 events with 2 tokens: 10 events are 4 + T T + 4 + T T + 2."""
    settings = {"segment_by": "count", "segment_length": 4, "history_tokens": 2}
    cost = attention_cost(model(**settings, ddsr=True), data)
    pairs = rows = 0
    for length in data.lengths(data.users):
        tokens = 0
        for first in range(0, length, 4):
            events = min(4, length - first)
            pairs += events * (events + 1) // 2 + events * tokens
            if first + 4 < length:  # closed: each token reads the segment, tokens before and itself
                pairs += 2 * 4 + (tokens + 1) + (tokens + 2)
                tokens += 2
        rows += tokens + events
    users = len(data.users)
    assert cost.pairs == pytest.approx(pairs / users)
    per_row = 2 * 4 * 32 * 4
    assert cost.state_bytes == pytest.approx(rows / users * per_row + 3 * 4 * per_row)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"segment_by": "count", "segment_length": 2, "history_tokens": 1},
        {"domain_mask": True, "segment_by": "count", "segment_length": 2, "segment_lookback": 1},
    ],
)
def test_a_session_keeps_these_bytes(data: SequenceData, switches: dict[str, Any]) -> None:
    """All but the row of each user's last event, which it computes afresh for every request."""
    net, batch = model(**switches, ddsr=True), data.batch(data.users)[0]
    session, found = EncoderSession(net), 0
    for user, (first, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:])):
        items, times = batch.item_ids[first:end].tolist(), batch.timestamps[first:end].tolist()
        session.append([user] * len(items), items, times)
        session.query([user], [0])
        state = session._cache.get(user)
        assert state is not None
        found += (state.memory[..., : state.num_rows].numel() + state.state_memory.numel()) * 4
    users = len(data.users)
    per_row = 2 * 4 * 32 * 4
    assert found / users + per_row == pytest.approx(attention_cost(net, data).state_bytes)


def test_heads_and_layers_are_averaged(data: SequenceData) -> None:
    full, own = (attention_cost(model(domain_mask=mask), data).pairs for mask in (False, True))
    both = attention_cost(model(domain_mask=True, full_attention_layers=(1,)), data).pairs
    assert both == pytest.approx((full + own) / 2)
    target = attention_cost(model(domain_mask=True, target_view_heads=4), data).pairs
    half = attention_cost(model(domain_mask=True, target_view_heads=2), data).pairs
    assert half == pytest.approx((own + target) / 2)
