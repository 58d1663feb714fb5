"""Soft search: against its definition, in chunks, where gradients go, what every control shares."""

import math

import pytest
import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.search import soft
from hstu_xd.search.soft import TABLES, Requests, SoftSearch

SIZES = (50, 6)


def draw(lengths: list[int], candidates: list[int], seed: int = 0) -> Requests:
    generator = torch.Generator().manual_seed(seed)
    total, asked = sum(lengths), sum(candidates)

    def ids(count: int) -> Tensor:
        columns = [torch.randint(size, (count,), generator=generator) for size in SIZES]
        return torch.stack(columns, 1)

    return Requests(
        ids(total),
        torch.randint(1, 10**6, (total,), generator=generator),
        torch.tensor([0, *lengths]).cumsum(0),
        ids(asked),
        torch.tensor([0, *candidates]).cumsum(0),
    )


def scores_by_definition(model: SoftSearch, requests: Requests, q: int, i: int) -> Tensor:
    """<A(c), A(i)> / sqrt(a) + <A_time(0), A_time(b)> / sqrt(a_time) of one pair, no "four"."""

    tables = getattr(model, "attention", model.representation)

    def embedded(ids: Tensor) -> Tensor:
        rows = torch.cat([t[0].weight[x] for t, x in zip(tables, ids)])
        return model.projection(rows) if hasattr(model, "projection") else rows

    a, b = embedded(requests.candidates[q]), embedded(requests.events[i])
    bucket = 1 + math.floor(math.log2(int(requests.gaps[i])))
    times = model.times.weight
    return a @ b / math.sqrt(len(a)) + times[0] @ times[bucket] / math.sqrt(times.shape[1])


@pytest.mark.parametrize("tables", ["decoupled", "shared", "projection"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_search_and_features_equal_the_definition(
    tables: str, dtype: torch.dtype, tolerance: float
) -> None:
    requests, k = draw([9, 0, 40, 3], [3, 2, 4, 0]), 5
    model = SoftSearch(SIZES, width=8, tables=tables).to(dtype)
    found = model.search(requests, k)
    features = model(requests, found)
    offsets, asked = requests.offsets.tolist(), requests.candidate_offsets.tolist()
    for b in range(4):
        for q in range(asked[b], asked[b + 1]):
            events = range(offsets[b], offsets[b + 1])
            scores = torch.tensor(
                [scores_by_definition(model, requests, q, i).item() for i in events], dtype=dtype
            )
            order = scores.argsort(descending=True)[:k]
            mine = [i for i in found[q].tolist() if i >= 0]
            # Indices may change places within a tie.
            torch.testing.assert_close(
                scores[torch.tensor(mine, dtype=torch.long) - offsets[b]],
                scores[order],
                atol=tolerance if dtype == torch.float32 else 1e-6,
                rtol=0,
            )
            values = model.represent(requests.events[order + offsets[b]], is_candidate=False)
            read = scores[order].softmax(0) @ values
            candidate = model.represent(requests.candidates[q : q + 1], is_candidate=True)[0]
            expected = torch.cat([candidate, read, read * candidate])
            torch.testing.assert_close(features[q], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks_change_nothing(tables: str, chunk: int) -> None:
    requests = draw([70, 0, 33], [4, 1, 2])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = SoftSearch(SIZES, width=8, tables=tables).to(dtype)
        dense, chunked = model.search(requests, 6), model.search(requests, 6, chunk=chunk)
        assert torch.equal(dense < 0, chunked < 0)
        a, b = model(requests, dense), model(requests, chunked)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_everything_found_reads_what_the_auxiliary_features_read() -> None:
    requests = draw([12, 0, 5], [2, 2, 3])
    model = SoftSearch(SIZES, width=4).double()
    found = model.search(requests, 12)
    of_found, of_all = model.learn(requests, 12)
    torch.testing.assert_close(model(requests, found), of_all)
    torch.testing.assert_close(of_found, of_all)


@pytest.mark.parametrize("at_once", [1, 12, 1000])
@pytest.mark.parametrize("tables", TABLES)
def test_what_is_learned_from_is_what_is_found_later(
    tables: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the events in training gives the numbers of a search and a reading after it."""
    monkeypatch.setattr(soft, "LEARNED_AT_ONCE", at_once)
    requests, gradients = draw([9, 0, 40, 3], [3, 2, 4, 0]), []
    assert len(requests.parts(at_once)) == {1: 3, 12: 2, 1000: 1}[at_once]
    model = SoftSearch(SIZES, width=8, tables=tables).double()
    read = model(requests, model.search(requests, 5))
    of_found, of_all = model.learn(requests, 5)
    torch.testing.assert_close(of_found, read, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(of_found, of_all)
    noise = torch.randn(read.shape, dtype=read.dtype)
    for features in (read, of_found):
        model.zero_grad()
        (features * noise).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 12])
def test_parts_are_requests_of_their_own(at_once: int) -> None:
    requests = draw([9, 0, 40, 3], [3, 2, 4, 0])
    model, first, found = SoftSearch(SIZES, width=4), 0, []
    for part in requests.parts(at_once):
        assert part.offsets[0] == part.candidate_offsets[0] == 0
        own = model.search(part, 5)
        found.append(torch.where(own >= 0, own + first, -1))
        first += len(part.events)
    assert torch.equal(torch.cat(found), model.search(requests, 5))


def test_tables_learn_from_their_own_side_only() -> None:
    requests = draw([12, 5], [2, 3])
    model = SoftSearch(SIZES, width=4, attention_width=2)
    for way in range(3):
        model.zero_grad()
        features = (model(requests, model.search(requests, 4)), *model.learn(requests, 4))[way]
        features.square().sum().backward()
        for tables in (model.attention, model.representation):
            assert all(x.grad is not None and x.grad.any() for x in tables.parameters())
        assert model.times.weight.grad is not None
        assert model.times.weight.grad.any()


def test_gradients_are_right() -> None:
    requests = draw([6, 2], [2, 1])
    model = SoftSearch(SIZES, width=2).double()
    found = model.search(requests, 3)
    weights = [x.detach().requires_grad_() for x in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (requests, found))

    assert torch.autograd.gradcheck(run, weights)


def test_number_of_tables() -> None:
    counts = {
        name: len(list(SoftSearch(SIZES, width=4, tables=name).parameters())) for name in TABLES
    }
    assert counts == {"decoupled": 5, "shared": 3, "projection": 4, "four": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": "share"}, "did you mean 'shared'"),
        ({"tables": "shared", "attention_width": 2}, "attention_width is 2 with shared tables"),
    ],
)
def test_wrong_tables_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftSearch(SIZES, width=4, **options)


def test_wrong_counts_are_refused() -> None:
    model = SoftSearch(SIZES, width=4)
    with pytest.raises(InputError, match="k is 0"):
        model.search(draw([3], [1]), 0)
    with pytest.raises(InputError, match="chunk is 0"):
        model.search(draw([3], [1]), 1, chunk=0)
