"""History tokens against their definition: rows laid out one by one, masks written pair by pair."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import (
    EVERYTHING,
    NORM_LENGTH,
    NUM_DOMAINS,
    History,
    domain_of,
    draw_histories,
    hidden_states,
    tiny_model,
    to_batch,
)
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import num_pairs
from hstu_xd.ops.relative_bias import time_bucket

HISTORIES = draw_histories([20, 1, 24, 7, 13], seed=6)
MASK = {"domain_mask": True}
VIEW = {"domain_mask": True, "target_view_heads": 2}
COUNT = {"segment_by": "count", "segment_length": 3}
CASES: dict[str, dict[str, Any]] = {
    "per_user": COUNT | {"history_tokens": 2},
    "per_domain": MASK | COUNT | {"history_tokens": 2},
    "four_tokens": MASK | {"segment_by": "count", "segment_length": 1, "history_tokens": 4},
    "target_view": VIEW | COUNT | {"history_tokens": 1},
    "target_view_alone": VIEW | COUNT | {"target_view_heads": 4, "history_tokens": 1},
    "no_token": VIEW | COUNT,
    "lookback_per_user": COUNT | {"history_tokens": 1, "segment_lookback": 1},
    "lookback_per_domain": VIEW | COUNT | {"history_tokens": 2, "segment_lookback": 2},
    "sliding_window": VIEW | COUNT | {"segment_lookback": 1},
    "gap_per_user": {"segment_by": "time_gap", "segment_gap": 40_000, "history_tokens": 1},
    "gap_per_domain": VIEW | {"segment_by": "time_gap", "segment_gap": 90_000, "history_tokens": 2},
    "session_per_domain": VIEW
    | {"segment_by": "session", "segment_gap": 60_000, "history_tokens": 1},
    "everything": EVERYTHING | COUNT | {"history_tokens": 2},
    "one_long_segment": VIEW | {"segment_by": "count", "segment_length": 99, "history_tokens": 3},
}
every_case = pytest.mark.parametrize("name", CASES)


@dataclass
class Row:
    """An event, or the ``token``-th token of a segment whose last event is ``event``."""

    event: int
    run: int
    segment: int
    token: int = -1


def lay_out(history: History, settings: EncoderSettings) -> list[Row]:
    """Rows of one user, as the definition says."""
    rows: list[Row] = []
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    segment: dict[int, int] = {}
    session, session_of_run = 0, {}
    for event, (item, time) in enumerate(zip(history.items, history.times)):
        run = domain_of(item) if settings.domain_mask else 0
        if event and time - history.times[event - 1] > settings.segment_gap:
            session += 1
        if run not in last:
            segment[run] = 0
        else:
            ends = {
                "count": size[run] == settings.segment_length,
                "time_gap": time - history.times[last[run]] > settings.segment_gap,
                "session": session != session_of_run[run],
            }[settings.segment_by]
            if ends:
                tokens = range(settings.history_tokens)
                rows += [Row(last[run], run, segment[run], token) for token in tokens]
                segment[run] += 1
                size[run] = 0
        rows.append(Row(event, run, segment[run]))
        last[run], size[run], session_of_run[run] = event, size.get(run, 0) + 1, session
    return rows


def reads(rows: list[Row], query: int, run: int, key: int, lookback: int) -> bool:
    """Whether a row, reading some run, sees another row."""
    if key > query or rows[key].run != run:
        return False
    if rows[key].token >= 0:
        return True
    if rows[query].token >= 0:
        return rows[key].segment == rows[query].segment
    opened = [r.segment for r in rows[: query + 1] if r.token < 0 and r.run == run]
    return rows[key].segment >= opened[-1] - lookback


def target_run(history: History, row: Row) -> int:
    if row.token >= 0:
        return row.run
    return [*map(domain_of, history.items[1:]), history.request_domain][row.event]


def visible_pairs(history: History, settings: EncoderSettings) -> tuple[Tensor, Tensor]:
    """(S, S) bool, pairs of the heads that read the own run and the target's."""
    rows = lay_out(history, settings)
    own, target = torch.zeros(2, len(rows), len(rows), dtype=torch.bool)
    for query, row in enumerate(rows):
        for key in range(len(rows)):
            own[query, key] = reads(rows, query, row.run, key, settings.segment_lookback)
            target[query, key] = reads(
                rows, query, target_run(history, row), key, settings.segment_lookback
            )
    return own, target


def by_hand(model: CrossDomainHSTU, history: History) -> Tensor:
    """What the encoder makes of one user's events, dense, row by row."""
    s, batch = model.settings, to_batch([history])
    inputs: list[Tensor] = []
    hook = model._hstu.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(batch)
    hook.remove()
    rows = lay_out(history, s)
    tokens = model._hstu._history_tokens
    x = torch.stack([inputs[0][r.event] if r.token < 0 else tokens[r.token] for r in rows])
    events = [i for i, r in enumerate(rows) if r.token < 0]
    position = torch.tensor([r.event for r in rows])
    times = batch.timestamps[position]
    is_token = torch.tensor([r.token >= 0 for r in rows])
    next_times = torch.where(is_token, times, batch.next_timestamps[position])
    own, target = visible_pairs(history, s)
    heads_of_own = torch.arange(s.num_heads) < s.num_heads - s.target_view_heads
    visible = torch.where(heads_of_own[:, None, None], own, target)
    laid = model.rows(batch)
    for layer in model._hstu.layers:
        normed, u, v, q, k = layer.project(x)
        q, k, v = (part.unflatten(1, (s.num_heads, -1)).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2)
        bias = layer._rel_attn_bias
        scores = scores + bias._pos_w[NORM_LENGTH - 1 + position - position[:, None]]
        scores = scores + bias._ts_w[time_bucket(next_times[:, None] - times, 128)]
        weights = torch.nn.functional.silu(scores) / s.norm_length * visible
        attended = layer.normalise((weights @ v).transpose(0, 1).flatten(1))
        answer = None
        if s.ddsr:
            answer = torch.zeros_like(attended)
            states = layer.state(normed, attended)
            answer[events] = layer._ddsr(
                normed[events], states[events], laid.state_reads, laid.entry_targets
            )
        x = layer.combine(x, u, attended, answer)
    return x[events]


@every_case
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_equals_the_definition(name: str, impl: str) -> None:
    model = tiny_model(impl=impl, **CASES[name]).double()
    with torch.no_grad():
        found = hidden_states(model, to_batch(HISTORIES))
        expected = torch.cat([by_hand(model, history) for history in HISTORIES])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_case
def test_hidden_pairs_are_not_computed(name: str) -> None:
    model = tiny_model(**CASES[name])
    rows = model.rows(to_batch(HISTORIES))
    pairs = [visible_pairs(history, model.settings) for history in HISTORIES]
    own_run = rows.own if model.settings.domain_mask else rows.everything
    found = sum(num_pairs(grouping) for grouping in own_run)
    assert found == sum(int(own.sum()) for own, _ in pairs)
    if model.settings.target_view_heads:
        found = sum(num_pairs(grouping) for grouping in rows.target)
        assert found == sum(int(target.sum()) for _, target in pairs)


@every_case
def test_kept_rows_are_those_that_later_ones_read(name: str) -> None:
    model = tiny_model(**CASES[name])
    rows = model.rows(to_batch(HISTORIES))
    expected = 0
    for history in HISTORIES:
        laid = lay_out(history, model.settings)
        last = {row.run: row.segment for row in laid if row.token < 0}
        back = model.settings.segment_lookback
        expected += sum(row.token >= 0 or row.segment >= last[row.run] - back for row in laid)
    assert rows.num_readable == expected


def test_without_a_closed_segment_nothing_changes() -> None:
    long = EVERYTHING | {"segment_by": "count", "segment_length": NORM_LENGTH}
    with_tokens = tiny_model(**long, history_tokens=2)
    without = tiny_model(**EVERYTHING)
    state = with_tokens.state_dict()
    del state["_hstu._history_tokens"]
    without.load_state_dict(state)
    batch = to_batch(HISTORIES)
    torch.testing.assert_close(with_tokens(batch), without(batch), rtol=0, atol=1e-6)


def test_an_event_of_a_closed_segment_acts_through_its_tokens_alone() -> None:
    """Six events of one domain in segments of three: event 0 reaches event 5 by the tokens."""
    history = History((1, 4, 7, 10, 13, 16), tuple(range(0, 600, 100)), 0, 700)
    changed = history.with_item(0, 22)
    assert len(set(map(domain_of, (*history.items, 22)))) == 1
    settings = MASK | {"segment_by": "count", "segment_length": 3}

    def last_event_moves(**switches: Any) -> bool:
        model = tiny_model(**settings, **switches)
        before, after = (model(to_batch([h])) for h in (history, changed))
        assert not torch.equal(before[:3], after[:3])
        return not torch.equal(before[5], after[5])

    assert last_event_moves(history_tokens=1)
    assert not last_event_moves(history_tokens=0)


def test_gradients_by_difference() -> None:
    """In float64 on one case, through both groupings, tokens included."""
    model = tiny_model(**CASES["everything"]).double()
    batch = to_batch(HISTORIES[3:])
    direction = torch.randn(
        len(batch.item_ids), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def loss() -> Tensor:
        return (hidden_states(model, batch) * direction).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for name in ("_hstu._history_tokens", "_hstu._attention_layers.0._uvqk"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(step, alpha=sign * 1e-6)
                values.append(loss())
                parameter.add_(step, alpha=-sign * 1e-6)
        expected = (values[0] - values[1]) / 2e-6
        found = (parameter.grad * step).sum()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history_tokens": 2}, "history_tokens is 2 but segment_by is 'none'"),
        ({"history_tokens": -1}, "history_tokens is -1"),
        (COUNT | {"segment_lookback": -1}, "segment_lookback is -1; 0 or more"),
        ({"segment_lookback": 1}, "segment_lookback is 1 but segment_by is 'none'"),
        ({"segment_by": "day"}, "segment_by is 'day'; one of none, count, time_gap, session"),
        ({"segment_by": "count", "segment_length": 0}, "segment_length is 0"),
        (COUNT | {"domain_mask": True, "full_attention_layers": (0,)}, "full_attention_layers"),
        (COUNT | {"normalization": "softmax"}, "needs normalization='silu', got 'softmax'"),
        (COUNT | {"target_view_heads": 1}, "needs domain_mask=True"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EncoderSettings(num_domains=NUM_DOMAINS, norm_length=8, **settings)
