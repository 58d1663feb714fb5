"""The sampled softmax against its formula, and where its negatives come from."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.objectives import sampled_softmax
from hstu_xd.objectives.retrieval import sample_negatives
from hstu_xd.objectives.sampled_softmax import count_per_domain, sampled_softmax_loss


@pytest.fixture
def model() -> CrossDomainHSTU:
    torch.manual_seed(0)
    domains = torch.randint(3, (61,))
    settings = EncoderSettings(
        num_domains=3, norm_length=9, embedding_dim=8, num_heads=2, dqk=4, dv=4
    )
    return CrossDomainHSTU(DomainCatalog(domains, ["a", "b", "c"]), settings)


@pytest.mark.parametrize("scope", ["domain", "catalogue"])
@pytest.mark.parametrize("num_negatives", [5, 1000])
def test_loss_equals_the_formula(model: CrossDomainHSTU, scope: str, num_negatives: int) -> None:
    catalog = model.catalog
    negatives = sample_negatives(
        catalog, num_negatives, torch.Generator().manual_seed(1), scope=scope
    )
    targets = torch.randint(1, 61, (40,))
    users = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    loss = sampled_softmax_loss(model, users, targets, negatives, temperature=0.05)
    expected = 0.0
    for user, target in zip(users, targets.tolist()):
        pool = negatives[
            0 if scope == "catalogue" else int(catalog.domain_of(torch.tensor(target)))
        ]
        if scope == "domain":
            assert torch.equal(
                catalog.domain_of(pool).unique(), catalog.domain_of(torch.tensor([target]))
            )
        items = torch.cat([torch.tensor([target]), pool[pool != target]])
        logits = model.item_vectors(items) @ user / 0.05
        expected += float((logits.logsumexp(0) - logits[0]).detach())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


class DoubleItems:
    """Item vectors in the precision of their table, as the model's are in float32."""

    def __init__(self, model: CrossDomainHSTU, dtype: torch.dtype) -> None:
        self.catalog = model.catalog
        table = model.state_dict()["_embedding_module._item_emb.weight"]
        self.table = table.to(dtype).requires_grad_()

    def item_vectors(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.table[ids], dim=-1)


def computed(
    model: CrossDomainHSTU,
    users: torch.Tensor,
    targets: torch.Tensor,
    negatives: list[torch.Tensor],
    weights: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Three times the loss, with its gradients of user vectors and of the table."""
    items, users = DoubleItems(model, torch.float32), users.clone().requires_grad_()
    loss = 3 * sampled_softmax_loss(
        items,  # type: ignore[arg-type]
        users,
        targets,
        negatives,
        temperature=0.05,
        weights=weights,
    )
    loss.backward()
    assert users.grad is not None
    assert items.table.grad is not None
    return [loss.detach(), users.grad, items.table.grad]


@pytest.mark.parametrize("scope", ["domain", "catalogue"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scores_of_a_block", [1, 40, 2**18])
def test_gradients_equal_those_of_the_formula(
    model: CrossDomainHSTU,
    scope: str,
    weighted: bool,
    scores_of_a_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of a gradient that are not near zero, against the formula's in float64."""
    monkeypatch.setattr(sampled_softmax, "_CACHED_SCORES", scores_of_a_block)
    negatives = sample_negatives(model.catalog, 9, torch.Generator().manual_seed(1), scope=scope)
    targets = torch.randint(1, 61, (40,))
    start = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    weights = torch.rand(40) if weighted else None
    loss, *gradients = computed(model, start, targets, negatives, weights)

    right, right_users = DoubleItems(model, torch.float64), start.double().requires_grad_()
    domains = model.catalog.domain_of(targets) if scope == "domain" else 0 * targets
    expected = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        pool = negatives[int(domains[row])]
        pool = torch.cat([torch.tensor([target]), pool[pool != target]])
        logits = right.item_vectors(pool) @ right_users[row] / 0.05
        weight = 1.0 if weights is None else float(weights[row])
        expected = expected - weight * logits.log_softmax(0)[0]
    (3 * expected).backward()

    assert loss.item() == pytest.approx(3 * expected.item(), rel=1e-5)
    for found, truth in zip(gradients, (right_users.grad, right.table.grad)):
        assert truth is not None
        error = (found - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-2 * truth.norm())
        assert float(error.max()) <= 2e-5


@pytest.mark.parametrize("scores_of_a_block", [60, 2**18])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_small_domains_share_blocks(
    scores_of_a_block: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty domains of up to nine items, some without a target, against one after the other."""
    draw = torch.Generator().manual_seed(0)
    domains = torch.cat([torch.arange(60), torch.randint(60, (141,), generator=draw)])
    catalog = DomainCatalog(domains, [str(number) for number in range(60)])
    settings = EncoderSettings(num_domains=60, norm_length=9, embedding_dim=8)
    model = CrossDomainHSTU(catalog, settings)
    targets = torch.randint(1, 120, (150,), generator=draw)
    negatives = sample_negatives(catalog, 3, draw, scope="domain")
    start = torch.nn.functional.normalize(torch.randn(150, 8, generator=draw), dim=1)
    weights = torch.rand(150, generator=draw) if weighted else None
    monkeypatch.setattr(sampled_softmax, "_CACHED_SCORES", scores_of_a_block)

    shared: list[int] = []
    whole = sampled_softmax._softmax_of_pools

    def noting(pools: Any, *given: Any) -> torch.Tensor:
        shared.append(len(pools))
        return whole(pools, *given)

    monkeypatch.setattr(sampled_softmax, "_softmax_of_pools", noting)
    given = model, start, targets, negatives, weights
    together = computed(*given)
    assert bool(shared) == (scores_of_a_block > 60)
    monkeypatch.setattr(sampled_softmax, "_FEWEST_POOLS", 1000)
    for found, expected in zip(together, computed(*given)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_small_domain_is_taken_whole(model: CrossDomainHSTU) -> None:
    negatives = sample_negatives(model.catalog, 1000, torch.Generator(), scope="domain")
    for domain, items in enumerate(negatives):
        assert torch.equal(items, model.catalog.items_of(domain))


def test_same_seed_draws_the_same(model: CrossDomainHSTU) -> None:
    first, again = (
        sample_negatives(model.catalog, 4, torch.Generator().manual_seed(3), scope="domain")
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_domain_of_one_item_has_no_loss_and_finite_gradients() -> None:
    torch.manual_seed(0)
    catalog = DomainCatalog(torch.tensor([0, 0, 1, 1, 1]), ["lonely", "rest"])
    settings = EncoderSettings(num_domains=2, norm_length=9)
    model = CrossDomainHSTU(catalog, settings)
    negatives = sample_negatives(catalog, 10, torch.Generator(), scope="domain")
    users = torch.nn.functional.normalize(torch.randn(2, 64), dim=1).requires_grad_()
    loss = sampled_softmax_loss(model, users, torch.tensor([1, 1]), negatives, temperature=0.05)
    loss.backward()
    assert loss.item() == 0
    assert users.grad is not None
    assert bool(torch.isfinite(users.grad).all())


class NothingIsReadBack(TorchDispatchMode):
    """Refuses operators whose result's value or shape a host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"}
        if name in {"index", "index_put_"}:
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_device(model: CrossDomainHSTU) -> None:
    """With the counts at hand; the draws themselves are the host's."""
    catalog = model.catalog
    targets = torch.randint(1, 61, (40,))
    counts = count_per_domain(catalog.domain_of(targets), 3)
    users = torch.nn.functional.normalize(torch.randn(40, 8), dim=1).requires_grad_()
    negatives = sample_negatives(catalog, 5, torch.Generator().manual_seed(1), scope="domain")
    plain = sampled_softmax_loss(model, users, targets, negatives, temperature=0.05)
    with NothingIsReadBack():
        loss = sampled_softmax_loss(
            model, users, targets, negatives, temperature=0.05, targets_per_domain=counts
        )
        loss.backward()
    assert loss.item() == plain.item()
