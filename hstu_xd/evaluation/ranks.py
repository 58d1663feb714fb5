"""Evaluate a model on a split: the rank of each target among its candidates.

Scores are computed in blocks of bounded memory. :func:`recommend_items` returns the top of the same
ranking for one history: both ask the same :class:`hstu_xd.evaluation.protocol.Protocol`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData
from hstu_xd.data.window import Window
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.baselines import Baseline
from hstu_xd.evaluation.metrics import UNREACHABLE, Metrics, RankedTargets, grouped_metrics
from hstu_xd.evaluation.protocol import AGAINST, ALL, DEFAULTS, Protocol
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import DotProduct, Scorer

# Scores that are in memory at once (float32: 64 MB), for a catalogue of any size.
BLOCK_SCORES = 16_000_000


def target_ranks(
    user_vectors: Tensor,
    target_ids: Tensor,
    seen_ids: Tensor,
    seen_offsets: Tensor,
    catalog: DomainCatalog,
    scorer: Scorer,
    *,
    protocol: Protocol = DEFAULTS,
    block_scores: int = BLOCK_SCORES,
) -> tuple[Tensor, Tensor]:
    """Rank every target among the items that the user has not seen.

    Candidates are all items of the target's domain, or of the catalogue, less the seen ones. Ties
    count against the target, ``rank = #{candidates whose score >= the target's}``, or for it,
    ``1 + #{candidates whose score > the target's}``. A target that the user has seen is
    no candidate and has no rank: it is :data:`hstu_xd.evaluation.metrics.UNREACHABLE`.

    Args:
        user_vectors: (Q, K) float, one query a row.
        target_ids: (Q,) int64.
        seen_ids: (E,) int64, items to leave out for each user, end to end; repeats and padding
            allowed.
        seen_offsets: (Q + 1,) int64.
        catalog: domain of every item, on the device of the tensors.
        scorer: scores users against the candidates.
        protocol: whose candidates, and how ties count; what is sampled is ranked among all of its
            domain here.
        block_scores: scores held at once, at least one query's row.

    Returns:
        (Q,) int64 ranks from 1, or UNREACHABLE; (Q,) int64 numbers of candidates beside the target.

    Raises:
        HstuXdError: a score is not finite.
    """
    ranks, others = torch.zeros_like(target_ids), torch.zeros_like(target_ids)
    for block in _scored(
        user_vectors,
        *(target_ids, seen_ids, seen_offsets, catalog, scorer),
        protocol=protocol,
        block_scores=block_scores,
    ):
        target_scores = block.scores.gather(1, block.column)
        if protocol.ties == AGAINST:
            found = (block.scores >= target_scores).sum(1, dtype=torch.int32).long()
        else:
            found = (block.scores > target_scores).sum(1, dtype=torch.int32).long() + 1
        ranks[block.rows] = found.masked_fill_(block.met, UNREACHABLE)
        others[block.rows] = block.others
    return ranks, others


def best_candidates(
    user_vectors: Tensor,
    target_ids: Tensor,
    ranks: Tensor,
    seen_ids: Tensor,
    seen_offsets: Tensor,
    catalog: DomainCatalog,
    scorer: Scorer,
    k: int,
    *,
    protocol: Protocol = DEFAULTS,
    block_scores: int = BLOCK_SCORES,
) -> tuple[Tensor, Tensor]:
    """List the best candidates of every query, the target at its rank.

    Args:
        user_vectors: as in :func:`target_ranks`, like all that is not told here.
        target_ids: (Q,) int64.
        ranks: (Q,) int64 of :func:`target_ranks`, which say where among equal scores a target is.
        seen_ids: (E,) int64.
        seen_offsets: (Q + 1,) int64.
        catalog: domain of every item.
        scorer: scores users against the candidates.
        k: candidates to list.
        protocol: whose candidates.
        block_scores: scores held at once.

    Returns:
        (Q, k) int64 items, best first, 0 where there are no more; (Q, k) float64 scores.
    """
    items = target_ids.new_zeros((target_ids.numel(), k))
    scores = torch.full_like(items, float("-inf"), dtype=torch.float64)
    places = torch.arange(k, device=items.device)
    for block in _scored(
        user_vectors,
        *(target_ids, seen_ids, seen_offsets, catalog, scorer),
        protocol=protocol,
        block_scores=block_scores,
    ):
        own = block.scores.gather(1, block.column)
        best = block.scores.scatter_(1, block.column, float("-inf")).topk(min(k, len(block.items)))
        missing = (0, k - best.values.shape[1])
        values = torch.nn.functional.pad(best.values, missing, value=float("-inf"))
        found = torch.nn.functional.pad(block.items[best.indices], missing)
        found = found.masked_fill(values == float("-inf"), 0)
        # The target enters at its rank, and those behind it move on by one place.
        rank = ranks[block.rows].unsqueeze(1) - 1
        source = torch.where(places < rank, places, places - 1).clamp_(min=0)
        is_target = places == rank
        items[block.rows] = torch.where(
            is_target, target_ids[block.rows].unsqueeze(1), found.gather(1, source)
        )
        scores[block.rows] = torch.where(is_target, own, values.gather(1, source)).double()
    return items, scores


@dataclass(frozen=True)
class _Scores:
    """Scores of some queries against their candidates.

    Attributes:
        rows: (R,) int64, which queries.
        items: (C,) int64 ascending, the candidates and what the users have met.
        scores: (R, C) float; -inf where a user has met the item, but for the target.
        column: (R, 1) int64, place of the target among the items.
        met: (R,) bool, whether the user has met the target.
        others: (R,) int64, number of candidates beside the target.
    """

    rows: Tensor
    items: Tensor
    scores: Tensor
    column: Tensor
    met: Tensor
    others: Tensor


def _scored(
    user_vectors: Tensor,
    target_ids: Tensor,
    seen_ids: Tensor,
    seen_offsets: Tensor,
    catalog: DomainCatalog,
    scorer: Scorer,
    *,
    protocol: Protocol,
    block_scores: int,
) -> Iterator[_Scores]:
    """Score all queries, a block of them after the other, see :func:`target_ranks`."""
    for items, queries in _pools(target_ids, catalog, protocol):
        score = scorer(items)
        for rows in queries.split(max(1, block_scores // items.numel())):
            scores = score(user_vectors[rows])
            # The extremes are one pass, and not a number if any score is none.
            if not bool(torch.isfinite(torch.stack(scores.aminmax())).all()):
                raise HstuXdError(
                    "scores are not finite: the model has diverged; train again with a lower "
                    "learning rate or take an earlier checkpoint"
                )
            column = torch.searchsorted(items, target_ids[rows]).unsqueeze(1)
            target_scores = scores.gather(1, column)
            row, seen = _seen_columns(rows, seen_ids, seen_offsets, items)
            scores[row, seen] = float("-inf")
            scores.scatter_(1, column, target_scores)
            is_target = seen == column[row, 0]
            met = torch.zeros_like(rows, dtype=torch.bool)
            met[row[is_target]] = True
            left_out = row[~is_target].bincount(minlength=rows.numel())
            yield _Scores(rows, items, scores, column, met, items.numel() - 1 - left_out)


def _pools(
    target_ids: Tensor, catalog: DomainCatalog, protocol: Protocol
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (C,) ascending ids of items with the numbers of the targets that are among them."""
    if protocol.candidates == ALL:
        yield (
            catalog.domain_items.sort().values,
            torch.arange(target_ids.numel(), device=target_ids.device),
        )
        return
    domains = catalog.domain_of(target_ids)
    for domain in domains.unique().tolist():
        yield catalog.items_of(domain), torch.nonzero(domains == domain).squeeze(1)


def _seen_columns(
    rows: Tensor, seen_ids: Tensor, seen_offsets: Tensor, items: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column of every seen item in a block of queries, each pair once."""
    lengths = seen_offsets[rows + 1] - seen_offsets[rows]
    row = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), lengths)
    within = torch.arange(row.numel(), device=rows.device)
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    seen = seen_ids[within - first[row] + seen_offsets[rows][row]]
    column = torch.searchsorted(items, seen).clamp_(max=items.numel() - 1)
    cells = (row * items.numel() + column)[items[column] == seen].unique()
    return cells // items.numel(), cells % items.numel()


def _nothing(users: np.ndarray) -> tuple[Tensor, Tensor]:
    """No items to leave out for any of the users."""
    return torch.empty(0, dtype=torch.int64), torch.zeros(users.size + 1, dtype=torch.int64)


def _preparing_once(scorer: Scorer) -> Scorer:
    """Let a scorer prepare each pool of candidates once for all batches of an evaluation.

    Its pools have no item in common, so the first one of its items tells a pool.
    """
    prepared: dict[int, Callable[[Tensor], Tensor]] = {}

    def prepare(items: Tensor) -> Callable[[Tensor], Tensor]:
        first = int(items[0])
        if first not in prepared:
            prepared[first] = scorer(items)
        return prepared[first]

    return prepare


@dataclass(frozen=True)
class ListedTargets:
    """Targets of some users, and the best candidates beside them.

    Attributes:
        users: (Q,) user indices.
        targets: (Q,) int64 items.
        domains: (Q,) int64, domain of the target.
        ranks: (Q,) int64 from 1 among all candidates, or UNREACHABLE.
        items: (Q, k) int64, best first, 0 where there are no more candidates; k is the largest of
            the protocol.
        scores: (Q, k) float64.
    """

    users: np.ndarray
    targets: Tensor
    domains: Tensor
    ranks: Tensor
    items: Tensor
    scores: Tensor


@torch.no_grad()
def rank_targets(
    model: CrossDomainHSTU | Baseline,
    data: SequenceData,
    users: np.ndarray,
    *,
    protocol: Protocol = DEFAULTS,
    scorer: Scorer | None = None,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda users: None,
    listed: Callable[[ListedTargets], object] | None = None,
) -> RankedTargets:
    """Rank the users' last targets among their candidates.

    Args:
        model: put into evaluation mode for the time of the call; or a baseline.
        data: the split.
        users: (Q,) user indices out of ``data.users``.
        protocol: which candidates, and how ties count.
        scorer: of the objective that the model was trained for; None: dot products.
        batch_size: users encoded at once.
        progress: called with the number of users done after every batch.
        listed: called with every batch, where the best candidates are wanted beside the ranks.
    """
    was_training = model.training
    model.eval()
    device = model.catalog.item_domains.device
    scorer = _preparing_once(scorer or DotProduct(model.item_vectors))
    parts = []
    for start in range(0, users.size, batch_size):
        some = users[start : start + batch_size]
        batch, targets = data.batch(some)
        seen_ids, seen_offsets = data.seen(some) if protocol.exclude_seen else _nothing(some)
        batch, targets = batch.to(device), targets.to(device)
        last = batch.offsets[1:] - 1
        vectors, wanted = model(batch, asked=last), targets[last]
        seen = seen_ids.to(device), seen_offsets.to(device)
        ranks, others = target_ranks(
            vectors, wanted, *seen, model.catalog, scorer, protocol=protocol
        )
        domains = batch.target_domains[last]
        if listed is not None:
            best = best_candidates(
                *(vectors, wanted, ranks, *seen, model.catalog, scorer, protocol.ks[-1]),
                protocol=protocol,
            )
            listed(ListedTargets(some, wanted, domains, ranks, *best))
        switched = model.catalog.domain_of(batch.item_ids[last]) != domains
        met = None if isinstance(model, Baseline) else model.met_items
        cold = None if met is None else ~met[wanted]
        parts.append(RankedTargets(ranks, domains, switched, others, cold))
        progress(some.size)
    model.train(was_training)
    return RankedTargets.joined(parts)


def evaluate(
    model: CrossDomainHSTU | Baseline,
    data: SequenceData,
    *,
    protocol: Protocol = DEFAULTS,
    scorer: Scorer | None = None,
    metrics: Metrics | None = None,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda users: None,
    listed: Callable[[ListedTargets], object] | None = None,
) -> dict[str, float]:
    """Measure a whole split, see :func:`hstu_xd.evaluation.metrics.grouped_metrics`.

    Args:
        model: put into evaluation mode for the time of the call; or a baseline.
        data: the split.
        protocol: which candidates and metrics.
        scorer: of the objective that the model was trained for; None: dot products.
        metrics: further functions of ranks by name.
        batch_size: users encoded at once.
        progress: called with the number of users done after every batch.
        listed: called with every batch, where the best candidates are wanted beside the ranks.
    """
    ranked = rank_targets(
        model,
        data,
        data.users,
        protocol=protocol,
        scorer=scorer,
        batch_size=batch_size,
        progress=progress,
        listed=listed,
    )
    found = grouped_metrics(ranked, model.catalog.domain_names, protocol, metrics)
    return found | data.counts


@torch.no_grad()
def recommend_items(
    model: CrossDomainHSTU | Baseline,
    item_ids: np.ndarray,
    timestamps: np.ndarray,
    domain: int,
    k: int,
    *,
    window: Window | int,
    protocol: Protocol = DEFAULTS,
    scorer: Scorer | None = None,
    at: int | None = None,
) -> list[tuple[int, float]]:
    """Find the best items of a domain.

    Args:
        model: a trained model.
        item_ids: (S,) int, the whole history, oldest first; its window is read.
        timestamps: (S,) int64.
        domain: domain id to recommend from.
        k: number of items; fewer come back where the domain has no more candidates.
        window: which events are read, a run's, a number: so many latest ones; later positions, for
            which the model has room, were never trained.
        protocol: whether items of the history are candidates.
        scorer: of the objective that the model was trained for; None: dot products.
        at: time of the request, in the unit of the timestamps; None: that of the last event.

    Returns:
        ``(item id, score)`` pairs, best first.

    Raises:
        InputError: the time is before the last event.
    """
    if at is not None and len(timestamps) and at < timestamps[-1]:
        raise InputError(
            f"the time of the request is {at}, before the user's last event at {timestamps[-1]}; "
            "ask for a later time, or leave it out"
        )
    items = torch.from_numpy(np.array(item_ids, np.int64))
    times = torch.from_numpy(np.array(timestamps, np.int64))
    read = Window.of(window).kept(model.catalog.domain_of(items), torch.tensor([0, len(items)]))
    vector = model.encode(
        items[None, read],
        times[None, read],
        torch.tensor([domain]),
        None if at is None else torch.tensor([at]),
    )
    pool = model.catalog.items_of(domain)
    if protocol.exclude_seen:
        pool = pool[~torch.isin(pool, items)]
    scores = (scorer or DotProduct(model.item_vectors))(pool)(vector)[0]
    best = scores.topk(min(k, pool.numel()))
    return list(zip(pool[best.indices].tolist(), best.values.tolist()))
