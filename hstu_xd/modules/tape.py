"""TAPE: positional embeddings that tell the model which domain comes next."""

import torch
from torch import Tensor, nn


class TransitionAwarePositionalEmbedding(nn.Module):
    """Embedding of a domain switch, added to the encoder's input: zero while the domain stays.

    ``r_i = scale * m[d_{i+1}] * (W m[d_i] + b)`` where ``d_{i+1} != d_i``, else 0. It uses the
    *domain* of the next event, which the request names, never its item. ``scale`` starts at zero,
    so that a trained HSTU continues unchanged at step 0.

    Args:
        num_domains: number of domains ``D``.
        embedding_dim: model width ``K``.

    Source: arXiv 2508.20945, transition-aware positional embedding; the scale is this project's.
    """

    def __init__(self, num_domains: int, embedding_dim: int) -> None:
        super().__init__()
        self._domain_emb = nn.Embedding(num_domains, embedding_dim)
        self._transition = nn.Linear(embedding_dim, embedding_dim)
        self._scale = nn.Parameter(torch.zeros(embedding_dim))
        nn.init.normal_(self._domain_emb.weight)
        nn.init.xavier_uniform_(self._transition.weight)
        nn.init.zeros_(self._transition.bias)

    def forward(self, domains: Tensor, target_domains: Tensor) -> Tensor:
        """Embed the transitions.

        Args:
            domains: (L,) int64, domain of each token.
            target_domains: (L,) int64, domain of the event after it.

        Returns:
            (L, K) float.
        """
        source = self._transition(self._domain_emb.weight)  # (D, K)
        transition = self._domain_emb.weight[target_domains] * source[domains] * self._scale
        return transition * (domains != target_domains).unsqueeze(-1)
