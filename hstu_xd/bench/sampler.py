"""``bench sampler``: training sequences per second from a prepared store, in one process."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore

# The store that is made where none is given has enough users for a batch without repetition.
_USERS = 2000
_MEAN_LENGTH = 400.0


def measure_sampler(
    data: Path | None, *, history: int, batch_size: int, repeats: int
) -> list[dict[str, Any]]:
    """Time training batches, against a reader that takes users one by one.

    Args:
        data: a prepared store; None makes a synthetic one in a temporary folder.
        history: longest history of a sample.
        batch_size: number of users of a batch.
        repeats: number of timed batches of each provider.

    Returns:
        Rows with the keys of the other benchmarks, and ``samples_per_second``.
    """
    if data is not None:
        return _rows(InteractionStore.open(data), history, batch_size, repeats)
    from hstu_xd.data.synthetic import SynthOptions, synthesize

    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        synthesize(store, SynthOptions(users=_USERS, mean_length=_MEAN_LENGTH))
        return _rows(InteractionStore.open(store), history, batch_size, repeats)


def _rows(
    store: InteractionStore, history: int, batch_size: int, repeats: int
) -> list[dict[str, Any]]:
    sequences = SequenceData(store, Split.TRAIN, history)
    rng = np.random.default_rng(0)
    draws = [
        rng.choice(sequences.users, min(batch_size, sequences.users.size), replace=False)
        for _ in range(repeats + 1)
    ]
    providers = {
        "batches": lambda users: _fields(sequences, users),
        "one by one": lambda users: _one_by_one(store, users, history),
    }
    found = [provide(draws[0]) for provide in providers.values()]
    correct = all(np.array_equal(a, b) for a, b in zip(*found))
    rows = []
    for name, provide in providers.items():
        times = np.array([_milliseconds(provide, users) for users in draws[1:]])
        low, median, high = np.percentile(times, [20, 50, 80])
        rows.append(
            {
                "provider": name,
                "seq_len": history,
                "num_domains": store.num_domains,
                "skew": None,
                "dtype": "int64",
                "device": "cpu",
                "ms_median": median if correct else None,
                "ms_p20": low if correct else None,
                "ms_p80": high if correct else None,
                "peak_bytes": None,
                "correct": correct,
                "what": "sampler",
                "batch_size": draws[0].size,
                "tokens_per_sample": float(sequences.lengths(draws[0]).mean()),
                "samples_per_second": draws[0].size / median * 1e3 if correct else None,
            }
        )
    return rows


def _milliseconds(provide: Any, users: np.ndarray) -> float:
    start = time.perf_counter()
    provide(users)
    return (time.perf_counter() - start) * 1e3


def _fields(sequences: SequenceData, users: np.ndarray) -> list[np.ndarray]:
    batch, targets = sequences.batch(users)
    tensors = batch.item_ids, batch.timestamps, batch.next_timestamps, batch.offsets, targets
    return [tensor.numpy() for tensor in tensors]


def _one_by_one(store: InteractionStore, users: np.ndarray, history: int) -> list[np.ndarray]:
    """Build the same batch by a loop over users, as a data set of single samples does."""
    items, times, next_times, targets, lengths = [], [], [], [], [0]
    for user in users:
        item_ids, timestamps = store.history(int(user))
        last = len(item_ids) - (3 if len(item_ids) >= 3 else 1)
        first = max(0, last - history)
        items.append(np.array(item_ids[first:last], np.int64))
        times.append(np.array(timestamps[first:last]))
        next_times.append(np.array(timestamps[first + 1 : last + 1]))
        targets.append(np.array(item_ids[first + 1 : last + 1], np.int64))
        lengths.append(last - first)
    columns = [np.concatenate(parts) for parts in (items, times, next_times)]
    return [*columns, np.cumsum(lengths), np.concatenate(targets)]
