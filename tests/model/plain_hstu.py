"""HSTU written from the formulas of arXiv 2402.17152, dense and padded, without the library.

Parameters carry upstream's names, so that one state dict fits both.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainBias(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self._ts_w = nn.Parameter(torch.zeros(129))
        self._pos_w = nn.Parameter(torch.zeros(2 * length - 1))

    def forward(self, times: Tensor, next_times: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B, N, N)."""
        length = times.shape[1]
        position = torch.arange(length)
        by_position = self._pos_w[(length - 1) + position[None, :] - position[:, None]]
        gap = (next_times[:, :, None] - times[:, None, :]).abs().clamp(min=1)
        bucket = (gap.float().log() / 0.301).long().clamp(max=128)
        return by_position + self._ts_w[bucket]


class PlainLayer(nn.Module):
    def __init__(self, width: int, length: int, heads: int, dqk: int, dv: int) -> None:
        super().__init__()
        self.heads, self.dqk, self.dv = heads, dqk, dv
        self._uvqk = nn.Parameter(torch.zeros(width, heads * 2 * (dqk + dv)))
        self._rel_attn_bias = PlainBias(length)
        self._o = nn.Linear(heads * dv, width)

    def gate_and_read(
        self, x: Tensor, times: Tensor, next_times: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, N, K), (B, N) twice, (B, 1 or H, N, N) bool -> gate U and LN(Y), (B, N, H dv)."""
        batch, length, width = x.shape
        wide, narrow = self.heads * self.dv, self.heads * self.dqk
        projected = functional.silu(functional.layer_norm(x, [width], eps=1e-6) @ self._uvqk)
        u, v, q, k = projected.split([wide, wide, narrow, narrow], dim=2)
        q = q.view(batch, length, self.heads, self.dqk)
        k = k.view(batch, length, self.heads, self.dqk)
        v = v.view(batch, length, self.heads, self.dv)
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        scores = scores + self._rel_attn_bias(times, next_times)[:, None]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = functional.silu(scores) / length * (causal & visible)
        read = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, length, wide)
        return u, functional.layer_norm(read, [wide], eps=1e-6)

    def forward(self, x: Tensor, times: Tensor, next_times: Tensor, present: Tensor) -> Tensor:
        u, read = self.gate_and_read(x, times, next_times, present[:, None, None, :])
        return self._o(u * read) + x


class PlainHSTU(nn.Module):
    def __init__(
        self, num_items: int, width: int, length: int, layers: int, heads: int, dqk: int, dv: int
    ) -> None:
        super().__init__()
        item_emb = nn.Embedding(num_items + 1, width, padding_idx=0)
        pos_emb = nn.Embedding(length, width)
        self._embedding_module = nn.ModuleDict({"_item_emb": item_emb})
        self._input_features_preproc = nn.ModuleDict({"_pos_emb": pos_emb})
        stack = nn.ModuleList(PlainLayer(width, length, heads, dqk, dv) for _ in range(layers))
        self._hstu = nn.ModuleDict({"_attention_layers": stack})

    def forward(self, item_ids: Tensor, times: Tensor, next_times: Tensor) -> Tensor:
        """(B, N) each, items padded with 0 up to the model's own length -> (B, N, K)."""
        items = self.get_submodule("_embedding_module._item_emb")(item_ids)
        positions = self.get_parameter("_input_features_preproc._pos_emb.weight")
        x = items * math.sqrt(items.shape[2]) + positions
        present = item_ids != 0
        for layer in self.get_submodule("_hstu._attention_layers").children():
            x = layer(x, times, next_times, present)
        return x
