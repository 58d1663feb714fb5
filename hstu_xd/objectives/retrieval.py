"""The objective of a retrieval model: sampled softmax, and ranking by dot products.

Negatives come from the positive's own domain, or from the whole catalogue.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.asking import OtherDomains
from hstu_xd.objectives.objective import DotProduct, Metric, Scorer


def sample_negatives(
    catalog: DomainCatalog,
    num_negatives: int,
    generator: torch.Generator,
    *,
    scope: str,
    among: Tensor | None = None,
) -> list[Tensor]:
    """Draw the negatives of a step: one uniform sample shared by all positives of a domain.

    Args:
        catalog: item -> domain table.
        num_negatives: draws, of which distinct ones are kept; a domain (or catalogue) of no more
            items is taken whole.
        generator: seeded per step, so that every process of a job draws the same.
        scope: "domain" (a sample of each domain's items) or "catalogue" (one of all items).
        among: (I + 1,) bool, items that may be drawn; default: all.

    Returns:
        Distinct item ids (R_d,) int64, ascending, per domain, or one tensor under "catalogue".
    """
    pools = (
        [catalog.domain_items]
        if scope == "catalogue"
        else [catalog.items_of(d) for d in range(catalog.num_domains)]
    )
    if among is not None:
        pools = [pool[among[pool]] for pool in pools]
    return [
        (pool if pool.numel() <= num_negatives else _draw(pool, num_negatives, generator))
        .sort()
        .values
        for pool in pools
    ]


def _draw(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return a uniform sample of distinct items, a few fewer than asked where draws repeat."""
    drawn = torch.randint(pool.numel(), (size,), generator=generator).unique()
    return pool[drawn.to(pool.device, non_blocking=True)]


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
        is_trained = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(x) for x in (queries, positives, negatives) if is_trained]
        total = queries.new_zeros(())
        block = _CACHED_SCORES if queries.device.type == "cpu" else _SCORES_ON_GPU
        end = last = 0
        for ids, count in zip(pool_ids, counts):
            first, last = last, last + ids.numel()
            begin, end = end, end + count
            size = max(1, block // max(1, ids.numel()))
            for start in range(begin, end, size):
                rows = slice(start, min(start + size, end))
                weight = None if weights is None else weights[rows]
                total += _softmax_of_block(
                    (queries[rows], positives[rows], negatives[first:last]),
                    weight,
                    target_ids[rows],
                    ids,
                    [x[y] for x, y in zip(gradients, (rows, rows, slice(first, last)))],
                )
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale what the forward pass has kept."""
        return *(x * grad for x in ctx.saved_tensors), None, None, None, None


def _softmax_of_block(
    vectors: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    target_ids: Tensor,
    ids: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """Return the summed losses of T queries against R negatives, and add to the gradients.

    Args:
        vectors: (T, K) queries, (T, K) positives, (R, K) negatives.
        weight: (T,) float; None: 1.
        target_ids: (T,) int64.
        ids: (R,) int64, of the negatives.
        gradients: of the vectors, to be added to; empty where none are asked for.
    """
    queries, positives, negatives = vectors
    positive = (queries * positives).sum(1, keepdim=True)
    scores = queries @ negatives.T
    # Negatives are distinct and ascending, so a positive stands among them once or not at all.
    column = torch.searchsorted(ids, target_ids).clamp_(max=ids.numel() - 1).unsqueeze(1)
    is_positive = ids[column] == target_ids.unsqueeze(1)
    found = scores.gather(1, column).masked_fill_(is_positive, float("-inf"))
    scores.scatter_(1, column, found)
    highest = torch.maximum(scores.amax(1, keepdim=True), positive)
    others = scores.sub_(highest).exp_().sum(1, keepdim=True)
    own = (positive - highest).exp_()
    losses = (others + own).log_() - (positive - highest)
    factor = (others + own).reciprocal_()
    if weight is not None:
        losses, factor = losses * weight.unsqueeze(1), factor * weight.unsqueeze(1)
    if gradients:
        of_queries, of_positives, of_negatives = gradients
        pull = others * factor
        of_queries.addmm_(scores, negatives).mul_(factor).addcmul_(pull, positives, value=-1)
        of_positives.addcmul_(pull, queries, value=-1)
        of_negatives.addmm_(scores.T, queries * factor)
    return losses.sum()


# Draws a step's negatives: given the catalogue, a number of draws and the step's generator, int64
# item ids, one tensor a domain, or a single one that all domains share.
Sampler = Callable[[DomainCatalog, int, torch.Generator], Sequence[Tensor]]

SCOPES = ("domain", "catalogue")


@dataclass(frozen=True)
class Retrieval:
    """Tell the next item from sampled negatives; rank items by dot products of unit vectors.

    Attributes:
        negatives: where negatives come from, "domain" (the positive's own domain) or "catalogue"
            (all items), or a :data:`Sampler`.
        num_negatives: sampled negatives per positive.
        temperature: dot products of unit vectors are divided by it.
        others: what positions are asked beside their next event.
        metrics: none of its own.

    Raises:
        InputError: another word than the two for ``negatives``.
    """

    negatives: str | Sampler = "domain"
    num_negatives: int = 2048
    temperature: float = 0.1
    others: OtherDomains = field(default_factory=OtherDomains)
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.negatives, str) and self.negatives not in SCOPES:
            raise InputError(f"negatives is {self.negatives!r}; one of {', '.join(SCOPES)}")

    def prepare(
        self,
        catalog: DomainCatalog,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> JaggedBatch:
        """Put questions about other domains into a batch, where any are to be asked."""
        if not self.others.count:
            return batch
        asked = self.others.ask(batch, targets, catalog.num_domains, generator)
        return replace(batch, asked=asked)

    def loss(
        self,
        model: CrossDomainHSTU,
        batch: JaggedBatch,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the sampled softmax summed over tokens, see :func:`sampled_softmax_loss`.

        Questions about other domains are added with their weight, against the same negatives.
        """
        if batch.asked is None:
            batch = self.prepare(model.catalog, batch, targets, generator)
        negatives = self._draw(model, generator)
        asked, counts = batch.asked, batch.targets_per_domain
        if asked is None or not asked.targets.numel():
            vectors, weights = model(batch), None
        else:
            vectors = model(batch, questions=asked.questions)
            weights = vectors.new_full((len(vectors),), self.others.weight, dtype=torch.float32)
            weights[: len(targets)] = 1
            targets = torch.cat([targets, asked.targets])
            if counts is not None:
                counts = tuple(map(sum, zip(counts, asked.targets_per_domain)))
        # The softmax is float32 whatever the encoder computes in.
        with torch.autocast(targets.device.type, enabled=False):
            return sampled_softmax_loss(
                model,
                vectors,
                targets,
                negatives,
                temperature=self.temperature,
                targets_per_domain=counts,
                weights=weights,
            )

    def scorer(self, model: CrossDomainHSTU) -> Scorer:
        """Return the dot product with the model's item vectors."""
        return DotProduct(model.item_vectors)

    def _draw(self, model: CrossDomainHSTU, generator: torch.Generator) -> list[Tensor]:
        catalog = model.catalog
        if isinstance(self.negatives, str):
            # An item that is never a positive would only teach that its features are bad.
            return sample_negatives(
                catalog,
                self.num_negatives,
                generator,
                scope=self.negatives,
                among=model.met_items,
            )
        drawn = self.negatives(catalog, self.num_negatives, generator)
        return _checked(drawn, catalog)


def _checked(drawn: Any, catalog: DomainCatalog) -> list[Tensor]:
    """Return a sampler's negatives as the loss needs them: distinct, ascending, on the device.

    Raises:
        InputError: not one tensor of ids a domain, or one for all.
    """
    needed = (
        f"a list of {catalog.num_domains} int64 tensors of item ids is needed, one a domain and "
        "none empty, or of one tensor for all domains"
    )
    if not isinstance(drawn, list | tuple):
        raise InputError(f"the sampler of negatives returned a {type(drawn).__name__}; {needed}")
    if len(drawn) not in (1, catalog.num_domains):
        raise InputError(f"the sampler of negatives returned {len(drawn)} tensors; {needed}")
    for ids in drawn:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
            given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else ids
            raise InputError(f"the sampler of negatives returned {given!s:.60}; {needed}")
    empty = [
        not ids.numel() and (len(drawn) == 1 or catalog.items_of(domain).numel() > 0)
        for domain, ids in enumerate(drawn)
    ]
    if any(empty):
        raise InputError(
            f"the sampler of negatives returned none for domain {empty.index(True)}; {needed}"
        )
    device = catalog.item_domains.device
    return [ids.unique().to(device, non_blocking=True) for ids in drawn]
