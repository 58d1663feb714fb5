"""Who sees whom: what follows from the rule agrees with it, and a narrower rule is one function."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_cases import Spec, draw
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops import RelativeBias, domain_attention
from hstu_xd.ops.domain_attention.flex import flex_domain_attention
from hstu_xd.ops.domain_attention.fused import fused_domain_attention
from hstu_xd.ops.grouping import (
    DomainGrouping,
    PairRule,
    num_pairs,
    pair_rule,
    seeing_start,
    seen_end,
    seen_keys,
)

SPECS = [
    Spec((0, 1, 2, 17, 65), num_domains=3, target_view=target, biased=biased)
    for target in (False, True)
    for biased in (True, False)
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def window(grouping: DomainGrouping) -> PairRule:
    """The last five positions of the history, whatever their domain."""
    return lambda query, key: grouping.positions[query] - grouping.positions[key] < 5


def sink(grouping: DomainGrouping) -> PairRule:
    """The same and the first two positions."""
    near = window(grouping)
    return lambda query, key: near(query, key) | (grouping.positions[key] < 2)


def search(grouping: DomainGrouping) -> PairRule:
    """What has been found for each query, however it was."""
    length = grouping.num_tokens
    found = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.3
    return lambda query, key: found[query, key]


RULES: dict[str, Callable[[DomainGrouping], PairRule]] = {
    "window": window,
    "sink": sink,
    "search": search,
}


def every_pair(grouping: DomainGrouping) -> Tensor:
    """(L, L) bool, by a loop over tokens."""
    users, queries = (grouping.group_of // grouping.num_domains).tolist(), grouping.group_of
    place, keys = grouping.positions.tolist(), grouping.keys.group_of
    length = grouping.num_tokens
    return torch.tensor(
        [
            [
                users[i] == users[j] and bool(queries[i] == keys[j]) and place[j] <= place[i]
                for j in range(length)
            ]
            for i in range(length)
        ]
    ).view(length, length)


@every_spec
def test_pairs_prefixes_and_counts_agree(spec: Spec) -> None:
    grouping = draw(spec).grouping()
    keys, tokens = grouping.keys, torch.arange(grouping.num_tokens)
    pairs = every_pair(grouping)
    assert torch.equal(pair_rule(grouping)(tokens.unsqueeze(1), tokens), pairs)
    assert torch.equal(seen_keys(grouping), pairs.sum(1))
    assert num_pairs(grouping) == int(pairs.sum())
    rows = tokens
    end = seen_end(grouping, grouping.group_of, grouping.positions)
    begin = keys.offsets[grouping.group_of]
    prefix = (rows >= begin.unsqueeze(1)) & (rows < end.unsqueeze(1))
    assert torch.equal(prefix, pairs[:, keys.permutation])
    start = seeing_start(grouping, keys.group_of, keys.positions)
    stop = grouping.offsets[keys.group_of + 1]
    suffix = (rows >= start.unsqueeze(1)) & (rows < stop.unsqueeze(1))
    assert torch.equal(suffix, pairs[grouping.permutation].T)


def attend(spec: Spec, narrow: Callable[[DomainGrouping], PairRule], **chosen: str) -> list[Tensor]:
    """Output and gradients under a rule."""
    case = draw(spec)
    leaves, grouping = case.tensors(torch.float64), case.grouping()
    grouping = replace(grouping, rule=narrow(grouping))
    q, k, v = (leaves[x] for x in "qkv")
    bias: RelativeBias | None = case.relative_bias(leaves)
    out = domain_attention(q, k, v, grouping, norm_length=70, bias=bias, **chosen)
    grad_out = torch.from_numpy(case.grad_out).double()
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out)]


@pytest.mark.parametrize("normalization", ["silu", "softmax"])
@pytest.mark.parametrize("name", RULES)
@every_spec
def test_a_narrower_rule_is_one_function(spec: Spec, name: str, normalization: str) -> None:
    """A window, a sink or a search reaches reference and eager alike, and is counted."""
    expected = attend(spec, RULES[name], impl="reference", normalization=normalization)
    found = attend(spec, RULES[name], impl="auto", normalization=normalization)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    grouping = draw(spec).grouping()
    rule, tokens = RULES[name](grouping), torch.arange(grouping.num_tokens)
    narrowed = replace(grouping, rule=rule)
    pairs = every_pair(grouping) & rule(tokens.unsqueeze(1), tokens)
    assert 0 < int(pairs.sum()) < num_pairs(grouping)
    assert num_pairs(narrowed) == int(pairs.sum())


def test_the_reference_under_a_rule_is_the_masked_sum() -> None:
    case = draw(SPECS[1])
    leaves, grouping = case.tensors(torch.float64), case.grouping()
    q, k, v = (leaves[x].detach() for x in "qkv")
    tokens = torch.arange(len(q))
    rule = window(grouping)
    mask = every_pair(grouping) & rule(tokens.unsqueeze(1), tokens)
    scores = torch.einsum("ihd,jhd->hij", q, k)
    expected = torch.einsum("hij,jhd->ihd", torch.nn.functional.silu(scores) * mask / 70, v)
    narrowed = replace(grouping, rule=rule)
    found = domain_attention(q, k, v, narrowed, norm_length=70, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_flex_follows_a_rule() -> None:
    case = draw(SPECS[1])
    grouping = replace(case.grouping(), rule=window(case.grouping()))
    given = [torch.from_numpy(x) for x in (case.q, case.k, case.v)]
    found = flex_domain_attention(*given, grouping, norm_length=70)
    expected = domain_attention(
        *given, grouping, norm_length=70, normalization="softmax", impl="reference"
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernels_refuse_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    grouping = DomainGrouping.single(torch.tensor([0, 3]), 3)
    x = torch.ones(3, 1, 4)
    with pytest.raises(InputError, match=r"grouping.rule narrows what queries see; impl 'triton'"):
        fused_domain_attention(x, x, x, replace(grouping, rule=window(grouping)), norm_length=3)
