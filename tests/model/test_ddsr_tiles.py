"""DDSR's tiles against the definition: a look-up of every state that every token reads."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_reading import reads_in_tiles
from torch import Tensor

from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.state_attention.reference import (
    last_state_index,
    reference_state_attention,
    state_age_bucket,
)
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.ops.state_attention.state_tiles import StateTiles

WIDTH, HEADS, DQK, DV = 5, 2, 3, 4
LENGTHS = [0, 1, 7, 8, 9, 0, 26]


@dataclass(frozen=True)
class Batch:
    domains: Tensor
    targets: Tensor
    times: Tensor
    next_times: Tensor
    offsets: Tensor
    num_domains: int
    num_states: int

    def reads(self, height: int | None) -> StateReads:
        grouping = DomainGrouping.from_jagged(self.domains, self.offsets, self.num_domains)
        return reads_in_tiles(grouping, self.times, self.next_times, self.num_states, height)

    def tiles(self, height: int | None) -> StateTiles:
        return self.reads(height).tiles

    def index(self) -> Tensor:
        return last_state_index(self.domains, self.offsets, self.num_domains, self.num_states)

    def ages(self) -> Tensor:
        return state_age_bucket(self.index(), self.times, self.next_times)


def draw_batch(lengths: list[int], num_domains: int, num_states: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    size = (int(offsets[-1]),)

    def skewed() -> Tensor:
        """Some domains often, some rarely, some never."""
        return (torch.rand(size, generator=generator) ** 2 * num_domains).long()

    times = torch.randint(0, 10_000, size, generator=generator).cumsum(0)
    later = times + torch.randint(0, 100_000, size, generator=generator)
    return Batch(skewed(), skewed(), times, later, offsets, num_domains, num_states)


def draw_module(batch: Batch, width: int = WIDTH, **options: Any) -> DynamicDomainState:
    generator = torch.Generator().manual_seed(1)
    module = DynamicDomainState(
        width, batch.num_domains, HEADS, DQK, DV, states_per_domain=batch.num_states, **options
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


def draw_inputs(batch: Batch, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(2, len(batch.domains), width, generator=generator).double()
    return both[0].requires_grad_(), both[1].requires_grad_()


def by_definition(
    module: DynamicDomainState, batch: Batch, hidden: Tensor, states: Tensor
) -> Tensor:
    """Every token looks up the states of all domains: (L, D, M, H, d) of keys and of values."""
    weight = dict(module.named_parameters())
    query = hidden @ weight["_query.weight"].T
    if "_target_emb.weight" in weight:
        query = query + weight["_target_emb.weight"][batch.targets]
    written = torch.cat([states, weight["_initial_state"]])
    return reference_state_attention(
        query.unflatten(1, (HEADS, DQK)) * DQK**-0.5,
        (written @ weight["_key.weight"].T).unflatten(1, (HEADS, DQK)),
        (written @ weight["_value.weight"].T).unflatten(1, (HEADS, DV)),
        batch.reads(None),
        bias=weight.get("_age_w"),
    ).flatten(1)


def with_gradients(
    answer: Tensor, module: DynamicDomainState, *inputs: Tensor
) -> dict[str, Tensor]:
    direction = torch.arange(answer.numel()).double().cos().view_as(answer).to(answer.dtype)
    leaves = dict(module.named_parameters())
    leaves |= {"hidden": inputs[0], "states": inputs[1]}
    found = torch.autograd.grad((answer * direction).sum(), list(leaves.values()))
    return {"answer": answer.detach(), **dict(zip(leaves, found))}


@pytest.mark.parametrize("num_domains", [1, 2, 7, 60])
@pytest.mark.parametrize("num_states", [1, 2, 4, 8])
@pytest.mark.parametrize("height", [None, 1, 2, 8, 32])
@pytest.mark.parametrize("options", [{}, {"age_bias": False, "query_target_domain": False}])
def test_equals_the_definition(
    num_domains: int, num_states: int, height: int | None, options: dict[str, Any]
) -> None:
    """Lengths 0, 1, T - 1, T, T + 1 and several tiles; the answer and every gradient."""
    batch = draw_batch(LENGTHS, num_domains, num_states)
    module, (hidden, states) = draw_module(batch, **options), draw_inputs(batch)
    answer = module(hidden, states, batch.reads(height), batch.targets)
    found = with_gradients(answer, module, hidden, states)
    plain = by_definition(module, batch, hidden, states)
    for name, expected in with_gradients(plain, module, hidden, states).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=name)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    num_domains, num_states = draw(st.sampled_from([1, 2, 5, 500])), draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(0, 40), max_size=4))
    return draw_batch(lengths, num_domains, num_states, draw(st.integers(0, 1000)))


@given(batches(), st.sampled_from([None, 1, 3, 8, 16, 64]))
def test_what_each_token_sees(batch: Batch, height: int | None) -> None:
    """The states of the definition with their ages, each of them once."""
    tiles, length = batch.tiles(height), len(batch.domains)
    flat = (
        tiles.rows.unsqueeze(1).expand(tiles.unseen.shape).flatten(0, 1)[tiles.slots],
        tiles.ages.long().flatten(0, 1)[tiles.slots],
        tiles.unseen.flatten(0, 1)[tiles.slots],
    )
    found = [sorted(zip(r[~u].tolist(), a[~u].tolist())) for r, a, u in zip(*flat)]
    index = batch.index()
    initial = length + torch.arange(batch.num_domains).view(1, -1, 1)
    rows = torch.where(index < 0, initial, index)
    kept = (index >= 0) | (torch.arange(batch.num_states) == 0)
    each = zip(rows, batch.ages(), kept)
    assert found == [sorted(zip(r[k].tolist(), a[k].tolist())) for r, a, k in each]
    assert (tiles.ages == NUM_TIME_BUCKETS + 1).equal(tiles.unseen)


@given(batches(), st.sampled_from([None, 1, 3, 16]))
def test_every_place_of_a_tile_sees_something(batch: Batch, height: int | None) -> None:
    """Padding too: a softmax over nothing would be NaN, and its gradient with it."""
    assert not batch.tiles(height).unseen.all(2).any()


def test_tiles_hold_tokens_of_one_user_and_all_tokens() -> None:
    batch = draw_batch(LENGTHS, 3, 2)
    tiles = batch.tiles(8)
    users = torch.repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(users[tiles.tokens], users[tiles.tokens[:, :1]].expand(-1, 8))
    assert torch.equal(tiles.tokens.flatten()[tiles.slots], torch.arange(sum(LENGTHS)))
    assert len(tiles.tokens) == sum(-(-length // 8) for length in LENGTHS)


def test_the_height_suits_the_histories() -> None:
    """Short histories are one tile each without padding; long ones are cut."""
    short = draw_batch([17] * 8, 4, 4).tiles(None)
    assert short.tokens.shape == (8, 17)
    assert short.rows.shape == (8, 4 + 17), "nothing but initial states to carry in"
    long = draw_batch([230] * 4, 7, 4).tiles(None)
    assert 8 <= long.tokens.shape[1] <= 32
    many = draw_batch([500], 500, 1).tiles(None)
    assert many.tokens.shape[1] >= 32


def test_gradients_are_derivatives() -> None:
    batch = draw_batch([9, 0, 2], 3, 2)
    module, (hidden, states) = draw_module(batch), draw_inputs(batch)
    reads, names = batch.reads(4), [name for name, _ in module.named_parameters()]

    def run(hidden: Tensor, states: Tensor, *parameters: Tensor) -> Tensor:
        arguments = hidden, states, reads, batch.targets
        return torch.func.functional_call(module, dict(zip(names, parameters)), arguments)

    assert torch.autograd.gradcheck(run, (hidden, states, *module.parameters()))


@pytest.mark.parametrize(("num_domains", "num_states"), [(7, 4), (300, 1)])
def test_float32_keeps_its_digits(num_domains: int, num_states: int) -> None:
    """Row by row within 1e-5 of float64, gradients that sum over all tokens within 2e-5."""
    batch = draw_batch([230, 190, 3], num_domains, num_states)
    module, (hidden, states) = draw_module(batch), draw_inputs(batch)
    answer = module(hidden, states, batch.reads(None), batch.targets)
    expected = with_gradients(answer, module, hidden, states)
    module.float()
    low = hidden.detach().float().requires_grad_(), states.detach().float().requires_grad_()
    answer = module(*low, batch.reads(None), batch.targets)
    for name, found in with_gradients(answer, module, *low).items():
        error = (found.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-5 if name == "answer" else 2e-5), name


def test_bfloat16_under_autocast() -> None:
    batch = draw_batch([50, 20], 5, 3)
    module, (hidden, states) = draw_module(batch, width=16), draw_inputs(batch, width=16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    answer = module(hidden, states, batch.reads(8), batch.targets)
    expected = with_gradients(answer, module, hidden, states)
    module.float()
    low = hidden.detach().float().requires_grad_(), states.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        answer = module(*low, batch.reads(8), batch.targets)
    assert answer.dtype == torch.bfloat16
    for name, found in with_gradients(answer, module, *low).items():
        error = (found.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, name


def test_tiles_share_no_gradient_through_padding() -> None:
    """A state that only padding could read has none; all others' are finite."""
    batch = draw_batch([9, 3], 2, 1)
    module, (hidden, states) = draw_module(batch), draw_inputs(batch)
    answer = module(hidden, states, batch.reads(8), batch.targets)
    read = with_gradients(answer[:9], module, hidden, states)
    assert not read["states"][9:].any()
    assert not read["hidden"][9:].any()
    assert all(gradient.isfinite().all() for gradient in read.values())


def test_states_must_be_as_many_as_the_layout_holds() -> None:
    batch = draw_batch([9], 2, 2)
    module, inputs = draw_module(batch), draw_inputs(batch)
    with pytest.raises(AssertionError):
        module(*inputs, replace(batch, num_states=3).reads(None), batch.targets)
