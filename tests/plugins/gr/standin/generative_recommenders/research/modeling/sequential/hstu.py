"""HSTU from the formulas of arXiv 2402.17152, dense, with upstream's parameter names."""

import torch
from torch import nn
from torch.nn.functional import dropout, layer_norm, silu

from ..similarity_module import SequentialEncoderWithLearnedSimilarityModule


class Bias(nn.Module):
    def __init__(self, length):
        super().__init__()
        self._ts_w = nn.Parameter(torch.empty(129).normal_(std=0.02))
        self._pos_w = nn.Parameter(torch.empty(2 * length - 1).normal_(std=0.02))

    def forward(self, times):
        """(B, N) -> (B, N, N): of query i, which asks for the event at time i + 1, on key j."""
        column = torch.arange(times.shape[1], device=times.device)
        next_times = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        gap = (next_times.unsqueeze(2) - times.unsqueeze(1)).abs().clamp(min=1)
        bucket = (gap.float().log() / 0.301).long().clamp(max=128)
        return self._pos_w[column - column.unsqueeze(1) + len(column) - 1] + self._ts_w[bucket]


class Layer(nn.Module):
    def __init__(self, width, heads, dqk, dv, activation, rate, concat_ua, bias):
        super().__init__()
        self._heads, self._activation = heads, silu if activation == "silu" else nn.Identity()
        self._rate, self._concat_ua = rate, concat_ua
        self._widths = [heads * n for n in (dv, dv, dqk, dqk)]
        self._uvqk = nn.Parameter(torch.empty(width, sum(self._widths)).normal_(std=0.02))
        self._o = nn.Linear(heads * dv * (3 if concat_ua else 1), width)
        nn.init.xavier_uniform_(self._o.weight)
        self._rel_attn_bias = bias

    def forward(self, x, inside, visible, times):
        """(L, K): the tokens at the true places of ``inside`` (B, N) -> the same, and v, q, k."""

        def by_user(tokens):
            rows = tokens.new_zeros(*inside.shape, tokens.shape[1])
            return rows.masked_scatter(inside.unsqueeze(2), tokens).unflatten(2, (self._heads, -1))

        projected = self._activation(layer_norm(x, x.shape[1:], eps=1e-6) @ self._uvqk)
        u, v, q, k = projected.split(self._widths, dim=1)
        scores = torch.einsum("bihd,bjhd->bhij", by_user(q), by_user(k))
        if self._rel_attn_bias is not None and times is not None:
            scores = scores + self._rel_attn_bias(times).unsqueeze(1)
        weights = silu(scores) / inside.shape[1] * visible
        read = torch.einsum("bhij,bjhd->bihd", weights, by_user(v))[inside].flatten(1)
        read = layer_norm(read, read.shape[1:], eps=1e-6)
        gated = torch.cat([u, read, u * read], dim=1) if self._concat_ua else u * read
        return self._o(dropout(gated, self._rate, self.training)) + x, (v, q, k)


class HSTU(SequentialEncoderWithLearnedSimilarityModule):
    def __init__(
        self, max_sequence_len, max_output_len, embedding_dim, num_blocks, num_heads, linear_dim,
        attention_dim, normalization, linear_config, linear_activation, linear_dropout_rate,
        attn_dropout_rate, embedding_module, similarity_module, input_features_preproc_module,
        output_postproc_module, enable_relative_attention_bias=True, concat_ua=False, verbose=True,
    ):  # fmt: skip
        super().__init__(similarity_module)
        assert (normalization, linear_config) == ("rel_bias", "uvqk")
        length = max_sequence_len + max_output_len
        self._embedding_module = embedding_module
        self._input_features_preproc = input_features_preproc_module
        self._output_postproc = output_postproc_module
        sizes = num_heads, attention_dim, linear_dim, linear_activation, linear_dropout_rate
        layers = nn.ModuleList()
        for _ in range(num_blocks):
            bias = Bias(length) if enable_relative_attention_bias else None
            layers.append(Layer(embedding_dim, *sizes, concat_ua, bias))
        self._hstu = nn.ModuleDict({"_attention_layers": layers})
        self.register_buffer("_attn_mask", torch.ones(length, length, dtype=torch.bool).triu(1))
        self._text = "-".join(map(str, ["HSTU", num_blocks, *sizes, attn_dropout_rate]))

    def debug_str(self):
        return self._text

    def get_item_embeddings(self, item_ids):
        return self._embedding_module.get_item_embeddings(item_ids)

    def generate_user_embeddings(
        self, past_lengths, past_ids, past_embeddings, past_payloads,
        delta_x_offsets=None, cache=None, return_cache_states=False,
    ):  # fmt: skip
        assert delta_x_offsets is None, "the stand-in has no incremental mode"
        assert cache is None, "the stand-in has no incremental mode"
        _, padded, _ = self._input_features_preproc(
            past_lengths, past_ids, past_embeddings, past_payloads
        )
        column = torch.arange(past_ids.shape[1], device=past_ids.device)
        inside, states = column < past_lengths.unsqueeze(1), []
        x = padded[inside]
        for layer in self._hstu["_attention_layers"]:
            x, state = layer(x, inside, ~self._attn_mask, past_payloads.get("timestamps"))
            states += [state] * return_cache_states
        encoded = torch.zeros_like(padded).masked_scatter(inside.unsqueeze(2), x)
        return self._output_postproc(encoded), states

    def forward(self, past_lengths, past_ids, past_embeddings, past_payloads, batch_id=None):
        features = past_lengths, past_ids, past_embeddings, past_payloads
        return self.generate_user_embeddings(*features)[0]

    def encode(
        self, past_lengths, past_ids, past_embeddings, past_payloads,
        delta_x_offsets=None, cache=None, return_cache_states=False,
    ):  # fmt: skip
        features = past_lengths, past_ids, past_embeddings, past_payloads
        incremental = delta_x_offsets, cache, return_cache_states
        encoded, states = self.generate_user_embeddings(*features, *incremental)
        last = encoded[torch.arange(len(encoded), device=encoded.device), past_lengths - 1]
        return (last, states) if return_cache_states else last
