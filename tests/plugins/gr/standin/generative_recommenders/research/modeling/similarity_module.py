"""An encoder of histories that also scores items."""

from torch import nn


class SequentialEncoderWithLearnedSimilarityModule(nn.Module):
    def __init__(self, ndp_module):
        super().__init__()
        self._ndp_module = ndp_module

    def similarity_fn(self, query_embeddings, item_ids, item_embeddings=None, **kwargs):
        if item_embeddings is None:
            item_embeddings = self.get_item_embeddings(item_ids)
        items = {"item_ids": item_ids, "item_embeddings": item_embeddings}
        return self._ndp_module(query_embeddings=query_embeddings, **items, **kwargs)
