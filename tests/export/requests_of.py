"""Requests of all shapes that an exported encoder meets."""

import torch
from tiny_models import NUM_DOMAINS, draw_histories
from torch import Tensor

Request = tuple[Tensor, Tensor, Tensor]


def request(lengths: list[int], columns: int, *, items: int, seed: int = 0) -> Request:
    """(B, N), (B, N) and (B,): histories of these lengths, padded to ``columns`` events."""
    histories = draw_histories(lengths, seed)
    item_ids = torch.zeros(len(lengths), columns, dtype=torch.int64)
    timestamps = torch.zeros_like(item_ids)
    for row, history in enumerate(histories):
        kept = len(history.items)
        item_ids[row, :kept] = (torch.tensor(history.items, dtype=torch.int64) - 1) % items + 1
        timestamps[row, :kept] = torch.tensor(history.times, dtype=torch.int64)
    return item_ids, timestamps, torch.arange(len(lengths)) % NUM_DOMAINS


def requests(window: int, *, items: int) -> list[Request]:
    """One user and several, one event and many, with padding at the end and without."""
    shapes = [
        ([1], 1),
        ([1], 4),
        ([1, 1], 1),
        ([2], 2),
        ([2, 1], 2),
        ([7], 7),
        ([3, 7, 5], 9),
        ([window], window),
        ([1, window, 7, 2], window),
    ]
    return [
        request(lengths, columns, items=items, seed=seed)
        for seed, (lengths, columns) in enumerate(shapes)
    ]
