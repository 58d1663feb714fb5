"""Requests to rank for: a user, a time, a goal, and candidates of which some were taken.

They are made from purchases here, or given (:mod:`hstu_xd.data.labelled_requests`), once, and kept
in a file with a hash, so that all models are measured on the same candidates. The log is cut in
time, for all users alike: what is before the first cut is trained on, what is before the second
validates, the rest tests. A request may read what its user did strictly before its time: events of
the same second are often one basket.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.batches import Split
from hstu_xd.data.cuts import TEST_SHARE, VALID_SHARE, cut_in_time
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder, sha256_of
from hstu_xd.version import __version__

if TYPE_CHECKING:
    import polars as pl

MANIFEST, TABLE = "requests.json", "requests.parquet"
FORMAT_VERSION = 1
SPLITS = tuple(Split)
ANY_GOAL = "any"
_DAY = 86_400
_ROUNDS = 200


@dataclass(frozen=True)
class RequestOptions:
    """How requests are made from purchases.

    Attributes:
        goal: field of the events whose values are goals; None: there is one goal.
        positives: items of a basket that a request has among its candidates.
        negatives: for each of them, items that others took in the same period for the same goal.
        min_history: fewest events of the user before the request.
        per_user: most requests of a user in a split; 0: all.
        period_days: length of a period.
        valid_from: first second that validates; None: after 80 % of the events.
        test_from: first second that tests; None: after 90 % of the events.
        seed: equal seeds give equal requests.
    """

    goal: str | None = None
    positives: int = 3
    negatives: int = 4
    min_history: int = 60
    per_user: int = 10
    period_days: int = 7
    valid_from: int | None = None
    test_from: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a number out of range."""
        least = {"positives": 1, "negatives": 1, "min_history": 0, "per_user": 0}
        for name, low in {**least, "period_days": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value < low:
                raise InputError(f"--{name.replace('_', '-')} {value}: give at least {low}")


@dataclass(frozen=True)
class RequestSet:
    """Requests with their candidates, those of a request side by side.

    Attributes:
        users: (R,) int64, number of the user in the store.
        times: (R,) int64, seconds.
        goals: (R,) int64, place in ``goal_names``.
        splits: (R,) int8, place in train, valid, test.
        offsets: (R + 1,) int64; request r has candidates ``offsets[r]:offsets[r + 1]``.
        candidates: (Q,) int64 item ids.
        labels: (Q,) float32, 1 where the candidate was taken.
        goal_names: of the goals.
        manifest: what the folder says of them.
    """

    users: NDArray[np.int64]
    times: NDArray[np.int64]
    goals: NDArray[np.int64]
    splits: NDArray[np.int8]
    offsets: NDArray[np.int64]
    candidates: NDArray[np.int64]
    labels: NDArray[np.float32]
    goal_names: tuple[str, ...]
    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, store: InteractionStore | None = None) -> "RequestSet":
        """Read the requests of a folder, and check that they are those that were written.

        Args:
            folder: written by ``hstu-xd requests``.
            store: that they must have been made of; None: not compared.

        Raises:
            InputError: no requests there, damaged ones, or ones of another store.
        """
        import polars as pl

        manifest = read_manifest(folder)
        if store is not None and manifest["data_hashes"] != store.manifest["hashes"]:
            raise InputError(
                f"{folder}: made of another store than {store.path} (hashes differ); make requests "
                f"of this one with hstu-xd requests --data {store.path}"
            )
        table = folder / TABLE
        if not table.is_file() or sha256_of(table) != manifest["hash"]:
            raise InputError(
                f"{table}: missing, or not the file that {MANIFEST} describes; make the requests "
                "again"
            )
        return cls.of_table(pl.read_parquet(table, glob=False), manifest)

    @classmethod
    def of_table(cls, table: "pl.DataFrame", manifest: dict[str, Any]) -> "RequestSet":
        """Take requests out of a table with a row each and lists of candidates and labels."""
        offsets = np.zeros(len(table) + 1, np.int64)
        np.cumsum(table["candidates"].list.len().to_numpy(), out=offsets[1:])
        return cls(
            users=table["user"].to_numpy(),
            times=table["time"].to_numpy(),
            goals=table["goal"].to_numpy(),
            splits=table["split"].to_numpy(),
            offsets=offsets,
            candidates=table["candidates"].explode().to_numpy().astype(np.int64),
            labels=table["labels"].explode().to_numpy().astype(np.float32),
            goal_names=tuple(manifest["goals"]),
            manifest=manifest,
        )

    @classmethod
    def unanswered(
        cls,
        times: NDArray[np.int64],
        goal: int,
        goal_names: tuple[str, ...],
        candidates: NDArray[np.int64] | None = None,
    ) -> "RequestSet":
        """Make a request of each user, of no split and without labels, as a service is asked.

        Args:
            times: (R,) int64 seconds, of users 0..R - 1.
            goal: of all requests, place in ``goal_names``.
            goal_names: of the goals.
            candidates: (C,) int64 item ids for the only user; None: no candidates.
        """
        number, candidates = len(times), np.empty(0, np.int64) if candidates is None else candidates
        return cls(
            users=np.arange(number),
            times=times,
            goals=np.full(number, goal),
            splits=np.zeros(number, np.int8),
            offsets=np.append(np.zeros(number, np.int64), len(candidates)),
            candidates=candidates,
            labels=np.zeros(len(candidates), np.float32),
            goal_names=goal_names,
        )

    def of_split(self, split: Split) -> NDArray[np.int64]:
        """Return the numbers of a split's requests: (R',) int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def rows(self, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of some requests' candidates, in order: (Q',) int64."""
        counts = np.diff(self.offsets)[requests]
        starts = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(self.offsets[requests] - starts, counts)


def is_requests(folder: Path) -> bool:
    """Whether a folder holds requests."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a folder says of its requests.

    Raises:
        InputError: no requests there, of another version, or a damaged manifest.
    """
    if not is_requests(folder):
        raise InputError(
            f"{folder}: no requests here (no {MANIFEST}); make some with hstu-xd requests --data "
            f"STORE --out {folder}"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST}: damaged; make the requests again") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: requests of format version {version!r}; this hstu-xd reads "
            f"{FORMAT_VERSION}; make them again"
        )
    return manifest


def write_requests(
    store: InteractionStore, out: Path, options: RequestOptions, *, force: bool = False
) -> dict[str, Any]:
    """Make requests of a store's purchases and write them.

    Args:
        store: the log.
        out: the folder to write; appears whole or not at all.
        options: how they are made.
        force: replace requests that are there.

    Returns:
        The manifest.

    Raises:
        InputError: an option out of range, a field that is not there, cuts that leave a split
            without requests, or a folder that may not be written.
    """
    options.check()
    check_requests_output(out, force=force)
    maker = _Maker(store, options)
    table = maker.table()
    facts = {"options": asdict(options), "without_negatives": maker.dropped}
    return save_requests(
        store, out, table, maker.goal_names, cuts=maker.cuts, facts=facts, force=force
    )


def check_requests_output(out: Path, *, force: bool) -> None:
    """Refuse a folder that requests may not be written to, before anything is read."""
    check_output(out, force=force, ours=is_requests, kind="requests", parts=(MANIFEST, TABLE))


def save_requests(
    store: InteractionStore,
    out: Path,
    table: "pl.DataFrame",
    goal_names: Sequence[str],
    *,
    cuts: tuple[int, int],
    facts: dict[str, Any],
    force: bool,
) -> dict[str, Any]:
    """Write requests and what is to be known of them.

    Args:
        store: the log that they are of.
        out: the folder to write; appears whole or not at all.
        table: a row each, see :meth:`RequestSet.of_table`.
        goal_names: of the goals.
        cuts: first second that validates, first that tests.
        facts: what else the manifest says.
        force: replace requests that are there.

    Returns:
        The manifest.
    """
    with replaced_folder(out, force=force) as folder:
        table.write_parquet(folder / TABLE)
        manifest = {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "data": str(store.path.resolve()),
            "data_hashes": store.manifest["hashes"],
            "hash": sha256_of(folder / TABLE),
            "goals": list(goal_names),
            "cuts": {"valid_from": cuts[0], "test_from": cuts[1]},
            "splits": _counted(table, goal_names),
            **facts,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _counted(table: "pl.DataFrame", goals: Sequence[str]) -> dict[str, Any]:
    import polars as pl

    counted = {}
    for number, split in enumerate(SPLITS):
        rows = table.filter(pl.col("split") == number)
        labels = rows["labels"].explode()
        counted[split.value] = {
            "requests": len(rows),
            "users": rows["user"].n_unique(),
            "candidates": len(labels),
            "positives": int(labels.sum()),
            "requests_by_goal": {
                name: int((rows["goal"] == goal).sum()) for goal, name in enumerate(goals)
            },
        }
    return counted


class _Maker:
    """Draws requests from a store.

    Attributes:
        goal_names: of the goals.
        cuts: first second that validates, first that tests.
        dropped: requests for which no negatives could be found.
    """

    def __init__(self, store: InteractionStore, options: RequestOptions) -> None:
        self._store, self._options = store, options
        self._rng = np.random.default_rng(options.seed)
        self._items = np.asarray(store.item_ids).astype(np.int64)
        self._times = np.asarray(store.timestamps)
        offsets = np.asarray(store.offsets)
        self._users = np.repeat(np.arange(store.num_users), np.diff(offsets))
        self._goals, self.goal_names = self._read_goals()
        self.cuts = self._cut()
        self._splits = np.searchsorted(np.array(self.cuts), self._times, side="right")
        new = np.ones(len(self._times), np.bool_)
        new[1:] = (self._times[1:] != self._times[:-1]) | (self._users[1:] != self._users[:-1])
        self._basket = np.cumsum(new) - 1
        self._first = np.flatnonzero(new)  # of each basket, its first event
        self._before = self._first - offsets[self._users[self._first]]
        self.dropped = 0

    def _read_goals(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the goal of every event, -1 where its field is missing, and the goals' names."""
        name = self._options.goal
        if name is None:
            return np.zeros(len(self._items), np.int64), (ANY_GOAL,)
        codes, values = self._store.fields.of(name, "--goal")
        return codes.astype(np.int64) - 1, tuple(f"{name}={value}" for value in values)

    def _cut(self) -> tuple[int, int]:
        given = (self._options.valid_from, self._options.test_from)
        shares = (VALID_SHARE, TEST_SHARE)
        valid, test = (y if x is None else x for x, y in zip(given, shares, strict=True))
        told = (f"--valid-from {valid}", f"--test-from {test}")
        cuts = cut_in_time(self._times, valid, test, told=told)
        return cuts.valid_from, cuts.test_from

    def table(self) -> "pl.DataFrame":
        """Draw all requests, by split, time and user."""
        import polars as pl

        baskets, goals, positives = self._chosen()
        negatives, found = self._negatives(baskets, goals)
        self.dropped = int((~found).sum())
        baskets, goals = baskets[found], goals[found]
        candidates = np.concatenate([positives[found], negatives[found]], axis=1)
        labels = np.zeros_like(candidates, dtype=np.int8)
        labels[:, : self._options.positives] = 1
        places = np.argsort(self._rng.random(candidates.shape), axis=1)
        first = self._first[baskets]
        table = pl.DataFrame(
            {
                "user": self._users[first],
                "time": self._times[first],
                "goal": goals,
                "split": self._splits[first].astype(np.int8),
                "candidates": np.take_along_axis(candidates, places, 1).astype(np.int32),
                "labels": np.take_along_axis(labels, places, 1),
            }
        )
        table = table.with_columns(
            pl.col("candidates").arr.to_list(), pl.col("labels").arr.to_list()
        )
        for number, split in enumerate(SPLITS):
            if not (table["split"] == number).any():
                raise InputError(
                    f"{self._store.path}: no request in the {split.value} split: no basket there "
                    f"of {self._options.positives} items of one goal whose user has "
                    f"{self._options.min_history} events before it; lower --positives or "
                    "--min-history, or move --valid-from and --test-from"
                )
        return table.sort("split", "time", "user", "goal")

    def _chosen(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Choose baskets and goals, and of each its positives: (R,), (R,), (R, P)."""
        options, goals = self._options, max(1, len(self.goal_names))
        known = self._goals >= 0
        key = self._basket[known] * goals + self._goals[known]
        pairs = np.unique(np.stack([key, self._items[known]]), axis=1)
        pairs = pairs[:, np.lexsort((self._rng.random(pairs.shape[1]), pairs[0]))]
        keys, starts, counts = np.unique(pairs[0], return_index=True, return_counts=True)
        fits = (counts >= options.positives) & (self._before[keys // goals] >= options.min_history)
        keys, starts = keys[fits], starts[fits]
        if options.per_user:
            first = self._first[keys // goals]
            group = self._users[first] * len(SPLITS) + self._splits[first]
            order = np.lexsort((self._rng.random(len(keys)), group))
            place = np.arange(len(keys)) - np.searchsorted(group[order], group[order])
            kept = np.sort(order[place < options.per_user])
            keys, starts = keys[kept], starts[kept]
        positives = pairs[1][starts[:, None] + np.arange(options.positives)]
        return keys // goals, keys % goals, positives

    def _negatives(
        self, baskets: NDArray[np.int64], goals: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Draw what others took in the period for the goal and is not in the basket.

        Drawing events rather than items gives each item the weight of its purchases. Periods end at
        the cuts, so that nothing of a later split is drawn for an earlier one.

        Returns:
            (R, P * N) item ids, different within a request, and (R,) whether they were found.
        """
        options, goals_of = self._options, max(1, len(self.goal_names))
        period = (self._times // (options.period_days * _DAY)) * len(SPLITS) + self._splits
        group = np.where(self._goals >= 0, period * goals_of + self._goals, -1)
        pool = np.argsort(group, kind="stable")
        own = period[self._first[baskets]] * goals_of + goals
        low, high = (np.searchsorted(group[pool], own, side=side) for side in ("left", "right"))
        stride = self._store.num_items + 1
        inside = np.unique(self._basket * stride + self._items)
        users = self._users[self._first[baskets]]
        drawn = np.zeros((len(baskets), options.positives * options.negatives), np.int64)
        wanted = np.ones(drawn.shape, np.bool_)
        for _ in range(_ROUNDS):
            rows, columns = np.nonzero(wanted)
            if not rows.size:
                break
            event = pool[self._rng.integers(low[rows], high[rows])]
            drawn[rows, columns] = self._items[event]
            key = baskets[rows] * stride + self._items[event]
            place = np.minimum(np.searchsorted(inside, key), len(inside) - 1)
            wanted[rows, columns] = (self._users[event] == users[rows]) | (inside[place] == key)
            wanted |= _repeats(drawn)
        return drawn, np.asarray(wanted.sum(axis=1) == 0)


def _repeats(drawn: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark, in each row, values that stand further to the left, too."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, 1)
    again = np.zeros(drawn.shape, np.bool_)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marked = np.zeros_like(again)
    np.put_along_axis(marked, order, again, 1)
    return marked
