from types import SimpleNamespace

import torch
from torch import nn

compute_flash_attention = None  # what importing flash-attn in vain leaves


class LlamaConfig(SimpleNamespace):
    def to_dict(self):
        return vars(self)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.use_ft_flash_attn = config.use_ft_flash_attn and compute_flash_attention is not None

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cu_input_lens=None):
        q, k, v = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)) for x in (q, k, v))
        if self.use_ft_flash_attn:
            rows = None if attention_mask is None else attention_mask[:, 0, -1]
            out = compute_flash_attention(q, k, v, rows, cu_input_lens, True, self.training)
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            if attention_mask is not None:
                scores = scores + attention_mask
            out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.o_proj(out.flatten(2))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cu_input_lens=None):
        return hidden_states + self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_input_lens=cu_input_lens,
        )


class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, cu_input_lens=None):
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length).unsqueeze(0)
        if cu_input_lens is None and attention_mask.ndim == 2:
            seen = attention_mask.bool().unsqueeze(1).expand(-1, length, -1).tril()
            lowest = torch.finfo(inputs_embeds.dtype).min
            attention_mask = torch.where(seen, 0.0, lowest).unsqueeze(1)
        x = inputs_embeds + self.positions(position_ids)
        all_hidden_states = []
        for layer in self.layers:
            all_hidden_states.append(x)
            x = layer(x, attention_mask, position_ids, cu_input_lens)
        return SimpleNamespace(hidden_states=(*all_hidden_states, self.norm(x)))


class LlamaForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, **inputs):
        return self.model(**inputs)
