"""Samples of a file with one user a row."""

import csv
from pathlib import Path

import torch
from torch.utils.data import Dataset

COLUMNS = {name: f"sequence_{name}" for name in ("ratings", "timestamps")}
COLUMNS["ids"] = "sequence_item_ids"


class DatasetV2(Dataset):
    def __init__(self, ratings_file, padding_length, ignore_last_n):
        with Path(ratings_file).open(encoding="utf-8") as file:
            self._rows = list(csv.DictReader(file))
        self._history_length, self._ignore_last_n = padding_length - 1, ignore_last_n

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, idx):
        sample = {"user_id": int(self._rows[idx]["user_id"])}
        for name, column in COLUMNS.items():
            events = [int(value) for value in self._rows[idx][column].split(",")]
            *history, sample[f"target_{name}"] = events[: len(events) - self._ignore_last_n]
            history = history[-self._history_length :]
            padding = [0] * (self._history_length - len(history))
            sample[f"historical_{name}"] = torch.tensor(history + padding)
            sample["history_lengths"] = len(history)
        return sample
