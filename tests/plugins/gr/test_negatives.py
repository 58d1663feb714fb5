"""Negatives come from the positive's own domain, uniformly, normalised as upstream does."""

from typing import Any

import pytest
import torch
from torch import nn
from upstream_models import CATALOG, DOMAINS, NUM_ITEMS, WIDTH

from hstu_xd.plugins.gr.research import domain_batches


def local(**others: Any) -> nn.Module:
    torch.manual_seed(3)
    return domain_batches.DomainLocalNegativesSampler(
        catalog=CATALOG,
        num_items=NUM_ITEMS,
        item_emb=nn.Embedding(NUM_ITEMS + 1, WIDTH),
        all_item_ids=list(range(1, NUM_ITEMS + 1)),
        l2_norm=True,
        l2_norm_eps=1e-6,
        **others,
    )


def in_batch(ids: torch.Tensor) -> nn.Module:
    table = nn.Embedding(NUM_ITEMS + 1, WIDTH)
    sampler = domain_batches.DomainInBatchNegativesSampler(
        catalog=CATALOG, l2_norm=True, l2_norm_eps=1e-6, dedup_embeddings=True
    )
    sampler.process_batch(ids=ids, presences=ids != 0, embeddings=table(ids))
    return sampler


def test_local_negatives_are_uniform_over_the_domain() -> None:
    positives = torch.tensor([[1, 2], [3, 0]])
    ids, vectors = local()(positives, 30_000)
    assert ids.shape == (2, 2, 30_000)
    assert vectors.shape == (2, 2, 30_000, WIDTH)
    torch.testing.assert_close(vectors[0, 0, :50].norm(dim=1), torch.ones(50))
    for row, column, positive in ((0, 0, 1), (0, 1, 2), (1, 0, 3)):
        drawn, counts = ids[row, column].unique(return_counts=True)
        assert drawn.tolist() == CATALOG.items_of(positive % DOMAINS).tolist()
        assert (counts - 1500).abs().max() < 6 * 1500**0.5


def test_in_batch_negatives_are_the_batchs_items_of_the_domain() -> None:
    ids = torch.tensor([1, 4, 7, 4, 2, 0, 5, 9])
    sampler = in_batch(ids)
    sampled, vectors = sampler(torch.tensor([1, 2, 9]), 400)
    assert [set(row.tolist()) for row in sampled] == [{1, 4, 7}, {2, 5}, {9}]
    cached = dict(zip(sampler._cached_ids.tolist(), sampler._cached_embeddings))
    assert all(torch.equal(v, cached[int(i)]) for i, v in zip(sampled[0, :9], vectors[0, :9]))


def test_padding_positives_draw_something_valid() -> None:
    sampled, _ = in_batch(torch.tensor([2, 5, 0]))(torch.tensor([0, 2]), 50)
    assert set(sampled.flatten().tolist()) <= {2, 5}


@pytest.mark.parametrize("sampler", [local(), in_batch(torch.tensor([1, 2]))])
def test_gradients_reach_the_item_table_and_the_name_tells(sampler: nn.Module) -> None:
    _, vectors = sampler(torch.tensor([1, 2]), 4)
    assert vectors.requires_grad
    assert sampler.debug_str().endswith("-domain")
