"""Parts of one's own for hstu-xd: an objective, a layer and a metric; mine.gin binds them."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gin
from hstu_xd.model.encoder import HSTULayer
from hstu_xd.objectives.objective import DotProduct


@gin.configurable
class InBatchSoftmax:
    """Tell each next item from the other next items that the batch has of its domain."""

    def __init__(self, temperature=0.05):
        self.temperature = temperature
        self.metrics = {}  # none but the usual ones

    def loss(self, model, batch, targets, generator):
        """Return the loss summed over tokens; what is random must come from the generator."""
        scores = model(batch) @ model.item_vectors(targets).T / self.temperature
        domains, own = batch.target_domains, torch.arange(len(targets), device=targets.device)
        hidden = (domains[:, None] != domains) | (targets[:, None] == targets)
        hidden[own, own] = False
        return cross_entropy(scores.masked_fill(hidden, -torch.inf), own, reduction="sum")

    def scorer(self, model):
        """Return what ranks items: item ids -> (user vectors -> scores)."""
        return DotProduct(model.item_vectors)


@gin.configurable
class ScaledLayer(HSTULayer):
    """HSTU's layer, of which a learned share a channel is added to its input.

    A layer that overrides ``combine`` alone can be exported and served like HSTU's own.
    """

    def __init__(self, settings, *, initial_share=1.0, **others):
        super().__init__(settings, **others)
        self.share = nn.Parameter(torch.full((settings.embedding_dim,), initial_share))

    def combine(self, x, u, attended, answer):
        return x + self.share * (super().combine(x, u, attended, answer) - x)


@gin.configurable
def hr5(ranks):
    """Count targets among the first five: a number for each of (Q,) ranks from 1."""
    return (ranks <= 5).double()
