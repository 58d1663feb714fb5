"""The interest stage: formulas, switches that start as the model without them, gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hstu_xd.errors import InputError
from hstu_xd.interest import DIN, TIN, HSTUPooling, InterestSettings, MeanPool, SideInformationTIN
from hstu_xd.interest.positions import gap_buckets
from hstu_xd.ranking.model import ItemVectors

N, C, K, D, GOALS = 3, 4, 6, 5, 2


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(N, K, generator=draw) < 0.7
    mask[1] = False
    return {
        "candidates": torch.randn(N, C, D, generator=draw, dtype=dtype),
        "events": torch.randn(N, K, D, generator=draw, dtype=dtype),
        "mask": mask,
        "buckets": torch.randint(1, 30, (N, K), generator=draw),
        "goals": torch.tensor([1, 0, -1]),
    }


def tin(seed: int = 0, dtype: torch.dtype = torch.float64, **switches: Any) -> TIN:
    torch.manual_seed(seed)
    settings = InterestSettings(**switches)
    return TIN(D, settings, places=K, goals=GOALS, std=0.5).to(dtype)


def side(*groups: str, dtype: torch.dtype = torch.float64, **switches: Any) -> SideInformationTIN:
    torch.manual_seed(0)
    settings = InterestSettings(groups=groups, **switches)
    fields = {"item": 2, "type": 1, "aisle": 2}
    return SideInformationTIN(fields, settings, places=K, goals=GOALS, std=0.5).to(dtype)


def pooling() -> HSTUPooling:
    torch.manual_seed(0)
    return HSTUPooling(D, InterestSettings(kind="hstu"), places=K, std=0.5).double()


MODULES = {
    "tin": tin,
    "goals": lambda: tin(goal_positions="additive"),
    "hop": lambda: tin(order=4),
    "dense": lambda: tin(order=3, form="dense"),
    "plain": lambda: tin(rank_encoding=False, gap_encoding=False, target_product=False),
    "groups": lambda: side("item", "type+aisle", "all"),
    "din": lambda: DIN(D, 7).double(),
    "mean": lambda: MeanPool(D).double(),
    "hstu": lambda: pooling(),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def test_tin_is_its_formula() -> None:
    model, given = tin(), inputs()
    tables = model.positions.tables
    found = model(**given)
    for n in range(N):
        own = tables["rank"][0] + tables["gap"][0]
        keys = [
            given["events"][n, k] + tables["rank"][k + 1] + tables["gap"][given["buckets"][n, k]]
            for k in range(K)
            if given["mask"][n, k]
        ]
        for c in range(C):
            query = given["candidates"][n, c] + own
            u = torch.zeros(D, dtype=torch.float64)
            if keys:
                weights = torch.stack([query @ key / D**0.5 for key in keys]).softmax(0)
                u = sum(weight * key for weight, key in zip(weights, keys, strict=True))
            wanted = torch.cat([u, u * query, given["candidates"][n, c]])
            torch.testing.assert_close(found[n, c], wanted, rtol=1e-12, atol=1e-12)


def test_din_is_its_formula() -> None:
    model, given = MODULES["din"](), inputs()
    found = model(**given)
    whole = nn.Linear(4 * D, 7).double()
    a, b, c = model.of_target.weight, model.of_event.weight, model.of_product.weight
    # a (q) + b (k) is what [q, k, q - k] gives: any weights of the difference join the two.
    whole.weight.data = torch.cat([a, b, torch.zeros_like(a), c], 1)
    whole.bias.data = model.of_target.bias.data
    q, k = given["candidates"][0, 1], given["events"][0]
    read = torch.cat([q.expand_as(k), k, q - k, q * k], 1)
    weights = model.last(whole(read))[:, 0] * given["mask"][0]
    torch.testing.assert_close(found[0, 1], torch.cat([weights @ k, q]), rtol=1e-12, atol=1e-12)


def test_pooling_is_its_formula() -> None:
    """Without a softmax: the candidate's gate, and the norm of a sum over those that are there."""
    model, given = pooling(), inputs()
    tables, found = model.positions.tables, pooling()(**given)

    def normed(x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-6).sqrt()

    gates, queries = model.of_target.weight.chunk(2)
    keys, values = model.of_event.weight.chunk(2)
    for n in (0, 2):
        for c in range(C):
            target = normed(given["candidates"][n, c] + tables["rank"][0] + tables["gap"][0])
            read = torch.zeros(D, dtype=torch.float64)
            for k in given["mask"][n].nonzero()[:, 0].tolist():
                place = tables["rank"][k + 1] + tables["gap"][given["buckets"][n, k]]
                event = normed(given["events"][n, k] + place)
                likeness = silu(queries @ target) @ silu(keys @ event)
                read += silu(likeness) / K * silu(values @ event)
            wanted = model.last.weight @ (silu(gates @ target) * normed(read))
            torch.testing.assert_close(found[n, c, :D], wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[..., D:], given["candidates"])


def test_mean_is_the_mean() -> None:
    given = inputs()
    found = MeanPool(D)(**given)
    wanted = given["events"][0][given["mask"][0]].mean(0)
    torch.testing.assert_close(found[0, 2, :D], wanted)
    assert (found[1, :, :D] == 0).all()


def test_padding_counts_for_nothing(module: nn.Module) -> None:
    given = inputs()
    before = module(**given)
    given["events"][~given["mask"]] = 1e3
    given["buckets"][~given["mask"]] = 3
    assert torch.equal(module(**given), before)
    assert torch.equal(before[1, :, :D], torch.zeros(C, D, dtype=torch.float64))


def test_a_group_is_what_it_is_alone(module: nn.Module) -> None:
    given = inputs()
    alone = module(**{name: value[2:] for name, value in given.items()})
    torch.testing.assert_close(module(**given)[2:], alone, rtol=1e-12, atol=1e-12)


def test_candidates_do_not_see_each_other(module: nn.Module) -> None:
    """Events that all candidates share give what events of each one's own would."""
    given = inputs()
    own = {
        "candidates": given["candidates"].flatten(0, 1).unsqueeze(1),
        **{
            name: given[name].repeat_interleave(C, 0)
            for name in ("events", "mask", "buckets", "goals")
        },
    }
    shared = module(**given).flatten(0, 1)
    torch.testing.assert_close(module(**own)[:, 0], shared, rtol=1e-12, atol=1e-12)


def test_gradients_are_right(module: nn.Module) -> None:
    given = inputs()
    candidates = given.pop("candidates").requires_grad_()
    events = given.pop("events").requires_grad_()

    def run(candidates: Tensor, events: Tensor, *_: Tensor) -> Tensor:
        return module(candidates=candidates, events=events, **given)

    assert torch.autograd.gradcheck(run, (candidates, events, *module.parameters()))


@pytest.mark.parametrize("form", ["hop", "dense"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_first_order_of_a_stack_is_tin(form: str, order: int) -> None:
    given = inputs(torch.float32)
    plain, stacked = (tin(dtype=torch.float32, order=n, form=form) for n in (1, order))
    assert torch.equal(stacked(**given)[..., : 2 * D], plain(**given)[..., : 2 * D])
    assert stacked(**given).shape[-1] == stacked.out_features == D * (2 * order + 1)


def test_dense_orders_are_powers_of_the_candidate() -> None:
    """Without norms, with W = I and even weights, order L grows by the L-th power."""
    settings = InterestSettings(
        order=4, form="dense", norm=False, rank_encoding=False, gap_encoding=False
    )
    model = TIN(D, settings, places=K, goals=GOALS, std=0.5).double()
    for linear in model.maps:
        linear.weight.data = torch.eye(D).double()
    given = inputs()
    given["mask"] = torch.zeros_like(given["mask"])
    given["mask"][:, 0] = True  # one event: its weight is 1 whatever the candidate is
    one, three = model(**given), model(**given | {"candidates": 3 * given["candidates"]})
    for order in range(4):
        part = slice(2 * order * D, (2 * order + 1) * D)
        torch.testing.assert_close(three[..., part], 3**order * one[..., part])


def test_items_have_the_same_vectors_and_gradients_in_training() -> None:
    """There all levels are one look-up, elsewhere one each."""
    paths = np.array([[-1, -1, -1], [0, 2, 0], [1, -1, 1], [2, 0, 0], [3, 1, -1]])
    known = np.array([False, True, False, True, True])
    vectors = ItemVectors(paths, known, item_width=4, level_width=4, std=1.0)
    items, noise, found = torch.tensor([[1, 4, 0], [2, 3, 1]]), torch.randn(2, 3, 12), []
    for training in (True, False):
        vectors.train(training).zero_grad()
        read = vectors(items)
        (read * noise).sum().backward()
        found.append([read, *(p.grad for p in vectors.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_goal_wise_places_start_as_shared_ones() -> None:
    given = inputs(torch.float32)
    shared, own = (tin(dtype=torch.float32, goal_positions=x) for x in ("shared", "additive"))
    before = shared(**given)
    assert torch.equal(own(**given), before)
    for delta in own.positions.deltas.values():
        delta.data[1] += 1
    after = own(**given)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])  # another goal, and no events
    for delta in own.positions.deltas.values():
        delta.data += 1
    assert torch.equal(own(**given)[2], before[2])  # unknown goal


def test_switches_take_away_what_they_say() -> None:
    given = inputs()
    other = given | {"buckets": given["buckets"].roll(1, 1)}
    assert not torch.equal(tin()(**given), tin()(**other))
    assert torch.equal(tin(gap_encoding=False)(**given), tin(gap_encoding=False)(**other))
    assert tin(target_product=False).out_features == 2 * D


def test_one_group_of_all_fields_is_tin() -> None:
    given = inputs(torch.float32)
    for switches in ({}, {"goal_positions": "additive"}, {"target_product": False}):
        plain = tin(dtype=torch.float32, **switches)
        for groups in (("all",), ("item+type+aisle",)):
            one = side(*groups, dtype=torch.float32, **switches)
            assert torch.equal(one(**given), plain(**given))


def test_a_group_weighs_events_by_its_own_fields() -> None:
    """Likeness in another field changes nothing of the weights, but what is read is whole."""
    switches = {"rank_encoding": False, "gap_encoding": False, "target_product": False}
    given, model = inputs(), side("type", **switches)
    found = model(**given)
    weights = (given["candidates"][0, 1, 2] * given["events"][0, :, 2]).masked_fill(
        ~given["mask"][0], -torch.inf
    )
    torch.testing.assert_close(found[0, 1, :D], weights.softmax(0) @ given["events"][0])
    given["candidates"][..., [0, 1, 3, 4]] += 1
    torch.testing.assert_close(model(**given)[..., :D], found[..., :D])


def test_as_many_alike_have_as_many_parameters() -> None:
    sizes = {
        groups: sum(p.numel() for p in side(*groups).parameters())
        for groups in (("item", "type", "all"), ("all", "all", "all"))
    }
    assert len(set(sizes.values())) == 1
    assert side("all", "all").out_features == 5 * D


def test_groups_are_checked() -> None:
    for groups, message in (
        (("item+tipe",), r"'tipe', which is no field .did you mean 'type'.*item, type, aisle"),
        (("",), "no field"),
        (("type+type",), "names 'type' twice"),
    ):
        with pytest.raises(InputError, match=message):
            side(*groups)
    with pytest.raises(InputError, match="a stack has one TIN a layer"):
        InterestSettings(groups=("all",), order=2)


def test_gaps_are_on_a_scale_of_powers_of_two() -> None:
    gaps = torch.tensor([1, 2, 3, 6, 7, 2**50])
    assert gap_buckets(gaps).tolist() == [1, 1, 2, 2, 3, 40]


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"xd_interest.order = 5; it must be at most 4"):
        InterestSettings(order=5)
    with pytest.raises(InputError, match="one of none, mean, din, tin, hstu"):
        InterestSettings(kind="sasrec")
