"""Item vectors with learned positions: what enters the encoder."""

from torch import nn
from torch.nn.functional import dropout


class LearnablePositionalEmbeddingInputFeaturesPreprocessor(nn.Module):
    def __init__(self, max_sequence_len, embedding_dim, dropout_rate):
        super().__init__()
        self._pos_emb = nn.Embedding(max_sequence_len, embedding_dim)
        nn.init.xavier_normal_(self._pos_emb.weight)
        self._rate = dropout_rate

    def forward(self, past_lengths, past_ids, past_embeddings, past_payloads):
        _, columns, width = past_embeddings.shape
        x = past_embeddings * width**0.5 + self._pos_emb.weight[:columns]
        present = (past_ids != 0).unsqueeze(2).to(x.dtype)
        return past_lengths, dropout(x, self._rate, self.training) * present, present
