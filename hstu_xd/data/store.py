"""The prepared store: a memory-mapped log of time-ordered histories with its item catalogue."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.event_fields import NO_FIELDS, EventFields
from hstu_xd.data.item_features import StoredFeatures
from hstu_xd.data.mapped_files import (
    damage_named,
    damaged,
    map_array,
    read_values,
    unreadable,
)
from hstu_xd.data.taxonomy import Taxonomy
from hstu_xd.errors import InputError
from hstu_xd.files import sha256_of

if TYPE_CHECKING:
    import polars as pl

    from hstu_xd.catalog import DomainCatalog

NEIGHBOURS = 1000
# Stores of up to so many events are checked whole when they are opened, larger ones in blocks.
CHECKED_ALL = 1 << 23
CHECKED_BLOCK = 1 << 16
CHECKED_BLOCKS = 64
REQUIRED = ("users", "items", "interactions", "domains", "sizes", "hashes")


class InteractionStore:
    """Histories of all users, one after the other, mapped from disk.

    Attributes:
        path: the folder.
        manifest: counts, filters, hashes and version as written by ``hstu-xd prepare``.
        offsets: (num_users + 1,) int64; user u's events are ``offsets[u]:offsets[u + 1]``.
        item_ids: (num_interactions,) int32 in 1..num_items, in time order within a user.
        timestamps: (num_interactions,) int64, seconds.

    Example:
        >>> store = InteractionStore.open(Path("prepared"))
        >>> item_ids, timestamps = store.history(store.user_index("u000000"))
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        offsets: NDArray[np.int64],
        item_ids: NDArray[np.int32],
        timestamps: NDArray[np.int64],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.offsets = offsets
        self.item_ids = item_ids
        self.timestamps = timestamps

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> "InteractionStore":
        """Map a store, and check what can be checked without reading all of it.

        Sizes, offsets and tables are checked whole; item ids and times in the store's first and
        last events and in blocks in between, which is all of a store of a few million events.

        Args:
            path: the folder.
            verify: compare the hash of every file, too, which reads the store once.

        Raises:
            InputError: no store there, one of another format version, or a damaged one.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        for name in _files_of(manifest):
            _check_size(folder / name, manifest)
        if verify:
            _check_hashes(folder, manifest)
        users, events = manifest["users"], manifest["interactions"]
        arrays = (
            map_array(folder / store_files.OFFSETS, users + 1, np.dtype("<i8")),
            map_array(folder / store_files.ITEM_IDS, events, np.dtype("<i4")),
            map_array(folder / store_files.TIMESTAMPS, events, np.dtype("<i8")),
        )
        _check_tables(folder, manifest)
        _check_arrays(folder, manifest, *arrays)
        return cls(folder, manifest, *arrays)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return self.manifest["users"]

    @property
    def num_items(self) -> int:
        """Number of items; item ids are 1..num_items."""
        return self.manifest["items"]

    @property
    def num_interactions(self) -> int:
        """Number of events of all users together."""
        return self.manifest["interactions"]

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains; the place in the list is the domain's id."""
        return list(self.manifest["domains"])

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return len(self.manifest["domains"])

    @cached_property
    def catalog(self) -> "DomainCatalog":
        """The item -> domain table, read at first use."""
        from hstu_xd.catalog import DomainCatalog

        file = self.path / store_files.CATALOG
        with damage_named(file):
            catalog = DomainCatalog.load(file)
        if list(catalog.domain_names) != self.domain_names:
            raise damaged(file, f"has domains {list(catalog.domain_names)}")
        if catalog.num_items != self.num_items:
            raise damaged(file, f"holds {catalog.num_items} items, not {self.num_items}")
        return catalog

    @cached_property
    def fields(self) -> EventFields:
        """Fields of the events, their codes mapped; none where the log was prepared without."""
        described = self.manifest.get("event_fields")
        if described is None:
            return NO_FIELDS
        shape = (len(described), self.num_interactions)
        codes = map_array(self.path / store_files.EVENT_FIELDS, shape, np.dtype("<i4"))
        counts = [each["values"] for each in described.values()]
        values = read_values(self.path / store_files.EVENT_VALUES, list(described), counts)
        return EventFields(tuple(described), codes, values)

    @cached_property
    def taxonomy(self) -> Taxonomy | None:
        """Levels of the items; None where the log was prepared without."""
        described = self.manifest.get("levels")
        files = store_files.ITEM_LEVELS, store_files.LEVEL_VALUES
        return self._nodes(described, *files) if described is not None else None

    @cached_property
    def features(self) -> StoredFeatures | None:
        """Features of the items; None where the log was prepared without."""
        described = self.manifest.get("item_features")
        if described is None:
            return None
        files = store_files.ITEM_CATEGORIES, store_files.CATEGORY_VALUES
        categories = self._nodes(described["categories"], *files)
        widths = [each["width"] for each in described["numbers"].values()]
        if not widths:
            return StoredFeatures(categories, {})
        shape = (self.num_items, sum(widths))
        values = map_array(self.path / store_files.ITEM_NUMBERS, shape, np.dtype("<f4"))
        parts = np.split(values, np.cumsum(widths)[:-1], axis=1)
        return StoredFeatures(categories, dict(zip(described["numbers"], parts)))

    def _nodes(self, described: dict[str, Any], codes: str, values: str) -> Taxonomy | None:
        """Map the codes of levels or categories and read their values; None without any."""
        if not described:
            return None
        nodes = map_array(self.path / codes, (len(described), self.num_items), np.dtype("<i4"))
        counts = [each["nodes"] for each in described.values()]
        return Taxonomy(
            tuple(described), nodes, read_values(self.path / values, list(described), counts)
        )

    @cached_property
    def _users(self) -> "pl.Series":
        import polars as pl
        from pyarrow import parquet

        file = self.path / store_files.USERS
        with damage_named(file):  # polars panics on some damaged files, pyarrow raises
            users = pl.Series("user", parquet.read_table(file.absolute())["user"])
        # A file may say in one place that it has rows and in another that it has none.
        if len(users) != self.num_users:
            raise damaged(file, f"holds {len(users)} ids, not {self.num_users}")
        if users.dtype != pl.String or users.null_count() or not (users[1:] > users[:-1]).all():
            raise damaged(file, "does not hold sorted ids")
        return users

    def user_index(self, token: str) -> int:
        """Return the number of the user with this id in the log.

        Raises:
            InputError: unknown user; the message names the nearest.
        """
        found = self.find_user(token)
        if found is not None:
            return found
        users, at = self._users, self._place(token)
        # Neighbours in sorted order share the longest beginnings; all of millions is too slow.
        pool = users.slice(max(0, at - NEIGHBOURS // 2), NEIGHBOURS).to_list()
        near = get_close_matches(token, pool, n=1, cutoff=0.5) or pool[:1]
        raise InputError(
            f"{self.path}: no user {token!r} among {len(users)}; did you mean {near[0]!r}?"
        )

    def has_user(self, token: str) -> bool:
        """Whether there is a user with this id in the log."""
        return self.find_user(token) is not None

    def find_user(self, token: str) -> int | None:
        """Return the number of the user with this id in the log; None where there is none."""
        users, at = self._users, self._place(token)
        return at if at < len(users) and users[at] == token else None

    def users_from(self, token: str, limit: int) -> list[str]:
        """Return ids of at most ``limit`` users, in order, from the first not below a text."""
        return self._users.slice(self._place(token), limit).to_list()

    def users_at(self, tokens: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of each user with one of these ids; -1 where there is none."""
        import polars as pl

        wanted = pl.DataFrame({"user": pl.Series(tokens, dtype=pl.String)})
        known = pl.DataFrame({"user": self._users}).with_row_index("number")
        found = wanted.join(known, on="user", how="left", maintain_order="left")["number"]
        return found.cast(pl.Int64).fill_null(-1).to_numpy()

    def user_tokens(self, indices: NDArray[np.int64]) -> "pl.Series":
        """Return the ids in the log of the users with these numbers."""
        return self._users.gather(indices)

    def user_token(self, index: int) -> str:
        """Id in the log of the user with this number.

        Raises:
            InputError: a number outside 0..num_users - 1.
        """
        self._check_index(index)
        return self._users[index]

    def history(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Item ids and timestamps of one user, oldest first, as read-only views.

        Raises:
            InputError: a number outside 0..num_users - 1.
        """
        self._check_index(index)
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.item_ids[rows], self.timestamps[rows]

    def _place(self, token: str) -> int:
        """How many users' ids are below this one: they are sorted."""
        # Polars has the same order; its own search takes ten times as long for a single id.
        return bisect_left(self._users, token)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_users:
            raise InputError(f"{self.path}: user index {index} is outside 0..{self.num_users - 1}")

    def __repr__(self) -> str:
        return (
            f"InteractionStore({str(self.path)!r}, users={self.num_users}, "
            f"items={self.num_items}, interactions={self.num_interactions}, "
            f"domains={self.num_domains})"
        )


def is_store(folder: Path) -> bool:
    """Whether a folder holds a prepared store of any format version, damaged or not.

    Raises:
        InputError: the permission to read its manifest is denied.
    """
    try:
        manifest = json.loads((folder / store_files.MANIFEST).read_text(encoding="utf-8"))
    except PermissionError as error:
        raise unreadable(folder / store_files.MANIFEST, error) from error
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest and "domains" in manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / store_files.MANIFEST
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder}: no prepared store here (no {store_files.MANIFEST}); make one with "
            "hstu-xd prepare or hstu-xd synth"
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        manifest = json.loads(text)
        found = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: damaged or not a store's manifest; prepare it again") from error
    if found != store_files.FORMAT_VERSION:
        raise InputError(
            f"{file}: store of format version {found!r}; this hstu-xd reads "
            f"{store_files.FORMAT_VERSION}; prepare the log again with --force"
        )
    missing = [name for name in REQUIRED if name not in manifest]
    if not missing and isinstance(manifest["sizes"], dict):
        missing = [name for name in store_files.DATA_FILES if name not in manifest["sizes"]]
    if missing:
        raise InputError(f"{file}: damaged, it lacks {missing[0]!r}; prepare the log again")
    if not _adds_up(manifest):
        raise InputError(
            f"{file}: damaged, its counts contradict each other; prepare the log again"
        )
    return manifest


def _adds_up(manifest: dict[str, Any]) -> bool:
    """Tell whether a manifest's counts are counts and those of the domains give the total."""
    counts = [manifest[name] for name in ("users", "items", "interactions")]
    domains, sizes = manifest["domains"], manifest["sizes"]
    if not isinstance(domains, dict) or not isinstance(sizes, dict) or not domains:
        return False
    try:
        counts += [one[name] for one in domains.values() for name in ("items", "interactions")]
    except (KeyError, TypeError):
        return False
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and sum(one["items"] for one in domains.values()) == manifest["items"]
        and sum(one["interactions"] for one in domains.values()) == manifest["interactions"]
    )


def _check_size(file: Path, manifest: dict[str, Any]) -> None:
    expected = manifest["sizes"][file.name]
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise InputError(f"{file}: {state}, the store is damaged; prepare the log again")


def _check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the content of every file with the manifest.

    Raises:
        InputError: a file was changed.
    """
    for name in _files_of(manifest):
        with damage_named(folder / name):
            digest = sha256_of(folder / name)
        if not isinstance(manifest["hashes"], dict) or manifest["hashes"].get(name) != digest:
            raise damaged(folder / name, "has another SHA-256 than its manifest says")


def _check_tables(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the numbers of rows of the tables of users and items with the manifest.

    Raises:
        InputError: a table is damaged or of another store.
    """
    from pyarrow import parquet

    for name, count in ((store_files.USERS, "users"), (store_files.CATALOG, "items")):
        with damage_named(folder / name):
            rows = parquet.read_metadata((folder / name).absolute()).num_rows
        if rows != manifest[count]:
            raise damaged(folder / name, f"has {rows} rows, not {manifest[count]} {count}")


def _check_arrays(
    folder: Path,
    manifest: dict[str, Any],
    offsets: NDArray[np.int64],
    item_ids: NDArray[np.int32],
    timestamps: NDArray[np.int64],
) -> None:
    """Check that histories are whole, items are of the catalogue, and times ascend.

    Raises:
        InputError: users would read the events of others, or items that there are not.
    """
    events, items = manifest["interactions"], manifest["items"]
    if offsets[0] != 0 or offsets[-1] != events or (offsets[1:] < offsets[:-1]).any():
        raise damaged(folder / store_files.OFFSETS, "does not divide the events among the users")
    places = np.linspace(0, max(0, events - CHECKED_BLOCK), CHECKED_BLOCKS, dtype=np.int64)
    starts = np.asarray(offsets)
    for start in np.unique(places).tolist() if events > CHECKED_ALL else [0]:
        rows = slice(start, start + (CHECKED_BLOCK if events > CHECKED_ALL else events))
        ids, times = item_ids[rows], timestamps[rows]
        if ids.size and not (ids.min() > 0 and ids.max() <= items):
            raise damaged(folder / store_files.ITEM_IDS, f"holds items outside 1..{items}")
        falls = np.flatnonzero(times[1:] < times[:-1]) + 1 + start
        places_of_users = np.searchsorted(starts, falls)
        begins = starts[np.minimum(places_of_users, len(starts) - 1)] == falls
        if (times.size and times.min() < 0) or not begins.all():
            raise damaged(folder / store_files.TIMESTAMPS, "holds times that are out of order")


def _files_of(manifest: dict[str, Any]) -> list[str]:
    """Name the files of a store: those of every store, and those of what this one has beside."""
    asked = [name for name in store_files.SIDE_FILES if name in manifest["sizes"]]
    return [*store_files.DATA_FILES, *asked]
