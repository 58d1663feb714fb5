"""Scores of items for users."""

from torch import nn


class DotProductSimilarity(nn.Module):
    def forward(self, query_embeddings, item_embeddings, **kwargs):
        """(B, K), (B or 1, X, K) -> (B, X)."""
        return (item_embeddings @ query_embeddings.unsqueeze(2)).squeeze(2), {}
