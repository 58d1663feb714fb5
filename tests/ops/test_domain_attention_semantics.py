"""What the attention may and may not see: these hold to the last bit, so closeness cannot hide."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Spec, draw, every_impl, implementation
from torch import Tensor

from hstu_xd.ops import RelativeBias
from hstu_xd.ops.grouping import DomainGrouping

both_views = pytest.mark.parametrize("target_view", [False, True], ids=["own", "target"])

SPEC = Spec((90, 0, 1, 23), num_domains=3)


def plain_tensors(case: Case) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in case.tensors(torch.float32).items()}


def attend(
    case: Case, tensors: dict[str, Tensor], impl: str, grouping: DomainGrouping | None = None
) -> Tensor:
    return implementation(impl)(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        grouping or case.grouping(),
        norm_length=case.norm_length,
        bias=case.relative_bias(tensors),
    )


def perturbed(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The same tensors with other numbers in these tokens' queries, keys and values."""
    changed = dict(tensors)
    for name in ("q", "k", "v"):
        changed[name] = tensors[name].clone()
        changed[name][rows] += 1
    return changed


@every_impl
@both_views
@pytest.mark.parametrize("position", [0, 1, 44, 63, 64, 89])
def test_the_future_is_not_seen(impl: str, target_view: bool, position: int) -> None:
    case = draw(replace(SPEC, target_view=target_view))
    tensors = plain_tensors(case)
    before = attend(case, tensors, impl)
    later = torch.arange(position, 90)
    after = attend(case, perturbed(tensors, later), impl)
    assert torch.equal(after[:position], before[:position])
    assert torch.equal(after[90:], before[90:]), "another user saw it"
    assert not torch.equal(after[position:90], before[position:90])


@every_impl
def test_another_domain_is_not_seen(impl: str) -> None:
    case = draw(SPEC)
    tensors = plain_tensors(case)
    elsewhere = torch.from_numpy(case.domains == 1)
    before, after = (attend(case, t, impl) for t in (tensors, perturbed(tensors, elsewhere)))
    assert torch.equal(after[~elsewhere], before[~elsewhere])
    assert not torch.equal(after[elsewhere], before[elsewhere])


@every_impl
def test_the_target_view_sees_the_target_domain_alone(impl: str) -> None:
    case = draw(replace(SPEC, target_view=True))
    tensors = plain_tensors(case)
    rows = torch.from_numpy(case.domains == 1)
    changed = {**tensors, **{n: perturbed(tensors, rows)[n] for n in ("k", "v")}}
    before, after = attend(case, tensors, impl), attend(case, changed, impl)
    aims_there = torch.from_numpy(case.targets == 1)
    assert torch.equal(after[~aims_there], before[~aims_there])
    assert not torch.equal(after[aims_there], before[aims_there])


@every_impl
def test_nothing_to_read_gives_zero(impl: str) -> None:
    case = draw(Spec((20, 3), num_domains=5, visited=2, target_view=True))
    out = attend(case, plain_tensors(case), impl)
    unvisited = torch.from_numpy(case.targets >= 2)
    assert unvisited.any()
    assert torch.equal(out[unvisited], torch.zeros_like(out[unvisited]))


@every_impl
def test_the_target_view_of_own_domains_is_the_own_view(impl: str) -> None:
    case = draw(SPEC)
    tensors = plain_tensors(case)
    own = case.grouping()
    target = own.target_view(torch.from_numpy(case.domains))
    found, expected = attend(case, tensors, impl, target), attend(case, tensors, impl, own)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_impl
@both_views
@pytest.mark.parametrize("user", [0, 2, 3])
def test_a_user_alone_equals_the_user_in_a_batch(impl: str, target_view: bool, user: int) -> None:
    case = draw(replace(SPEC, target_view=target_view))
    start, end = (int(x) for x in case.offsets[user : user + 2])
    tensors = plain_tensors(case)
    alone_case = replace(
        case,
        domains=case.domains[start:end],
        targets=case.targets[start:end],
        offsets=case.offsets[user : user + 2] - start,
        bias=replace(
            case.bias,
            times=case.bias.times[start:end],
            next_times=case.bias.next_times[start:end],
        ),
    )
    own = {n: x[start:end] if n in "qkv" else x for n, x in tensors.items()}
    alone, together = attend(alone_case, own, impl), attend(case, tensors, impl)[start:end]
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)


@every_impl
def test_one_domain_is_full_attention(impl: str) -> None:
    case = draw(replace(SPEC, num_domains=1))
    tensors = plain_tensors(case)
    single = DomainGrouping.single(torch.from_numpy(case.offsets), len(case.q))
    assert torch.equal(attend(case, tensors, impl, single), attend(case, tensors, impl))


@every_impl
def test_times_and_positions_have_no_origin(impl: str) -> None:
    """Only differences enter: another epoch, or a history that begins later, changes nothing."""
    case = draw(SPEC)
    tensors = plain_tensors(case)
    bias = case.relative_bias(tensors)
    assert bias is not None
    moved = RelativeBias(
        bias.position_weights,
        bias.time_weights,
        bias.positions + 2,
        bias.timestamps + 10**9,
        bias.next_timestamps + 10**9,
    )
    outputs = [
        implementation(impl)(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            case.grouping(),
            norm_length=case.norm_length,
            bias=b,
        )
        for b in (bias, moved)
    ]
    assert torch.equal(*outputs)
