"""The sampled softmax: each positive against the negatives of its pool.

Scores are made a block at a time. A large pool's are cut into blocks of its positives; many small
pools are filled up to one size and share a block, or operators would take longer than products.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from hstu_xd.model.hstu import CrossDomainHSTU


def sampled_softmax_loss(
    model: CrossDomainHSTU,
    user_vectors: Tensor,
    target_ids: Tensor,
    negatives: list[Tensor],
    *,
    temperature: float,
    targets_per_domain: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum ``-log softmax`` of the positives against their sampled negatives over tokens.

    A negative that equals the positive is left out of its softmax.

    Args:
        model: gives item vectors and the catalogue.
        user_vectors: (L, K) float, unit vectors.
        target_ids: (L,) int64.
        negatives: of :func:`sample_negatives`.
        temperature: dot products of unit vectors are divided by it.
        targets_per_domain: (D,) numbers of targets, where the host knows them; otherwise they are
            counted, which waits for a GPU.
        weights: (L,) float, what each token counts; default: 1.

    Returns:
        Scalar float32; divide by the number of tokens for the mean.
    """
    if len(negatives) > 1:  # bring the tokens of a domain together
        domains = model.catalog.domain_of(target_ids)
        if targets_per_domain is None:
            targets_per_domain = count_per_domain(domains, len(negatives))
        order = torch.argsort(domains, stable=True)
        user_vectors, target_ids = user_vectors.index_select(0, order), target_ids[order]
        weights = None if weights is None else weights[order]
        counts = list(targets_per_domain)
    else:
        counts = [target_ids.numel()]
    # One look-up: the backward pass of each would write a gradient of the whole table.
    vectors = model.item_vectors(torch.cat([target_ids, *negatives]))
    positives, pools = vectors.split([target_ids.numel(), len(vectors) - target_ids.numel()])
    return _SampledSoftmax.apply(
        user_vectors / temperature, positives, pools, weights, target_ids, negatives, counts
    )


def count_per_domain(domains: Tensor, num_domains: int) -> list[int]:
    """Count how many of (L,) domain ids each domain has: D numbers."""
    return torch.bincount(domains, minlength=num_domains).tolist()


# Scores of a block: on a CPU they fit the cache beside what they are made of.
_CACHED_SCORES, _SCORES_ON_GPU = 2**18, 2**24
# Pools of similar sizes that are filled up to share a block; fewer take turns.
_FEWEST_POOLS = 8
# An id that is behind all others, where a pool is filled up; float64, by way of which it goes
# there, has it exactly.
_NO_ITEM = 2**62


@dataclass(frozen=True)
class _Pool:
    """Positives ``begin:end`` against negatives ``first:last``, whose ids are ``ids``."""

    begin: int
    end: int
    first: int
    last: int
    ids: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of positives and of negatives."""
        return self.end - self.begin, self.last - self.first


class _SampledSoftmax(Function):
    """The loss of :func:`sampled_softmax_loss`, a block of scores after the other.

    A block's gradients are taken together with its loss, while its scores are in the cache: no
    matrix of scores is kept for the backward pass, and each score is exponentiated once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor,
        weights: Tensor | None,
        target_ids: Tensor,
        pool_ids: Sequence[Tensor],
        counts: Sequence[int],
    ) -> Tensor:
        """Sum the losses of (T, K) queries and (T, K) positives, those of each pool together.

        Args:
            ctx: keeps the gradients.
            queries: (T, K) float, the first ``counts[0]`` belong to the first pool, and so on.
            positives: (T, K) float.
            negatives: (R, K) float, pool after pool.
            weights: (T,) float; None: 1.
            target_ids: (T,) int64, ids of the positives.
            pool_ids: ids of the negatives, a tensor a pool.
            counts: queries of each pool.
        """
        vectors = queries, positives, negatives
        # A row more, for what pools are filled up with.
        is_trained = any(ctx.needs_input_grad)
        gradients = [x.new_zeros(len(x) + 1, x.shape[1]) for x in vectors if is_trained]
        total = queries.new_zeros(())
        block = _CACHED_SCORES if queries.device.type == "cpu" else _SCORES_ON_GPU
        for pools in _sharing(_pools(pool_ids, counts), block):
            if len(pools) > 1:
                total += _softmax_of_pools(pools, vectors, weights, target_ids, gradients)
                continue
            (pool,) = pools
            of_pool = slice(pool.first, pool.last)
            size = max(1, block // max(1, pool.ids.numel()))
            for start in range(pool.begin, pool.end, size):
                rows = slice(start, min(start + size, pool.end))
                total += _softmax_of_block(
                    (queries[rows], positives[rows], negatives[of_pool]),
                    None if weights is None else weights[rows],
                    target_ids[rows],
                    pool.ids,
                    [x[y] for x, y in zip(gradients, (rows, rows, of_pool))],
                )
        ctx.save_for_backward(*(x[:-1] for x in gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale what the forward pass has kept."""
        return *(x * grad for x in ctx.saved_tensors), None, None, None, None


def _pools(pool_ids: Sequence[Tensor], counts: Sequence[int]) -> Iterator[_Pool]:
    """Tell which rows each pool with positives has."""
    end = last = 0
    for ids, count in zip(pool_ids, counts):
        begin, first = end, last
        end, last = end + count, last + ids.numel()
        if count:
            yield _Pool(begin, end, first, last, ids)


def _sharing(pools: Iterable[_Pool], block: int) -> list[list[_Pool]]:
    """Put pools together that share a block of at most so many scores; most are alone.

    Those that do are alike in both sizes, up to a factor of two.
    """
    alike: dict[tuple[int, ...], list[_Pool]] = defaultdict(list)
    for pool in pools:
        alike[tuple(size.bit_length() for size in pool.sizes)].append(pool)
    alone, together = [], []
    for some in alike.values():
        height, width = (max(sizes) for sizes in zip(*(pool.sizes for pool in some)))
        shared = block // (height * max(1, width))
        if min(shared, len(some)) < _FEWEST_POOLS:
            alone += [[pool] for pool in some]
        else:
            together += [some[i : i + shared] for i in range(0, len(some), shared)]
    # Losses are summed in the order of the pools, as far as they take turns.
    return sorted(alone, key=lambda pools: pools[0].begin) + together


def _softmax_of_pools(
    pools: Sequence[_Pool],
    vectors: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    target_ids: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """Return the summed losses of pools, each filled up to the largest; write their gradients.

    Args:
        pools: which rows belong together.
        vectors: (T, K) queries, (T, K) positives and (R, K) negatives of all pools.
        weights: (T,) float; None: 1.
        target_ids: (T,) int64.
        gradients: of the vectors, of which the pools' rows are written; empty where none are asked
            for.
    """
    device = target_ids.device
    height, width = (max(sizes) for sizes in zip(*(pool.sizes for pool in pools)))
    bounds = torch.tensor([(x.begin, x.end, x.first, x.last) for x in pools])
    begin, end, first, last = bounds.to(device, non_blocking=True).unsqueeze(2).unbind(1)
    rows, columns = (
        start + torch.arange(size, device=device)
        for start, size in ((begin, height), (first, width))
    )
    # What fills up is the last row once more, which counts nothing.
    is_row, places = rows < end, (rows, rows, columns)
    ends = end, end, last
    filled = [
        x.index_select(0, torch.minimum(place, stop - 1).flatten()).view(*place.shape, x.shape[1])
        for x, place, stop in zip(vectors, places, ends)
    ]
    rows = torch.minimum(rows, end - 1)
    weight = is_row.to(vectors[0].dtype) if weights is None else weights[rows] * is_row
    parts = [torch.zeros_like(x) for x, _ in zip(filled, gradients)]
    total = _softmax_of_block(
        (filled[0], filled[1], filled[2]),
        weight,
        target_ids[rows],
        pad_sequence([x.ids for x in pools], batch_first=True, padding_value=_NO_ITEM),
        parts,
    )
    for gradient, part, place, stop in zip(gradients, parts, places, ends):
        # The row behind all others takes what is of nobody.
        to = torch.where(place < stop, place, len(gradient) - 1)
        gradient.index_copy_(0, to.flatten(), part.flatten(0, 1))
    return total


def _softmax_of_block(
    vectors: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    target_ids: Tensor,
    ids: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """Return the summed losses of T queries against R negatives, and add to the gradients.

    All of it may have a dimension more in front: of pools.

    Args:
        vectors: (T, K) queries, (T, K) positives, (R, K) negatives.
        weight: (T,) float; None: 1.
        target_ids: (T,) int64.
        ids: (R,) int64, of the negatives; behind them :data:`_NO_ITEM` where there are fewer.
        gradients: of the vectors, to be added to; empty where none are asked for.
    """
    queries, positives, negatives = vectors
    positive = (queries * positives).sum(-1, keepdim=True)
    scores = queries @ negatives.mT
    if ids.ndim > 1:
        scores.masked_fill_((ids == _NO_ITEM).unsqueeze(1), float("-inf"))
    # Negatives are distinct and ascending, so a positive stands among them once or not at all.
    column = torch.searchsorted(ids, target_ids).clamp_(max=ids.shape[-1] - 1)
    is_positive = ids.gather(-1, column) == target_ids
    column, is_positive = column.unsqueeze(-1), is_positive.unsqueeze(-1)
    found = scores.gather(-1, column).masked_fill_(is_positive, float("-inf"))
    scores.scatter_(-1, column, found)
    highest = torch.maximum(scores.amax(-1, keepdim=True), positive)
    others = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    own = (positive - highest).exp_()
    losses = (others + own).log_() - (positive - highest)
    factor = (others + own).reciprocal_()
    if weight is not None:
        losses, factor = losses * weight.unsqueeze(-1), factor * weight.unsqueeze(-1)
    if gradients:
        of_queries, of_positives, of_negatives = gradients
        pull = others * factor
        _add_product(of_queries, scores, negatives)
        of_queries.mul_(factor).addcmul_(pull, positives, value=-1)
        of_positives.addcmul_(pull, queries, value=-1)
        _add_product(of_negatives, scores.mT, queries * factor)
    return losses.sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices, or of as many of them as there are totals."""
    (total.addmm_ if total.ndim == 2 else total.baddbmm_)(left, right)
