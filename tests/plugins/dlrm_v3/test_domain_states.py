"""DDSR behind upstream's layers: against loops over rows, and who reads and writes states."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_dlrm_model import EVERYTHING, replaced, with_and_without_context, with_signals
from torch import Tensor
from torch.nn.functional import layer_norm
from upstream_dlrm import (
    DOMAINS,
    answers,
    batch,
    cross_domain,
    dense_domain_mask,
    stock_model,
    twin_of,
)

from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, time_bucket
from hstu_xd.plugins.dlrm_v3 import domain_states
from hstu_xd.plugins.dlrm_v3.domain_groups import RequestLayout
from hstu_xd.plugins.dlrm_v3.domain_states import DomainStateSublayer, RequestStates

# (row, domain, time) of what has left a state, oldest first.
Written = list[tuple[int, int, int]]


def answer_by_formula(
    sublayer: Any, rows: Tensor, row: int, written: Written, domain: int, time: int, depth: int
) -> Tensor:
    """What a row reads of the latest states of every domain: (K,)."""
    ddsr, heads = sublayer._ddsr, sublayer._ddsr._heads
    states, ages = [], []
    for d in range(DOMAINS):
        latest = [entry for entry in written if entry[1] == d][-depth:]
        states += [rows[entry] for entry, _, _ in latest] or [ddsr._initial_state[d]]
        ages += [
            int(time_bucket(torch.tensor(time - when), NUM_TIME_BUCKETS)) for _, _, when in latest
        ] or [NUM_TIME_BUCKETS]
    memory = torch.stack(states)
    query = (ddsr._query(rows[row]) + ddsr._target_emb.weight[domain]).view(heads, -1)
    key, value = (part(memory).unflatten(1, (heads, -1)) for part in (ddsr._key, ddsr._value))
    scores = torch.einsum("hk,shk->sh", query, key) / query.shape[1] ** 0.5
    weights = (scores + ddsr._age_w[ages]).softmax(0)
    return sublayer._output(torch.einsum("sh,shv->hv", weights, value).flatten())


def by_loops(features: Any, num_context: int, depth: int) -> Callable[..., Tensor]:
    """The sublayer as its formula says it, row by row, over the batch as it is."""
    history, candidates = features
    columns = (
        (history, "uih_domain"),
        (history, "action_time"),
        (candidates, "item_domain"),
        (candidates, "item_query_time"),
    )
    users = list(zip(*([v.long().tolist() for v in f[name].to_dense()] for f, name in columns)))

    def forward(self: Any, x: Tensor, states: Any) -> Tensor:
        rows, out, start = layer_norm(x, x.shape[1:], eps=1e-6), list(x), 0
        for domains, times, asked_domains, asked_times in users:
            start += num_context
            seen = [(start + at, d, t) for at, (d, t) in enumerate(zip(domains, times))]
            for at, (row, _, _) in enumerate(seen):
                _, domain, time = seen[min(at + 1, len(seen) - 1)]
                told = rows, row, seen[: at + 1], domain, time, depth
                out[row] = x[row] + answer_by_formula(self, *told)
            start += len(seen)
            for row, (d, t) in enumerate(zip(asked_domains, asked_times), start):
                told = rows, row, [*seen, (row, d, t)], d, t, depth
                out[row] = x[row] + answer_by_formula(self, *told)
            start += len(asked_domains)
        return torch.stack(out)

    return forward


@with_and_without_context
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("domain_mask", [False, True])
def test_states_are_what_loops_over_rows_find(
    num_context: int, depth: int, domain_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_model(num_context)
    switches = {"ddsr": True, "tape": True, "states_per_domain": depth}
    ours = cross_domain(domain_mask=domain_mask, **switches)
    ours = with_signals(twin_of(stock, ours, num_context=num_context))
    plain = twin_of(stock, cross_domain(**switches), num_context=num_context)
    plain.load_state_dict(ours.state_dict())
    for seed in range(4):
        features = batch(seed)
        found = answers(ours, features)
        with monkeypatch.context() as patch:
            patch.setattr(DomainStateSublayer, "forward", by_loops(features, num_context, depth))
            if domain_mask:
                with dense_domain_mask(features, num_context):
                    expected = answers(plain, features)
            else:
                expected = answers(plain, features)
        for name, value in expected.items():
            limit = 2e-5 * max(1.0, float(value.abs().max()))
            assert float((found[name] - value).abs().max()) <= limit, name


def history_and_scores(model: Any, features: Any, patch: pytest.MonkeyPatch) -> tuple:
    """Rows of the history behind every layer, and the candidates' scores."""
    kept = []
    original = DomainStateSublayer.forward
    num_events = features[0]["item_id"].values().numel()

    def watched(self: Any, x: Tensor, states: RequestStates) -> Tensor:
        out = original(self, x, states)
        kept.append(out[states.places[:num_events]])
        return out

    with patch.context() as local, torch.no_grad():
        local.setattr(DomainStateSublayer, "forward", watched)
        scores = model(*features)[3]
    return kept, scores


def other_candidates(candidates: Any, is_kept: Tensor) -> Any:
    """Other items of other domains, but for those that are kept.

    At the same time: upstream's positional encoder tells every row of the last candidate's.
    """
    for name, change in (
        ("item_candidate_id", lambda x: 60 - x),
        ("item_domain", lambda x: (x + 1) % DOMAINS),
    ):
        values = candidates[name].values()
        candidates = replaced(candidates, name, torch.where(is_kept, values, change(values)))
    return candidates


def first_candidates(candidates: Any) -> Tensor:
    lengths = candidates["item_candidate_id"].lengths()
    is_first = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    is_first[lengths.cumsum(0) - lengths] = True
    return is_first


def what_moves(switches: dict[str, Any], patch: pytest.MonkeyPatch) -> set[str]:
    """What candidates change beyond their own scores."""
    ours = with_signals(twin_of(stock_model(), cross_domain(**switches)).eval())
    moved = set()
    for seed in range(6):
        history, candidates = batch(seed)
        first = first_candidates(candidates)
        rows, scores = history_and_scores(ours, (history, candidates), patch)
        for kept, what in ((first, "later"), (~first, "first"), (first & ~first, "all")):
            others = other_candidates(candidates, kept)
            new_rows, new_scores = history_and_scores(ours, (history, others), patch)
            if not all(torch.equal(a, b) for a, b in zip(rows, new_rows)):
                moved.add(f"history rows by {what} candidates")
            if not torch.equal(scores[:, kept], new_scores[:, kept]):
                moved.add(f"scores by {what} candidates")
            assert not torch.equal(scores[:, ~kept], new_scores[:, ~kept])
    return moved


@pytest.mark.parametrize("switches", [{"ddsr": True, "tape": True}, EVERYTHING])
def test_candidates_move_their_own_scores_alone(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert what_moves(switches, monkeypatch) == set()


def targets_write(patch: pytest.MonkeyPatch) -> None:
    original = RequestStates.build

    def build(layout: RequestLayout, *others: Any) -> RequestStates:
        events = replace(
            layout,
            is_history=layout.is_history | layout.is_target,
            is_target=torch.zeros_like(layout.is_target),
            first_targets=layout.offsets[1:],
        )
        return original(events, *others)

    patch.setattr(domain_states.RequestStates, "build", build)


def last_event_knows_the_first_candidate(patch: pytest.MonkeyPatch) -> None:
    def following(self: RequestLayout, values: Tensor) -> Tensor:
        return torch.where(self.is_history, values.roll(-1), values)

    patch.setattr(RequestLayout, "following", following)


@pytest.mark.parametrize("switches", [{"ddsr": True, "tape": True}, EVERYTHING])
@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        (targets_write, "scores by first candidates"),
        (last_event_knows_the_first_candidate, "history rows by first candidates"),
    ],
)
def test_that_check_kills_mutants(
    mutant: Callable[[pytest.MonkeyPatch], None],
    expected: str,
    switches: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutant(monkeypatch)
    assert expected in what_moves(switches, monkeypatch)


def test_a_score_reads_the_states_of_other_domains() -> None:
    ours = with_signals(twin_of(stock_model(), cross_domain(domain_mask=True, ddsr=True)).eval())
    history, candidates = batch(3)
    before = ours(history, candidates)[3]
    seen, ids = history["uih_domain"].values(), history["item_id"].values()
    after = ours(replaced(history, "item_id", torch.where(seen == 1, 60 - ids, ids)), candidates)[3]
    asked = candidates["item_domain"].values()
    assert not torch.equal(before[:, asked != 1], after[:, asked != 1])


def test_a_batch_without_history_reads_initial_states() -> None:
    ours = with_signals(twin_of(stock_model(), cross_domain(**EVERYTHING)).eval())
    history, candidates = batch(1)
    empty = type(history)(
        keys=history.keys(),
        values=history["user_id"].values(),
        lengths=torch.cat([history["user_id"].lengths(), torch.zeros(4 * 5, dtype=torch.int64)]),
    )
    scores = ours(empty, candidates)[3]
    assert torch.isfinite(scores).all()
