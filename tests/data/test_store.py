"""Opening a store: light, read-only, and clear about what is wrong with a damaged one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from log_files import write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.errors import InputError

ROWS = [
    ("bob", "b2", "books", 5),
    ("ann", "f1", "films", 2),
    ("ann", "b1", "books", 1),
    ("cy", "f1", "films", 9),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_logs([str(write_log(tmp_path / "log.csv", ROWS))], tmp_path / "store")
    return tmp_path / "store"


def test_contents(folder: Path) -> None:
    store = InteractionStore.open(folder)
    assert store.path == folder
    assert (store.num_users, store.num_items, store.num_interactions) == (3, 3, 4)
    assert store.num_domains == 2
    assert store.domain_names == ["books", "films"]
    assert [store.user_token(u) for u in range(3)] == ["ann", "bob", "cy"]
    assert [store.user_index(name) for name in ("ann", "bob", "cy")] == [0, 1, 2]
    items, times = store.history(0)
    assert (items.tolist(), times.tolist()) == ([1, 3], [1, 2])
    assert (items.dtype, times.dtype, store.offsets.dtype) == (np.int32, np.int64, np.int64)
    assert store.offsets.tolist() == [0, 2, 3, 4]
    assert "users=3" in repr(store)


def test_catalogue(folder: Path) -> None:
    catalog = InteractionStore.open(str(folder)).catalog
    assert list(catalog.domain_names) == ["books", "films"]
    assert catalog.item_domains.tolist() == [-1, 0, 0, 1]


def test_arrays_are_mapped_read_only(folder: Path) -> None:
    store = InteractionStore.open(folder)
    assert isinstance(store.item_ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.item_ids[0] = 1


@pytest.mark.parametrize(("asked", "near"), [("bop", "bob"), ("Ann", "ann"), ("zzz", "")])
def test_unknown_user(asked: str, near: str, folder: Path) -> None:
    with pytest.raises(InputError, match=rf"no user '{asked}' among 3; did you mean '{near}"):
        InteractionStore.open(folder).user_index(asked)


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range(index: int, folder: Path) -> None:
    store = InteractionStore.open(folder)
    for method in (store.history, store.user_token):
        with pytest.raises(InputError, match=rf"user index {index} is outside 0\.\.2"):
            method(index)


@pytest.mark.parametrize(
    "name", ["offsets.npy", "item_ids.npy", "timestamps.npy", "catalog.parquet", "users.parquet"]
)
def test_truncated_store(name: str, folder: Path) -> None:
    file = folder / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{name}: has {size - 1} bytes instead of {size}.*again"):
        InteractionStore.open(folder)
    file.unlink()
    with pytest.raises(InputError, match=rf"{name}: is missing.*prepare the log again"):
        InteractionStore.open(folder)


def test_array_that_is_none(folder: Path) -> None:
    file = folder / "offsets.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(InputError, match=r"offsets.npy: damaged .*again"):
        InteractionStore.open(folder)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_other_version(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format_version=7))
    with pytest.raises(
        InputError, match=r"format version 7; this hstu-xd reads 1; prepare .*force"
    ):
        InteractionStore.open(folder)


def test_counts_that_do_not_fit(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(users=9))
    with pytest.raises(InputError, match=r"offsets.npy: holds int64 \(4,\) where .* \(10,\)"):
        InteractionStore.open(folder)


def test_damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"users": ')
    with pytest.raises(InputError, match=r"manifest.json: damaged"):
        InteractionStore.open(folder)


@pytest.mark.parametrize("name", ["users", "domains", "sizes"])
def test_manifest_that_lacks_a_key(name: str, folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop(name))
    with pytest.raises(InputError, match=rf"damaged, it lacks '{name}'; prepare the log again"):
        InteractionStore.open(folder)


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"no prepared store here .*hstu-xd prepare"):
            InteractionStore.open(path)
