"""The prepared store: a memory-mapped log of time-ordered histories with its item catalogue."""

import json
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from hstu_xd.catalog import DomainCatalog

NEIGHBOURS = 1000
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
    def open(cls, path: Path | str) -> "InteractionStore":
        """Map a store. Sizes are checked, contents are not read.

        Raises:
            InputError: no store there, one of another format version, or a damaged one.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        for name in store_files.DATA_FILES:
            _check_size(folder / name, manifest)
        users, events = manifest["users"], manifest["interactions"]
        arrays = (
            _map(folder / store_files.OFFSETS, users + 1, np.dtype("<i8")),
            _map(folder / store_files.ITEM_IDS, events, np.dtype("<i4")),
            _map(folder / store_files.TIMESTAMPS, events, np.dtype("<i8")),
        )
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

        return DomainCatalog.load(self.path / store_files.CATALOG)

    @cached_property
    def _users(self) -> "pl.Series":
        import polars as pl

        return pl.read_parquet(self.path / store_files.USERS)["user"]

    def user_index(self, token: str) -> int:
        """Return the number of the user with this id in the log.

        Raises:
            InputError: unknown user; the message names the nearest.
        """
        users, at = self._users, self._place(token)
        if at < len(users) and users[at] == token:
            return at
        # Neighbours in sorted order share the longest beginnings; all of millions is too slow.
        pool = users.slice(max(0, at - NEIGHBOURS // 2), NEIGHBOURS).to_list()
        near = get_close_matches(token, pool, n=1, cutoff=0.5) or pool[:1]
        raise InputError(
            f"{self.path}: no user {token!r} among {len(users)}; did you mean {near[0]!r}?"
        )

    def has_user(self, token: str) -> bool:
        """Whether there is a user with this id in the log."""
        return self.users_from(token, 1) == [token]

    def users_from(self, token: str, limit: int) -> list[str]:
        """Return ids of at most ``limit`` users, in order, from the first not below a text."""
        return self._users.slice(self._place(token), limit).to_list()

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
        return self._users.search_sorted(token)

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
    """Whether a folder holds a prepared store of any format version, damaged or not."""
    try:
        manifest = json.loads((folder / store_files.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest and "domains" in manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / store_files.MANIFEST
    if not file.is_file():
        raise InputError(
            f"{folder}: no prepared store here (no {store_files.MANIFEST}); make one with "
            "hstu-xd prepare or hstu-xd synth"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged or not a store's manifest; prepare it again") from error
    if found != store_files.FORMAT_VERSION:
        raise InputError(
            f"{file}: store of format version {found!r}; this hstu-xd reads "
            f"{store_files.FORMAT_VERSION}; prepare the log again with --force"
        )
    missing = [name for name in REQUIRED if name not in manifest]
    missing += [name for name in store_files.DATA_FILES if name not in manifest.get("sizes", {})]
    if missing:
        raise InputError(f"{file}: damaged, it lacks {missing[0]!r}; prepare the log again")
    return manifest


def _check_size(file: Path, manifest: dict[str, Any]) -> None:
    expected = manifest["sizes"][file.name]
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise InputError(f"{file}: {state}, the store is damaged; prepare the log again")


def _map(file: Path, length: int, dtype: np.dtype) -> NDArray:
    try:
        array = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error}); prepare the log again") from error
    if array.shape != (length,) or array.dtype != dtype:
        raise InputError(
            f"{file}: holds {array.dtype} {array.shape} where the manifest says {dtype} "
            f"({length},); prepare the log again"
        )
    return array
