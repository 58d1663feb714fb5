"""Samples of a store against a slow reading of their definition, and against upstream's class."""

import multiprocessing
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from generative_recommenders.research.data.dataset import DatasetV2
from torch.utils.data import DataLoader, default_collate
from upstream_choice import real_upstream_only

from hstu_xd.data.store import InteractionStore
from hstu_xd.data.store_files import Log, write_store
from hstu_xd.data.upstream_csv import SEQUENCES, write_upstream_csv
from hstu_xd.errors import InputError
from hstu_xd.plugins.gr.research.dataset import StoreDataset, hold_out, split_datasets

KEYS = ["user_id", "historical_ids", "historical_ratings", "historical_timestamps"]
KEYS += ["history_lengths", "target_ids", "target_ratings", "target_timestamps"]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40, 3, 3, 120]
NUM_ITEMS = 30


def random_log() -> Log:
    rng = np.random.default_rng(3)
    events = sum(SIZES)
    item, time = rng.integers(0, NUM_ITEMS, events, dtype=np.int32), rng.integers(0, 2**40, events)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    return Log(
        users=pl.Series([f"u{n:02}" for n in range(len(SIZES))]),
        items=pl.DataFrame(
            {
                "item": [f"i{n:02}" for n in range(NUM_ITEMS)],
                "domain": ["books"] * 9 + ["toys"] * 21,
            }
        ),
        offsets=offsets,
        item_ids=item + np.int32(1),
        time=np.concatenate([np.sort(part) for part in np.split(time, offsets[1:-1])]),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    folder = tmp_path_factory.mktemp("store")
    write_upstream_csv(folder, random_log(), block_events=50)
    write_store(folder, random_log(), {"synthetic": True})
    return InteractionStore.open(folder)


def plain_sample(
    store: InteractionStore, user: int, length: int, ignore_last: int
) -> dict[str, Any]:
    """The definition, event by event."""
    items, times = (values.tolist() for values in store.history(user))
    last = len(items) - 1 - ignore_last
    window = range(max(0, last - length), last)
    zeros = [0] * (length - len(window))
    return {
        "user_id": user,
        "historical_ids": [items[n] for n in window] + zeros,
        "historical_ratings": [5] * len(window) + zeros,
        "historical_timestamps": [times[n] for n in window] + zeros,
        "history_lengths": len(window),
        "target_ids": items[last],
        "target_ratings": 5,
        "target_timestamps": times[last],
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return list(left) == list(right) and all(
        type(left[key]) is type(right[key])
        and torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key]))
        for key in left
    )


@pytest.mark.parametrize("ignore_last", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 7, 200])
def test_samples(store: InteractionStore, length: int, ignore_last: int) -> None:
    dataset = StoreDataset(store, length, ignore_last=ignore_last)
    users = [user for user, size in enumerate(SIZES) if size >= ignore_last + 2]
    assert len(dataset) == len(users)
    for index, user in enumerate(users):
        sample = dataset[index]
        assert list(sample) == KEYS
        assert [type(sample[key]) for key in KEYS] == [int] + [torch.Tensor] * 3 + [int] * 4
        plain = {
            key: value.tolist() if isinstance(value, torch.Tensor) else value
            for key, value in sample.items()
        }
        assert plain == plain_sample(store, user, length, ignore_last)
    assert all(value.dtype == torch.int64 for value in default_collate([dataset[0]]).values())


def test_a_batch_is_its_samples(store: InteractionStore) -> None:
    dataset = StoreDataset(store, 7, ignore_last=1)
    order = [5, 0, 11, 11, 3, len(dataset) - 1]
    batch = dataset.__getitems__(order)
    assert all(same(sample, dataset[index]) for sample, index in zip(batch, order))
    assert same(dataset[-1], dataset[len(dataset) - 1])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"sample {index} of {len(dataset)}"):
            dataset[index]


def test_sampling_keeps_events_in_order_and_a_history(store: InteractionStore) -> None:
    dataset = StoreDataset(store, 200, ignore_last=1, sample_ratio=0.3)
    lengths = []
    for _ in range(20):
        for sample in dataset.__getitems__(range(len(dataset))):
            items, times = store.history(sample["user_id"])
            allowed = list(zip(items[:-1].tolist(), times[:-1].tolist()))
            size = sample["history_lengths"]
            ids, stamps = sample["historical_ids"], sample["historical_timestamps"]
            kept = list(zip(ids[:size].tolist(), stamps[:size].tolist()))
            kept.append((sample["target_ids"], sample["target_timestamps"]))
            assert 2 <= len(kept) <= len(allowed)
            rest = iter(allowed)
            assert all(event in rest for event in kept)  # a subsequence
            assert not ids[size:].any()
            if len(allowed) == 119:
                lengths.append(len(kept))
            if len(allowed) == 2:
                assert kept == allowed
    assert np.mean(lengths) == pytest.approx(0.3 * 119, rel=0.1)


def test_sampling_draws_anew(store: InteractionStore) -> None:
    dataset = StoreDataset(store, 200, ignore_last=0, sample_ratio=0.5)
    last = len(dataset) - 1
    assert not same(dataset[last], dataset[last])
    torch.manual_seed(5)
    first = dataset[last]
    torch.manual_seed(5)
    assert same(first, dataset[last])


@pytest.mark.parametrize(
    ("split", "train", "evaluate"), [("upstream", 1, 0), ("valid", 2, 1), ("test", 2, 0)]
)
def test_splits(store: InteractionStore, split: str, train: int, evaluate: int) -> None:
    pair = split_datasets(store, 9, sample_ratio=0.5, split=split)
    assert [dataset.ignore_last for dataset in pair] == [train, evaluate]
    assert [dataset.sample_ratio for dataset in pair] == [0.5, 1.0]
    assert [dataset.max_sequence_length for dataset in pair] == [9, 9]
    assert [SIZES[user] for user in pair[0].users] == [n for n in SIZES if n >= train + 2]
    assert [SIZES[user] for user in pair[1].users] == [n for n in SIZES if n >= 3]


def test_training_never_sees_the_targets_of_evaluation(store: InteractionStore) -> None:
    for split, held_out in (("valid", 2), ("test", 2)):
        train, _ = split_datasets(store, 200, split=split)
        for sample in train.__getitems__(range(len(train))):
            items, _ = store.history(sample["user_id"])
            seen = sample["historical_ids"][: sample["history_lengths"]].tolist()
            assert [*seen, sample["target_ids"]] == items[:-held_out].tolist()


def test_a_pickled_dataset_is_a_path(store: InteractionStore) -> None:
    dataset = StoreDataset(store, 7, ignore_last=2, sample_ratio=0.9, min_events=5)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert isinstance(copy.store.item_ids, np.memmap)
    assert (copy.sample_ratio, copy.ignore_last, copy.min_events) == (0.9, 2, 5)
    assert copy.users.tolist() == dataset.users.tolist()


def test_workers(store: InteractionStore) -> None:
    dataset = StoreDataset(store, 7, ignore_last=1)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    loader = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context=method)
    expected = DataLoader(dataset, batch_size=5)
    batches = list(zip(loader, expected, strict=True))
    assert sum(batch["user_id"].numel() for batch, _ in batches) == len(dataset)
    assert all(same(found, wanted) for found, wanted in batches)


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (0, {"ignore_last": 1}, "max_sequence_length is 0; at least 1 is needed"),
        (5, {"ignore_last": -1}, "ignore_last is -1; 0 or more"),
        (5, {"ignore_last": 1, "sample_ratio": 0}, "sample_ratio is 0; a share above 0"),
        (5, {"ignore_last": 1, "sample_ratio": 1.5}, "sample_ratio is 1.5; a share above 0"),
        (5, {"ignore_last": 119}, "no user has the 121 events needed when the last 119 are left"),
        (5, {"ignore_last": 1, "min_events": 121}, "no user has the 121 events needed"),
    ],
)
def test_messages(
    store: InteractionStore, length: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        StoreDataset(store, length, **settings)


def test_unknown_split(store: InteractionStore) -> None:
    message = re.escape("unknown split 'validation'; known: upstream, valid, test")
    with pytest.raises(InputError, match=message):
        split_datasets(store, 5, split="validation")
    with pytest.raises(InputError, match=message):
        hold_out(object(), object(), split="validation")  # pyrefly: ignore
    dataset = StoreDataset(store, 5, ignore_last=0)
    with pytest.raises(InputError, match="StoreDataset has no _ignore_last_n; only datasets of"):
        hold_out(dataset, dataset, split="test")


as_upstream = real_upstream_only(
    "equality of samples with upstream's DatasetV2, and its three-way split"
)


def upstream_dataset(folder: Path, length: int, ignore_last: int, **more: Any) -> Any:
    return DatasetV2(
        ratings_file=str(folder / SEQUENCES),
        padding_length=length + 1,
        ignore_last_n=ignore_last,
        chronological=True,
        **more,
    )


@as_upstream
@pytest.mark.parametrize("ignore_last", [0, 1])
@pytest.mark.parametrize("length", [1, 7, 200])
def test_samples_are_upstreams(store: InteractionStore, length: int, ignore_last: int) -> None:
    theirs = upstream_dataset(store.path, length, ignore_last)
    ours = StoreDataset(store, length, ignore_last=ignore_last, min_events=3)
    assert len(ours) == len(theirs) == sum(size >= 3 for size in SIZES)
    everything = range(len(ours))
    ours_batch, theirs_batch = (
        default_collate([dataset[index] for index in everything]) for dataset in (ours, theirs)
    )
    assert same(ours_batch, theirs_batch)
    assert {key: value.dtype for key, value in ours_batch.items()} == {
        key: value.dtype for key, value in theirs_batch.items()
    }
    assert same(ours_batch, default_collate(ours.__getitems__(everything)))


@as_upstream
def test_sampling_is_upstreams(store: InteractionStore) -> None:
    """Under one seed the same events are kept, one by one and by the batch."""
    theirs = upstream_dataset(store.path, 20, 1, sample_ratio=0.6)
    ours = StoreDataset(store, 20, ignore_last=1, sample_ratio=0.6)
    enough = [n for n, user in enumerate(ours.users) if SIZES[user] >= 17]
    torch.manual_seed(11)
    expected = default_collate([theirs[index] for index in enough])
    torch.manual_seed(11)
    assert same(default_collate([ours[index] for index in enough]), expected)
    torch.manual_seed(11)
    assert same(default_collate(ours.__getitems__(enough)), expected)


@as_upstream
@pytest.mark.parametrize("split", ["upstream", "valid", "test"])
def test_hold_out(store: InteractionStore, split: str, caplog: pytest.LogCaptureFixture) -> None:
    given = [upstream_dataset(store.path, 9, ignore_last) for ignore_last in (1, 0)]
    before = [dataset[4] for dataset in given]  # now in the cache
    for theirs, ours in zip(
        hold_out(given[0], given[1], split=split), split_datasets(store, 9, split=split)
    ):
        assert len(theirs) == len(ours)
        for index in range(len(ours)):
            assert same(default_collate([theirs[index]]), default_collate([ours[index]]))
    assert [dataset._ignore_last_n for dataset in given] == [1, 0]
    assert all(same(sample, dataset[4]) for sample, dataset in zip(before, given))
    assert ("3 of 12 users are left out: they have fewer than 4 events" in caplog.text) == (
        split != "upstream"
    )
