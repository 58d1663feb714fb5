"""Random damage to a store: named when it is opened or verified, and never a traceback."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import write_log
from pyarrow import parquet

from hstu_xd.data import InteractionStore, store
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.errors import InputError

FILES = ("offsets.npy", "item_ids.npy", "timestamps.npy", "users.parquet", "catalog.parquet")
START = 1_500_000_000
SLOWLY = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    rows = [
        (f"u{n % 7}", f"i{n * 5 % 11}", ("books", "films")[n * 5 % 11 % 2], START + n * 977)
        for n in range(90)
    ]
    prepare_logs([str(write_log(folder / "log.csv", rows))], folder / "store")
    return folder / "store"


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    with TemporaryDirectory() as place:
        yield shutil.copytree(folder, Path(place, "store"))


def read_all(folder: Path, *, verify: bool) -> None:
    """Open a store and read all that a training reads."""
    opened = InteractionStore.open(folder, verify=verify)
    assert opened.catalog.num_items == opened.num_items
    for user in range(opened.num_users):
        token = opened.user_token(user)
        assert opened.user_index(token) == user
        items, times = opened.history(user)
        assert 0 < items.min() <= items.max() <= opened.num_items
        assert (np.diff(times) >= 0).all()


def edited(content: bytes, at: int, change: int) -> bytes:
    at %= len(content)
    return content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]


def check_damage(sound: Path, name: str, at: int, change: int) -> None:
    """One changed byte is found by --verify; without, what is read is still a store."""
    with copied(sound) as folder:
        file = folder / name
        file.write_bytes(edited(file.read_bytes(), at, change))
        with pytest.raises(InputError, match=r"(damaged|prepare the log again)"):
            read_all(folder, verify=True)
        try:
            read_all(folder, verify=False)
        except InputError as error:
            assert str(folder) in str(error)  # noqa: PT017


damages = {
    "name": st.sampled_from(FILES),
    "at": st.integers(0, 10**5),
    "change": st.integers(1, 255),
}


@settings(max_examples=30)
@given(**damages)
def test_one_changed_byte(sound: Path, name: str, at: int, change: int) -> None:
    check_damage(sound, name, at, change)


def test_users_are_as_many_as_the_file_says(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed byte can leave the number of rows in the footer and none in the column."""
    whole = parquet.read_table
    monkeypatch.setattr(parquet, "read_table", lambda file: whole(file)[:0])
    opened = InteractionStore.open(sound, verify=False)
    with pytest.raises(InputError, match=rf"users.parquet: .*holds 0 ids, not {opened.num_users}"):
        opened.user_token(0)


@pytest.mark.slow
@SLOWLY
@given(**damages)
def test_many_changed_bytes(sound: Path, name: str, at: int, change: int) -> None:
    check_damage(sound, name, at, change)


def check_manifest(sound: Path, at: int, text: bytes) -> None:
    """A damaged manifest is refused, or still describes the files that are there."""
    with copied(sound) as folder:
        file = folder / "manifest.json"
        content = file.read_bytes()
        at %= len(content)
        file.write_bytes(content[:at] + text + content[at + len(text) :])
        try:
            read_all(folder, verify=True)
        except InputError as error:
            assert str(folder) in str(error)  # noqa: PT017


texts = st.sampled_from([b"", b"9", b"-", b'"', b"{", b"]", b"null", b"\xff", b"\n", b"[[[["])


@settings(max_examples=30)
@given(st.integers(0, 10**5), texts)
def test_damaged_manifest(sound: Path, at: int, text: bytes) -> None:
    check_manifest(sound, at, text)


@pytest.mark.slow
@SLOWLY
@given(st.integers(0, 10**5), texts)
def test_many_damaged_manifests(sound: Path, at: int, text: bytes) -> None:
    check_manifest(sound, at, text)


def offsets_shuffled(values: np.ndarray) -> None:
    values[2], values[3] = values[3], values[2]


def first_moved(values: np.ndarray) -> None:
    values[0] = 1


def last_short(values: np.ndarray) -> None:
    values[-1] -= 1


def item_too_high(values: np.ndarray) -> None:
    values[40] = 12


def padding_item(values: np.ndarray) -> None:
    values[-1] = 0


def time_before(values: np.ndarray) -> None:
    values[5] = values[4] - 1


def negative_time(values: np.ndarray) -> None:
    values[0] = -1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets.npy", offsets_shuffled, "does not divide the events among the users"),
        ("offsets.npy", first_moved, "does not divide"),
        ("offsets.npy", last_short, "does not divide"),
        ("item_ids.npy", item_too_high, r"items outside 1\.\.11"),
        ("item_ids.npy", padding_item, r"items outside 1\.\.11"),
        ("timestamps.npy", time_before, "out of order"),
        ("timestamps.npy", negative_time, "out of order"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_arrays_that_contradict(
    name: str,
    change: Callable[[np.ndarray], None],
    message: str,
    large: bool,
    sound: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large:
        monkeypatch.setattr(store, "CHECKED_ALL", 10)
        monkeypatch.setattr(store, "CHECKED_BLOCK", 10)
    with copied(sound) as folder:
        values = np.load(folder / name)
        change(values)
        np.save(folder / name, values)
        with pytest.raises(InputError, match=rf"{name}: .*{message}.* damaged; prepare"):
            InteractionStore.open(folder)


def test_tables_of_another_store(sound: Path, tmp_path: Path) -> None:
    rows = [("u", "i0", "books", START), ("v", "i1", "films", START)]
    prepare_logs([str(write_log(tmp_path / "log.csv", rows))], tmp_path / "other")
    for name in ("users.parquet", "catalog.parquet"):
        with copied(sound) as folder:
            content = (tmp_path / "other" / name).read_bytes()
            (folder / name).write_bytes(content)
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["sizes"][name] = len(content)
            (folder / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(InputError, match=rf"{name}: has 2 rows"):
                InteractionStore.open(folder)


def test_a_change_that_only_hashes_show(sound: Path) -> None:
    with copied(sound) as folder:
        values = np.load(folder / "item_ids.npy")
        values[0] = values[0] % 11 + 1
        np.save(folder / "item_ids.npy", values)
        InteractionStore.open(folder)
        with pytest.raises(InputError, match=r"item_ids.npy: has another SHA-256"):
            InteractionStore.open(folder, verify=True)


@pytest.mark.parametrize("name", ["manifest.json", "offsets.npy", "users.parquet"])
def test_a_folder_in_the_place_of_a_file(name: str, sound: Path) -> None:
    with copied(sound) as folder:
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(InputError, match=name):
            InteractionStore.open(folder)


def test_unreadable_is_not_absent(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(InputError, match=r"manifest.json: cannot be read \(Permission denied\)"):
        InteractionStore.open(sound)


@pytest.mark.parametrize("name", ["offsets.npy", "users.parquet", "catalog.parquet"])
def test_unreadable_is_not_damaged(name: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(read: Callable[..., object]) -> Callable[..., object]:
        def refused(file: Path, *_: object, **__: object) -> object:
            if file.name == name:
                # As pyarrow words it; numpy's is the system's.
                raise PermissionError(13, f"Failed to open local file {str(file)!r}.")
            return read(file, *_, **__)

        return refused

    for library, reader in ((np, "load"), (parquet, "read_table"), (parquet, "ParquetFile")):
        monkeypatch.setattr(library, reader, refusing(getattr(library, reader)))
    message = rf"{name}: cannot be read \(Permission denied\); check the store"
    with pytest.raises(InputError, match=message):
        use(sound)


def use(folder: Path) -> None:
    """Read every file of a store."""
    opened = InteractionStore.open(folder)
    assert opened.catalog.num_items
    opened.user_index("nobody")


def test_unreadable_is_not_somebody_elses(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(InputError, match=r"manifest.json: cannot be read \(Permission denied\)"):
        store.is_store(sound)
