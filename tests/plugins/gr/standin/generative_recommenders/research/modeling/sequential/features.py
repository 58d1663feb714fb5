"""Samples as an encoder reads them: room behind the history, the target's time in it."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


class SequentialFeatures(NamedTuple):
    past_lengths: Tensor
    past_ids: Tensor
    past_embeddings: Tensor | None
    past_payloads: dict[str, Tensor]


def movielens_seq_features_from_row(row, device, max_output_length):
    row = {name: value.to(device) for name, value in row.items()}
    ids, ratings, times = (
        pad(row[f"historical_{name}"], (0, max_output_length))
        for name in ("ids", "ratings", "timestamps")
    )
    lengths = row["history_lengths"]
    times = times.scatter(1, lengths.unsqueeze(1), row["target_timestamps"].unsqueeze(1))
    features = SequentialFeatures(lengths, ids, None, {"timestamps": times, "ratings": ratings})
    return features, row["target_ids"].unsqueeze(1), row["target_ratings"].unsqueeze(1)
