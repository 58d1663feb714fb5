"""Rank of each target among all items of its domain, in blocks of bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError

# Scores alive at once (float32: 64 MB), whatever the size of the catalogue.
BLOCK_SCORES = 16_000_000

# Given the (C,) item ids of a domain, a function from (Q, K) user vectors to (Q, C) scores.
Scorer = Callable[[Tensor], Callable[[Tensor], Tensor]]


def dot_product_scorer(item_vectors: Callable[[Tensor], Tensor]) -> Scorer:
    """Scores by the dot product with ``item_vectors(item_ids)``: (C,) int64 -> (C, K) float."""

    def score(items: Tensor) -> Callable[[Tensor], Tensor]:
        vectors = item_vectors(items).T
        return lambda queries: queries @ vectors

    return score


def target_ranks(
    user_vectors: Tensor,
    target_ids: Tensor,
    seen_ids: Tensor,
    seen_offsets: Tensor,
    catalog: DomainCatalog,
    scorer: Scorer,
    *,
    block_scores: int = BLOCK_SCORES,
) -> Tensor:
    """Rank every target among the items of its domain that the user has not seen.

    Candidates are all items of the target's domain, less the seen ones, plus the target itself.
    Ties count against the target: ``rank = #{candidates whose score >= the target's}``.

    Args:
        user_vectors: (Q, K) float, one query a row.
        target_ids: (Q,) int64.
        seen_ids: (E,) int64, items each user has met, end to end; repeats and padding allowed.
        seen_offsets: (Q + 1,) int64.
        catalog: domain of every item, on the device of the tensors.
        scorer: scores users against the items of a domain.
        block_scores: scores held at once, at least one query's row.

    Returns:
        (Q,) int64 ranks from 1.

    Raises:
        HstuXdError: a score is not finite.
    """
    ranks = torch.zeros_like(target_ids)
    domains = catalog.domain_of(target_ids)
    for domain in domains.unique().tolist():
        items = catalog.items_of(domain)
        score = scorer(items)
        queries = torch.nonzero(domains == domain).squeeze(1)
        for rows in queries.split(max(1, block_scores // items.numel())):
            scores = score(user_vectors[rows])
            if not bool(torch.isfinite(scores).all()):
                raise HstuXdError(
                    "scores are not finite: the model has diverged; train again with a lower "
                    "learning rate or take an earlier checkpoint"
                )
            column = torch.searchsorted(items, target_ids[rows]).unsqueeze(1)
            target_scores = scores.gather(1, column)
            row, seen = _seen_columns(rows, seen_ids, seen_offsets, catalog, domain)
            scores[row, seen] = float("-inf")
            scores.scatter_(1, column, target_scores)
            ranks[rows] = (scores >= target_scores).sum(1)
    return ranks


def _seen_columns(
    rows: Tensor, seen_ids: Tensor, seen_offsets: Tensor, catalog: DomainCatalog, domain: int
) -> tuple[Tensor, Tensor]:
    """Row and column of every seen item of the domain in a block of queries."""
    lengths = seen_offsets[rows + 1] - seen_offsets[rows]
    row = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), lengths)
    within = torch.arange(row.numel(), device=rows.device)
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    items = seen_ids[within - first[row] + seen_offsets[rows][row]]
    inside = catalog.domain_of(items) == domain
    return row[inside], torch.searchsorted(catalog.items_of(domain), items[inside])
