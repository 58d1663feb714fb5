"""Cross entropy of the next item against sampled ones."""

import torch
from torch import nn


class SampledSoftmaxLoss(nn.Module):
    def __init__(self, num_to_sample, softmax_temperature, model):
        super().__init__()
        self._num_to_sample, self._temperature = num_to_sample, softmax_temperature
        self._score = model.similarity_fn

    def forward(
        self, lengths, output_embeddings, supervision_ids, supervision_embeddings,
        supervision_weights, negatives_sampler, **kwargs,
    ):  # fmt: skip
        asked = supervision_weights > 0
        ids = supervision_ids[asked].unsqueeze(1)
        vectors = negatives_sampler.normalize_embeddings(supervision_embeddings[asked])
        negative_ids, negative_vectors = negatives_sampler(ids.squeeze(1), self._num_to_sample)
        scores, _ = self._score(
            query_embeddings=output_embeddings[asked],
            item_ids=torch.cat([ids, negative_ids], dim=1),
            item_embeddings=torch.cat([vectors.unsqueeze(1), negative_vectors], dim=1),
            **kwargs,
        )
        itself = torch.cat([torch.zeros_like(ids, dtype=torch.bool), negative_ids == ids], dim=1)
        log_shares = (scores / self._temperature).masked_fill(itself, -1e4).log_softmax(dim=1)
        weights = supervision_weights[asked]
        return -(log_shares[:, 0] * weights).sum() / weights.sum(), {}
