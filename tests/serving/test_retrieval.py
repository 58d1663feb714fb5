"""The best items of a domain: exactly in blocks, or by an index that never gives too few."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving import EncoderSession, retrieval
from hstu_xd.serving.retrieval import ItemIndex

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None,
    reason="no faiss here: approximate retrieval is NOT covered",
)
ITEMS, HOLE = 6000, 17


@pytest.fixture(scope="module")
def model() -> CrossDomainHSTU:
    """Domain 0 has every third item, domain 1 the others, domain 2 none; one id has no item."""
    torch.manual_seed(0)
    domains = (torch.arange(ITEMS + 1) % 3 > 0).long()
    domains[HOLE] = -1
    catalog = DomainCatalog(domains, ["few", "many", "none"])
    settings = EncoderSettings(num_domains=3, norm_length=50, embedding_dim=8, num_blocks=1)
    return CrossDomainHSTU(catalog, settings).eval()


@pytest.fixture
def vector() -> Tensor:
    return normalize(torch.randn(8), dim=0)


def by_sorting(
    model: CrossDomainHSTU, vector: Tensor, domain: int, k: int, excluded: Tensor | None
) -> list[tuple[int, float]]:
    """The definition: score all that is allowed, sort, cut."""
    items = model.catalog.items_of(domain)
    if excluded is not None:
        items = items[~torch.isin(items, excluded)]
    scores = (model.item_vectors(items) @ vector).tolist()
    return sorted(zip(items.tolist(), scores), key=lambda pair: -pair[1])[:k]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [score for _, score in found] == pytest.approx([s for _, s in expected], abs=1e-6)


def drawn_excluded(number: int) -> Tensor:
    """Items of all domains, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(HOLE + 1, ITEMS + 1, (number,), generator=generator)


@pytest.mark.parametrize("block", [7, 1000, 1 << 20])
@pytest.mark.parametrize(("domain", "k"), [(0, 1), (0, 30), (1, 30), (1, 9999), (2, 5)])
@torch.no_grad()
def test_blocks_give_what_sorting_gives(
    model: CrossDomainHSTU,
    vector: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    domain: int,
    k: int,
) -> None:
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    index = ItemIndex(model)
    best = torch.tensor([item for item, _ in by_sorting(model, vector, domain, 20, None)] * 2)
    for excluded in (None, drawn_excluded(500), best.long()):
        found = index.best(vector, domain, k, excluded)
        same(found, by_sorting(model, vector, domain, k, excluded))


@pytest.fixture
def indexed(model: CrossDomainHSTU, monkeypatch: pytest.MonkeyPatch) -> ItemIndex:
    """Small domains get an index, whatever is asked for; "few" is one of them, as is "many"."""
    monkeypatch.setattr(retrieval, "_INDEXED_FROM", 1000)
    monkeypatch.setattr(retrieval, "_LARGEST_SHARE", 1.0)
    with torch.no_grad():
        return ItemIndex(model, "approximate")


@pytest.fixture
def no_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def exactly(*_: Any) -> None:
        raise AssertionError("all items were scored")

    monkeypatch.setattr(ItemIndex, "_exactly", exactly)


@needs_faiss
@torch.no_grad()
def test_an_index_gives_allowed_items_with_their_scores(
    model: CrossDomainHSTU, indexed: ItemIndex, no_exact: None
) -> None:
    hits = 0
    for user in normalize(torch.randn(20, 8), dim=1):
        for domain in (0, 1):
            seen = [item for item, _ in by_sorting(model, user, domain, 15, None)]
            excluded = torch.tensor([*seen, *seen, 1, 2])
            found = indexed.best(user, domain, 10, excluded)
            items = [item for item, _ in found]
            assert len(set(items)) == 10
            assert not set(items) & set(excluded.tolist())
            assert set(items) <= set(model.catalog.items_of(domain).tolist())
            scores = [score for _, score in found]
            assert scores == sorted(scores, reverse=True)
            truth = model.item_vectors(torch.tensor(items)) @ user
            assert scores == pytest.approx(truth.tolist(), abs=1e-6)
            best = by_sorting(model, user, domain, 10, excluded)
            hits += len({item for item, _ in best} & set(items))
    assert hits >= 200  # half of the best: a tenth of the items was looked at, not just any


@needs_faiss
@torch.no_grad()
def test_where_an_index_has_too_few_all_items_are_scored(
    model: CrossDomainHSTU, indexed: ItemIndex, vector: Tensor
) -> None:
    for k, excluded in ((1500, None), (9999, drawn_excluded(100)), (5, drawn_excluded(3000))):
        for domain in (0, 1, 2):
            found = indexed.best(vector, domain, k, excluded)
            expected = by_sorting(model, vector, domain, k, excluded)
            assert len(found) == len(expected)
            if k > ITEMS // 10:
                same(found, expected)


@needs_faiss
@torch.no_grad()
def test_small_domains_and_large_requests_are_exact(
    model: CrossDomainHSTU, vector: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_INDEXED_FROM", 2500)
    index = ItemIndex(model, "approximate")
    same(index.best(vector, 0, 10, None), by_sorting(model, vector, 0, 10, None))
    same(index.best(vector, 1, 41, None), by_sorting(model, vector, 1, 41, None))


@needs_faiss
def test_a_session_recommends_by_an_index(
    model: CrossDomainHSTU, monkeypatch: pytest.MonkeyPatch, no_exact: None
) -> None:
    monkeypatch.setattr(retrieval, "_INDEXED_FROM", 1000)
    session = EncoderSession(model, retrieval="approximate")
    session.append(["ann"] * 3, [1, 3, 2], [1, 2, 3])
    (found,) = session.recommend(["ann"], [1], k=5)
    assert len(found) == 5
    assert not {item for item, _ in found} & {1, 2, 3}


def test_an_unknown_kind_is_refused(model: CrossDomainHSTU) -> None:
    with pytest.raises(InputError, match="retrieval is 'hnsw'; one of exact, approximate"):
        EncoderSession(model, retrieval="hnsw")


def test_a_missing_library_is_named(
    model: CrossDomainHSTU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    clear: Callable[[], None] = retrieval.load_faiss.cache_clear
    clear()
    with pytest.raises(InputError, match=r'pip install "hstu-xd\[ann\]"'):
        EncoderSession(model, retrieval="approximate")
    clear()
