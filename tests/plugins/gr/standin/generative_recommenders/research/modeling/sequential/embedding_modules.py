"""The item table; row 0 is padding."""

from torch import nn


class LocalEmbeddingModule(nn.Module):
    def __init__(self, num_items, item_embedding_dim):
        super().__init__()
        self.item_embedding_dim = item_embedding_dim
        self._item_emb = nn.Embedding(num_items + 1, item_embedding_dim, padding_idx=0)
        nn.init.trunc_normal_(self._item_emb.weight, std=0.02)

    def get_item_embeddings(self, item_ids):
        return self._item_emb(item_ids)
