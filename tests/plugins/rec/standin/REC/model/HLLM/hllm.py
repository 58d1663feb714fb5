import json
from pathlib import Path

import torch
from REC.model.basemodel import all_gather
from REC.model.HLLM.modeling_llama import LlamaConfig, LlamaForCausalLM
from torch import nn
from torch.nn.functional import cross_entropy, normalize


class HLLM(nn.Module):
    input_type = "SEQ"

    def __init__(self, config, dataload):
        super().__init__()
        self.use_ft_flash_attn = config["use_ft_flash_attn"]
        self.item_llm = self.create_llm(config["item_pretrain_dir"])
        self.user_llm = self.create_llm(config["user_pretrain_dir"])
        width = self.item_llm.config.hidden_size
        self.item_emb_tokens = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(14.0).log())
        self.nce_thres = 0.99

    def create_llm(self, pretrain_dir, init=True):
        settings = json.loads((Path(pretrain_dir) / "config.json").read_text(encoding="utf-8"))
        return LlamaForCausalLM(LlamaConfig(**settings, use_ft_flash_attn=self.use_ft_flash_attn))

    def nce_loss(self, cur_embs, target_pos, target_neg, user_attention_mask):
        hidden, positives, negatives = (
            normalize(x, dim=-1) for x in (cur_embs, target_pos, target_neg)
        )
        shared = all_gather(negatives, sync_grads=True).flatten(0, -2).T
        scores = (hidden @ shared).masked_fill(positives @ shared > self.nce_thres, -1e30)
        logits = torch.cat([(hidden * positives).sum(-1, keepdim=True), scores], dim=-1)
        logits = logits[user_attention_mask.bool()] * self.logit_scale.exp()
        return logits, torch.zeros(len(logits), dtype=torch.int64)

    def forward_item_emb(self, interaction, kind):
        lengths = interaction[f"{kind}_cu_input_lens"]
        ends = lengths.cumsum(0) - 1
        vectors = self.item_llm.get_input_embeddings()(interaction[f"{kind}_input_ids"])
        vectors = vectors.index_copy(0, ends, self.item_emb_tokens[0].expand(len(ends), -1))
        output = self.item_llm(
            inputs_embeds=vectors.unsqueeze(0),
            cu_input_lens=lengths,
            position_ids=interaction[f"{kind}_position_ids"].unsqueeze(0),
        )
        return output.hidden_states[-1][0, ends]

    def forward(self, interaction, mode="train"):
        if mode == "predict":
            return self.predict(*interaction)
        if mode == "compute_item":
            return self.forward_item_emb(interaction, "pos")
        present = interaction["attention_mask"]
        items = self.forward_item_emb(interaction, "pos").unflatten(0, (len(present), -1))
        drawn = self.forward_item_emb(interaction, "neg").unflatten(0, (len(present), -1))
        hidden = self.user_llm(inputs_embeds=items[:, :-1], attention_mask=present)
        hidden = hidden.hidden_states[-1]
        return {"loss": cross_entropy(*self.nce_loss(hidden, items[:, 1:], drawn, present))}

    @torch.no_grad()
    def predict(self, item_seq, time_seq, item_feature):
        present = (item_seq > 0).int()
        hidden = self.user_llm(inputs_embeds=item_feature[item_seq], attention_mask=present)
        last = hidden.hidden_states[-1][:, -1]
        return normalize(last, dim=-1) @ normalize(item_feature, dim=-1).t()


class PersonalizedHLLM(HLLM):
    input_type = "SEQ"

    def __init__(self, config, dataload):
        super().__init__(config, dataload)
        self.number_of_user_tokens = config["number_of_user_tokens"]
        self.pretrain_item_num = config["pretrain_item_num"]
        self.drop_out = config["item_dropout"] or 0.0
        for layer in self.user_llm.model.layers:
            layer.self_attn.use_ft_flash_attn = False
        width = self.item_llm.config.hidden_size
        self.user_embedding = nn.Parameter(torch.randn(1, self.number_of_user_tokens, width))

    def _cut(self, x, tokens):
        """Lay tokens behind the old events."""
        return torch.cat(
            [x[:, : self.pretrain_item_num], tokens, x[:, self.pretrain_item_num :]], 1
        )

    def _hidden(self, vectors, present):
        """What the user LLM makes of vectors with tokens among them."""
        old, behind = self.pretrain_item_num, self.pretrain_item_num + self.number_of_user_tokens
        seen = (present != 0).unsqueeze(1).expand(-1, present.shape[1], -1).tril()
        seen[:, behind:, :old] = False
        mask = torch.where(seen, 0.0, torch.finfo(vectors.dtype).min).unsqueeze(1)
        return self.user_llm(inputs_embeds=vectors, attention_mask=mask).hidden_states[-1]

    def forward(self, interaction, mode="train"):
        if mode != "train":
            return super().forward(interaction, mode)
        present = interaction["attention_mask"]
        users, tokens = len(present), self.number_of_user_tokens
        items = self.forward_item_emb(interaction, "pos").unflatten(0, (users, -1))
        drawn = self.forward_item_emb(interaction, "neg").unflatten(0, (users, -1))
        items = self._cut(items, self.user_embedding.expand(users, -1, -1))
        drawn = self._cut(drawn, drawn[:, :tokens])
        hidden = self._hidden(items[:, :-1], self._cut(present, present.new_ones(users, tokens)))
        counted = self._cut(present, present.new_zeros(users, tokens))
        return {"loss": cross_entropy(*self.nce_loss(hidden, items[:, 1:], drawn, counted))}

    @torch.no_grad()
    def predict(self, item_seq, time_seq, item_feature):
        users, tokens = len(item_seq), self.number_of_user_tokens
        vectors = self._cut(item_feature[item_seq], self.user_embedding.expand(users, -1, -1))
        last = self._hidden(vectors, self._cut(item_seq, item_seq.new_ones(users, tokens)))[:, -1]
        return normalize(last, dim=-1) @ normalize(item_feature, dim=-1).t()
