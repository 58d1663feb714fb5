"""Recommendations for everybody: from a run and a log to one file, see :func:`recommend_to_all`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.files import check_output_file, check_readable, sha256_of
from hstu_xd.ranking.run import ServedRanker
from hstu_xd.serving.bulk import BestItems, BulkRecommender, Histories, HistoryReader
from hstu_xd.serving.bulk_files import (
    BulkRequest,
    format_of,
    write_recommendations,
)
from hstu_xd.serving.tower_search import TowersForAll
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.distributed import World, world
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import CONFIG_FILE, open_data
from hstu_xd.version import __version__

# Why a user gets nothing.
NOT_IN_LOG = "is not in the log"
NO_KNOWN_ITEM = "has no event of an item that the model knows"


@dataclass(frozen=True)
class BulkSummary:
    """What was written.

    Attributes:
        out: the file.
        rows: its rows.
        users: users in it.
        domains: names of the domains.
        unserved: users without recommendations, with the reason.
        unserved_file: where they are listed; None where there are none.
    """

    out: Path
    rows: int
    users: int
    domains: Sequence[str]
    unserved: dict[str, str]
    unserved_file: Path | None


def recommend_to_all(
    run: Path,
    out: Path,
    *,
    store: InteractionStore,
    k: int,
    users: Path | None = None,
    domains: Sequence[str] | None = None,
    at: int | None = None,
    exclude_seen: bool | None = None,
    file_format: str | None = None,
    force: bool = False,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> BulkSummary:
    """Write the best items of domains for many users: user, domain, rank, item, score.

    Under torchrun the processes share the users; all read run and store, the first one writes.

    Args:
        run: a trained run.
        out: the file to write.
        store: whose histories are read, of :func:`open_histories`.
        k: items of each domain.
        users: file of user ids; None: all users of the log.
        domains: names; None: all domains that the run knows.
        at: time of all requests; None: that of each user's last event.
        exclude_seen: whether items of a history are no candidates; None: as the run was evaluated.
        file_format: "parquet", "csv" or "jsonl"; None: by the suffix of ``out``.
        force: replace an existing file.
        allow_imports: import the modules that the run names beside this package.
        announce: called with a line now and then.

    Raises:
        InputError: unknown domains, no known user, an output that cannot be written, a time before
            an event, or a log that contradicts the run's catalogue.
    """
    named, wanted = format_of(out, file_format), None if users is None else read_users(users)
    with world(on_cpu=True) as here:
        here.in_main(lambda: check_output_file(out, force=force))
        trained = load_trained(run, allow_imports=allow_imports)
        catalog = trained.ranker.catalog
        names = list(dict.fromkeys(domains)) if domains else list(catalog.domain_names)
        protocol = trained.protocol.but(exclude_seen=exclude_seen)
        recommender = BulkRecommender(
            trained,
            [catalog.domain_index(name) for name in names],
            k,
            window=trained.window,
            protocol=protocol,
            at=at,
        )
        reader = HistoryReader(store, catalog)
        served, unserved = find_users(reader, wanted)
        if at is not None:
            refuse_earlier(reader, at, served)
        if here.is_main and reader.unknown_items:
            announce(
                f"{reader.unknown_items:,} of {store.num_items:,} items of {store.path} are "
                "unknown to the model; their events are left out"
            )
        asked = {"protocol": protocol.as_json(), "at": at}
        request = BulkRequest(
            served, names, recommender.k, out, named, _facts_of(run, store, served) | asked
        )
        return _write(request, recommender.best, reader, unserved, here, announce)


def recommend_by_towers(
    run: Path,
    out: Path,
    *,
    store: InteractionStore,
    goal: str | None,
    k: int,
    users: Path | None = None,
    domains: Sequence[str] | None = None,
    at: int | None = None,
    exclude_seen: bool = False,
    file_format: str | None = None,
    force: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> BulkSummary:
    """Write what :func:`recommend_to_all` does, by a ranking run of towers; scores are chances.

    Args:
        run: a ranking run of towers.
        out, k, users, domains, file_format, force, announce: as there.
        store: whose histories are read, of :func:`hstu_xd.ranking.run.open_store`.
        goal: that items are wanted for; None: the only one.
        at: time of all requests, events at or after which are not read; None: right after each
            user's last event.
        exclude_seen: whether items of a history are no candidates.

    Raises:
        InputError: no towers, unknown goals or domains, no known user, or an output that cannot be
            written.
    """
    named, wanted = format_of(out, file_format), None if users is None else read_users(users)
    with world(on_cpu=True) as here:
        here.in_main(lambda: check_output_file(out, force=force))
        ranker = ServedRanker.of(run, store)
        names = list(dict.fromkeys(domains)) if domains else list(ranker.catalog.domain_names)
        towers = TowersForAll(
            ranker,
            goal,
            [ranker.catalog.domain_index(name) for name in names],
            k,
            at=at,
            exclude_seen=exclude_seen,
        )
        reader = HistoryReader(store, ranker.catalog)
        served, unserved = find_users(reader, wanted)
        asked = {"goal": ranker.goal(goal), "exclude_seen": exclude_seen, "at": at}
        request = BulkRequest(
            served, names, towers.k, out, named, _facts_of(run, store, served) | asked
        )
        return _write(request, towers.best, reader, unserved, here, announce)


def _facts_of(run: Path, store: InteractionStore, users: np.ndarray) -> dict[str, Any]:
    """Return what of run, log and users decides about the numbers."""
    return {
        "version": __version__,
        "run": [sha256_of(run / name) for name in (MODEL_FILE, CONFIG_FILE)],
        "data": store.manifest["hashes"],
        "users": hashlib.sha256(users.tobytes()).hexdigest(),
    }


def _write(
    request: BulkRequest,
    best: Callable[[Histories], BestItems],
    reader: HistoryReader,
    unserved: dict[str, str],
    here: World,
    announce: Callable[[str], object],
) -> BulkSummary:
    """Write the file of a request, and who is not in it beside it."""
    listed = here.from_main(lambda: list_unserved(request.out, _reasons(unserved)))
    number, names = len(request.users), request.domains
    if here.is_main:
        announce(f"{number:,} users x {len(names)} domains, {request.k} items each")
    rows = write_recommendations(
        request,
        lambda users: best(reader.read(users)),
        reader.store,
        reader.catalog,
        here,
        announce=announce,
    )
    return BulkSummary(request.out, rows, number, names, unserved, listed)


def _reasons(unserved: Mapping[str, str]) -> pl.DataFrame:
    return pl.DataFrame({"user": list(unserved), "reason": list(unserved.values())})


def open_histories(
    run: Path, *, data: Path | None, log: Path | None, verify: bool = False
) -> InteractionStore:
    """Open the store whose histories are read: the run's own, or another log.

    Args:
        run: the run folder.
        data: the run's own store, where it has moved.
        log: another store, whose items are told by their ids.
        verify: compare the hash of every file with the manifest.

    Raises:
        InputError: both are given, or there is no store.
    """
    if log is None:
        return open_data(run, data, verify=verify)
    if data is not None:
        raise InputError("--data and --log both name a store; --log alone reads newer histories")
    return InteractionStore.open(log, verify=verify)


def read_users(file: Path) -> list[str]:
    """Read ids of users, each once: a line each, or the column ``user`` of a Parquet file.

    Raises:
        InputError: no such file, no such column, or no id.
    """
    check_readable(file)
    try:
        if file.suffix == ".parquet":
            table = pl.read_parquet(file, columns=["user"], glob=False)
            users = table["user"].cast(pl.String).drop_nulls().to_list()
        else:
            users = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--users {file}: cannot be read ({reason}); give a text file with an id on every "
            "line, or a Parquet file with a column user"
        ) from error
    found = list(dict.fromkeys(filter(None, users)))
    if not found:
        raise InputError(f"--users {file}: holds no id; put one on every line")
    return found


def find_users(
    reader: HistoryReader, wanted: Sequence[str] | None
) -> tuple[np.ndarray, dict[str, str]]:
    """Find those who can be served, in the order of the list or of the log.

    Args:
        reader: of the log.
        wanted: ids; None: all users.

    Returns:
        Their user indices, and the others with the reason.

    Raises:
        InputError: nobody can be served.
    """
    store, unserved = reader.store, {}
    users = np.arange(store.num_users)
    if wanted is not None:
        users = store.users_at(wanted)
        unserved = {wanted[i]: NOT_IN_LOG for i in np.flatnonzero(users < 0).tolist()}
        users = users[users >= 0]
    known = reader.has_known_items(users)
    unserved |= dict.fromkeys(store.user_tokens(users[~known]).to_list(), NO_KNOWN_ITEM)
    if not known.any():
        user, reason = next(iter(unserved.items()))
        raise InputError(
            f"none of {len(unserved):,} users can be served: {user!r} {reason}, {store.path}"
        )
    return users[known], unserved


def refuse_earlier(reader: HistoryReader, at: int, users: np.ndarray) -> None:
    """Refuse a time of the request that lies before events of users.

    Raises:
        InputError: the message names the first of them.
    """
    later = reader.users_after(at, users)
    if later.size:
        token = reader.store.user_token(int(later[0]))
        raise InputError(
            f"--at {at} is before the last event of {later.size:,} users, {token!r} the first; ask "
            "for a later time, or leave it out"
        )


def list_unserved(out: Path, unserved: pl.DataFrame) -> Path | None:
    """Write who gets nothing, and why, beside the output; a list of an earlier call is removed."""
    file = out.with_name(f"{out.stem}.unserved.csv")
    if unserved.is_empty():
        file.unlink(missing_ok=True)
        return None
    unserved.write_csv(file)
    return file
