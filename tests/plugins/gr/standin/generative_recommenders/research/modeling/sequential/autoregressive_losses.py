"""Where negatives are drawn from: all items, or those of the batch."""

import torch
from torch import nn
from torch.nn.functional import normalize


class NegativesSampler(nn.Module):
    def __init__(self, l2_norm, l2_norm_eps):
        super().__init__()
        self._l2_norm, self._l2_norm_eps = l2_norm, l2_norm_eps

    def normalize_embeddings(self, x):
        return normalize(x, dim=-1, eps=self._l2_norm_eps) if self._l2_norm else x

    def debug_str(self):
        return type(self).__name__

    def process_batch(self, ids, presences, embeddings):
        pass


class LocalNegativesSampler(NegativesSampler):
    def __init__(self, num_items, item_emb, all_item_ids, l2_norm, l2_norm_eps):
        super().__init__(l2_norm, l2_norm_eps)
        self._item_emb = item_emb
        self.register_buffer("_all_item_ids", torch.tensor(all_item_ids))

    def forward(self, positive_ids, num_to_sample):
        shape = *positive_ids.shape, num_to_sample
        draws = torch.randint(len(self._all_item_ids), shape, device=positive_ids.device)
        ids = self._all_item_ids[draws]
        return ids, self.normalize_embeddings(self._item_emb(ids))


class InBatchNegativesSampler(NegativesSampler):
    def __init__(self, l2_norm, l2_norm_eps, dedup_embeddings):
        super().__init__(l2_norm, l2_norm_eps)
        assert dedup_embeddings

    def process_batch(self, ids, presences, embeddings):
        self._cached_ids, group = ids[presences].unique(return_inverse=True)
        rows = torch.arange(len(group), device=ids.device)
        rows = torch.empty_like(self._cached_ids).scatter(0, group, rows)
        self._cached_embeddings = self.normalize_embeddings(embeddings[presences][rows])

    def forward(self, positive_ids, num_to_sample):
        shape = *positive_ids.shape, num_to_sample
        draws = torch.randint(len(self._cached_ids), shape, device=positive_ids.device)
        return self._cached_ids[draws], self._cached_embeddings[draws]
