"""REC's sampled softmax over the tokens of a jagged batch, with domain-scoped negatives."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

_SEEDS = 2**31
_TOP = (1, 5, 10, 50, 100)


def own_generator(rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Build the generator of a process's own draws; its seed is torch's next number and the rank.

    REC gives torch the same seed in all of them: each would draw what the others have drawn.

    Args:
        rank: number of the process.
        device: of the draws.
    """
    return torch.Generator(device).manual_seed(int(torch.randint(_SEEDS, ())) + rank)


def sampled_softmax(
    hidden: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    scale: Tensor,
    threshold: float,
    excluded: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the mean of ``-log softmax`` of the positive, and the figures that REC logs.

    A negative closer to the positive than ``threshold`` (mostly the positive itself) is left out.

    Args:
        hidden: (L, K) float, what each token says of its next event.
        positives: (L, K) float, vectors of the next events.
        negatives: (L, R, K) float, or (M, K) where all tokens share them.
        scale: scalar, factor of the cosines.
        threshold: on the cosine of positive and negative.
        excluded: (L, M) bool, further pairs left out; shared negatives only.

    Returns:
        ``loss``, ``nce_samples`` and ``nce_top<k>_acc`` for every k that there are logits for.
    """
    hidden, positives, negatives = (normalize(x, dim=-1) for x in (hidden, positives, negatives))
    compare = _with_shared if negatives.ndim == 2 else _with_own
    logits = compare(hidden, negatives)
    lowest = torch.finfo(logits.dtype).min
    left_out = compare(positives, negatives) > threshold
    if excluded is not None:
        left_out = left_out | excluded
    logits = logits.masked_fill(left_out, lowest)
    positive = (hidden * positives).sum(-1, keepdim=True)
    logits = torch.cat([positive, logits], dim=1) * scale
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    figures = {
        "loss": cross_entropy(logits, labels),
        "nce_samples": (logits > lowest / 100).sum(1).float().mean(),
    }
    for k in _TOP:
        if k <= logits.shape[1]:
            hit = (logits.topk(k, dim=1).indices == 0).any(1)
            figures[f"nce_top{k}_acc"] = hit.float().mean()
    return figures


def _with_shared(queries: Tensor, negatives: Tensor) -> Tensor:
    return queries @ negatives.T


def _with_own(queries: Tensor, negatives: Tensor) -> Tensor:
    return torch.einsum("lk,lrk->lr", queries, negatives)
