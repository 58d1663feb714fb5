"""What an encoder's output goes through."""

from torch import nn
from torch.nn.functional import normalize


class L2NormEmbeddingPostprocessor(nn.Module):
    def __init__(self, embedding_dim, eps=1e-6):
        super().__init__()
        self._eps = eps

    def forward(self, output_embeddings):
        return normalize(output_embeddings, dim=-1, eps=self._eps)
