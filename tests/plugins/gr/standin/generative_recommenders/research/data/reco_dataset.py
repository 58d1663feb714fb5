"""MovieLens-1M as its two files describe it."""

import csv
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from .dataset import DatasetV2


@dataclass
class RecoDataset:
    max_sequence_length: int
    num_unique_items: int
    max_item_id: int
    all_item_ids: list[int]
    train_dataset: Dataset
    eval_dataset: Dataset


def get_reco_dataset(
    dataset_name, max_sequence_length, chronological, positional_sampling_ratio=1.0
):
    assert dataset_name == "ml-1m", dataset_name
    assert (chronological, positional_sampling_ratio) == (True, 1.0)
    with Path("tmp/processed/ml-1m/movies.csv").open(encoding="utf-8") as file:
        items = [int(row["movie_id"]) for row in csv.DictReader(file)]
    samples = [
        DatasetV2("tmp/ml-1m/sasrec_format.csv", max_sequence_length + 1, ignore_last_n)
        for ignore_last_n in (1, 0)
    ]
    return RecoDataset(max_sequence_length, len(items), max(items), items, *samples)
