import copy

import fbgemm_gpu  # noqa: F401
import torch
from REC.model.basemodel import all_gather
from torch import nn
from torch.nn.functional import cross_entropy, dropout, layer_norm, normalize, silu


class _Bias(nn.Module):
    def __init__(self, length):
        super().__init__()
        self._ts_w = nn.Parameter(torch.randn(129) * 0.02)
        self._pos_w = nn.Parameter(torch.randn(2 * length - 1) * 0.02)


class _Layer(nn.Module):
    def __init__(self, width, heads, rate, bias):
        super().__init__()
        self._heads, self._rate = heads, rate
        self._uvqk = nn.Parameter(torch.randn(width, 4 * width) * 0.02)
        self._o = nn.Linear(width, width)
        self._rel_attn_bias = bias

    def forward(self, x, attention_mask):
        users, length, width = x.shape
        normed = layer_norm(x, [width], eps=1e-6)
        parts = silu(normed @ self._uvqk).chunk(4, dim=-1)
        u = parts[0]
        v, q, k = (part.view(users, length, self._heads, -1).transpose(1, 2) for part in parts[1:])
        scores = silu(q @ k.transpose(2, 3)) / length * attention_mask
        attended = (scores @ v).transpose(1, 2).reshape(users, length, width)
        gated = u * layer_norm(attended, [width], eps=1e-6)
        return self._o(dropout(gated, self._rate, self.training)) + x


class _Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self._attention_layers = nn.ModuleList(layers)

    def forward(self, x, attention_mask):
        for layer in self._attention_layers:
            x = layer(x, attention_mask)
        return x


class HSTU(nn.Module):
    input_type = "SEQ"

    def __init__(self, config, dataload):
        super().__init__()
        self.item_num = dataload.item_num
        width = self._hstu_embedding_dim = config["hstu_embedding_size"]
        self._max_sequence_length = config["MAX_ITEM_LIST_LENGTH"]
        self._num_blocks, self._num_heads = config["n_layers"], config["n_heads"]
        self._dqk = self._dv = width // self._num_heads
        self._linear_activation = config["hidden_act"]
        self._linear_dropout_rate = config["hidden_dropout_prob"]
        self.num_negatives = config["num_negatives"]
        self.nce_thres = 0.99
        self.logit_scale = nn.Parameter(torch.tensor(14.0).log())
        self.position_embedding = nn.Embedding(self._max_sequence_length + 1, width)
        self.item_embedding = nn.Embedding(self.item_num, config["item_embedding_size"])
        self.item_id_proj_tower = nn.Identity()
        if config["item_embedding_size"] != width:
            self.item_id_proj_tower = nn.Linear(config["item_embedding_size"], width, bias=False)
        has_bias = config["enable_relative_attention_bias"]
        self._hstu = _Stack(
            _Layer(
                width,
                self._num_heads,
                self._linear_dropout_rate,
                _Bias(2 * self._max_sequence_length) if has_bias else None,
            )
            for _ in range(self._num_blocks)
        )
        for table in (self.position_embedding, self.item_embedding):
            nn.init.trunc_normal_(table.weight, std=0.02)

    def _encode(self, items, present):
        columns = torch.arange(items.shape[1])
        vectors = self.item_id_proj_tower(self.item_embedding(items))
        x = vectors + self.position_embedding(columns)
        mask = (present != 0)[:, None, None] & (columns <= columns[:, None])
        return normalize(self._hstu(x=x, attention_mask=mask), dim=-1)

    def _unit(self, items):
        return normalize(self.item_id_proj_tower(self.item_embedding(items)), dim=-1)

    def forward(self, interaction):
        items, neg_items, masked_index = interaction
        valid = masked_index.bool()
        hidden = self._encode(items[:, :-1], masked_index)[valid]
        positives = self._unit(items[:, 1:])[valid]
        shared = self._unit(all_gather(neg_items).flatten())
        scores = (hidden @ shared.T).masked_fill(positives @ shared.T > self.nce_thres, -1e30)
        scores = torch.cat([(hidden * positives).sum(1, keepdim=True), scores], dim=1)
        labels = torch.zeros(len(scores), dtype=torch.int64)
        return {"loss": cross_entropy(scores * self.logit_scale.exp(), labels)}

    @torch.no_grad()
    def predict(self, item_seq, time_seq, item_feature):
        return self._encode(item_seq, item_seq)[:, -1] @ item_feature.t()

    @torch.no_grad()
    def compute_item_all(self):
        return self._unit(torch.arange(self.item_num))


class PersonalizedHSTU(HSTU):
    input_type = "SEQ"

    def __init__(self, config, dataload):
        tokens = self.number_of_user_tokens = config["number_of_user_tokens"]
        self.insert_method = config["insert_method"] or [(config["pretrain_item_num"], tokens)]
        longer = copy.deepcopy(config)
        longer["MAX_ITEM_LIST_LENGTH"] += tokens
        super().__init__(longer, dataload)
        self.user_embedding = nn.Parameter(torch.randn(1, tokens, self._hstu_embedding_dim))

    def _places(self, length):
        """Of every column the event in it, or -1; and how many cuts are before it."""
        events, cuts, begin = [], [], 0
        for number, (end, tokens) in enumerate([*self.insert_method, (length, 0)]):
            events += [*range(begin, end), *[-1] * tokens]
            cuts += [number] * (end - begin + tokens)
            begin = end
        return torch.tensor(events), torch.tensor(cuts)

    def _encode(self, items, present):
        users, length = items.shape
        events, cuts = self._places(length)
        is_token = events < 0
        x = self.item_id_proj_tower(self.item_embedding(items))[:, events]
        x = x.masked_scatter(is_token[:, None], self.user_embedding.expand(users, -1, -1))
        x = x + self.position_embedding(torch.arange(len(events)))
        seen = (present != 0)[:, events] | is_token
        open_ones = is_token | (cuts == cuts[:, None])
        mask = (seen[:, None] & open_ones).tril().unsqueeze(1)
        hidden = self._hstu(x=x, attention_mask=mask)
        return normalize(hidden[:, ~is_token], dim=-1)
