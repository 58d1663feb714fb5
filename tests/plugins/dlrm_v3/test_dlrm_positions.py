"""Positions in the order of events, against loops over the rows of every user."""

import dataclasses
import math

import pytest
import torch
from test_dlrm_model import EVERYTHING, replaced, with_signals
from upstream_dlrm import DOMAINS, batch, build, cross_domain, stock_model, twin_of

from hstu_xd.plugins.dlrm_v3.positions import PositionsInOrder
from hstu_xd.plugins.dlrm_v3.settings import CrossDomain


def in_order(**switches: object) -> CrossDomain:
    return dataclasses.replace(cross_domain(**switches), in_order=True)


@pytest.mark.parametrize("num_context", [0, 2])
def test_rows_are_told_their_place_and_the_time_since_the_event_before(num_context: int) -> None:
    torch.manual_seed(0)
    encoder = PositionsInOrder(9, 40, 4, num_context, is_inference=False)
    events, targets = torch.tensor([5, 0, 1, 11]), torch.tensor([2, 3, 0, 1])
    times = [
        [0] * num_context
        + sorted(torch.randint(0, 90_000, (n,)).tolist())
        + torch.randint(90_000, 10**9, (asked,)).tolist()
        for n, asked in zip(events.tolist(), targets.tolist())
    ]
    lengths = num_context + events + targets
    x = torch.randn(int(lengths.sum()), 4)
    found = encoder(
        max_seq_len=20,
        seq_lengths=lengths,
        seq_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        seq_timestamps=torch.tensor([time for own in times for time in own]),
        seq_embeddings=x,
        num_targets=targets,
    )
    positions, ages = (each.detach() for each in encoder.parameters())
    expected = []
    for own, n in zip(times, events.tolist()):
        for row, time in enumerate(own):
            first_target = num_context + n
            place = min(row, first_target)
            is_told = place > num_context  # something has happened before
            minutes = (time - own[place - 1]) / 60 if is_told else 0
            bucket = min(int(math.sqrt(minutes)), 40)
            expected.append(positions[min(place, 8)] + ages[bucket])
    torch.testing.assert_close(found, 2 * x + torch.stack(expected))


@pytest.mark.parametrize("switches", [{}, {"domain_mask": True}, EVERYTHING])
def test_scores_are_their_candidates_own(switches: dict) -> None:
    stock = stock_model()
    ours = with_signals(twin_of(stock, in_order(**switches)).eval())
    history, candidates = batch(2)
    first = ours(history, candidates)[3]
    assert not torch.allclose(
        first, with_signals(twin_of(stock, cross_domain(**switches)).eval())(history, candidates)[3]
    )
    lengths = candidates["item_candidate_id"].lengths()
    is_kept = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    is_kept[lengths.cumsum(0) - 1] = True
    for name, change in (
        ("item_candidate_id", lambda x: 60 - x),
        ("item_domain", lambda x: (x + 1) % DOMAINS),
        ("item_query_time", lambda x: x + 10**7),
    ):
        values = candidates[name].values()
        candidates = replaced(candidates, name, torch.where(is_kept, values, change(values)))
    second = ours(history, candidates)[3]
    assert torch.equal(first[:, is_kept], second[:, is_kept])
    assert not torch.equal(first, second)


def test_parameters_are_those_of_the_stock_model() -> None:
    assert list(build(extension=in_order()).state_dict()) == list(stock_model().state_dict())
