"""Scores for given pairs of users and items: those that ``recommend --user`` shows beside an item.

Users are encoded once for all of their pairs. Pairs of unknown users or items are listed beside the
output, and the others are served.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.tables import find_id_column, id_column, read_table
from hstu_xd.data.window import Window
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import check_output_file, partial_file
from hstu_xd.serving.bulk import BATCH_USERS, BLOCK_SCORES, HistoryReader, user_vectors
from hstu_xd.serving.bulk_files import format_of
from hstu_xd.serving.recommend_all import find_users, list_unserved, refuse_earlier
from hstu_xd.training.run import TrainedRun, load_trained

OPTION = "--pairs"
UNKNOWN_ITEM = "the model does not know the item"


@dataclass(frozen=True)
class ScoredPairs:
    """What was written.

    Attributes:
        out: the file.
        rows: its rows.
        users: users in it.
        unserved: number of pairs without a score.
        unserved_file: where they are listed with the reason; None where there are none.
    """

    out: Path
    rows: int
    users: int
    unserved: int
    unserved_file: Path | None


def score_pairs(
    run: Path,
    pairs: Path,
    out: Path,
    *,
    store: InteractionStore,
    at: int | None = None,
    file_format: str | None = None,
    force: bool = False,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> ScoredPairs:
    """Write a score for each pair of a file, in its order: user, item, domain, score.

    A user is asked for the domain of the item, and an item has a score whether the user has met it
    or not.

    Args:
        run: a trained run.
        pairs: a Parquet or CSV file with a user and an item column, and perhaps the item's domain.
        out: the file to write.
        store: whose histories are read.
        at: time of all requests; None: that of each user's last event.
        file_format: "parquet", "csv" or "jsonl"; None: by the suffix of ``out``.
        force: replace an existing file.
        allow_imports: import the modules that the run names beside this package.
        announce: called with a line now and then.

    Raises:
        InputError: a file that holds no pairs, no known user or item, an output that cannot be
            written, a time before an event, or a log that contradicts the run's catalogue.
        HstuXdError: the disk is full, or a score is not finite.
    """
    named, asked = format_of(out, file_format), read_pairs(pairs)
    check_output_file(out, force=force)
    trained = load_trained(run, allow_imports=allow_imports)
    catalog = trained.ranker.catalog
    reader = HistoryReader(store, catalog)
    served, unserved = find_users(reader, asked["user"].unique(maintain_order=True).to_list())
    if at is not None:
        refuse_earlier(reader, at, served)
    known = _numbered(asked, store.user_tokens(served), served, unserved, catalog)
    wanted = known.filter(pl.col("reason").is_null())
    if wanted.is_empty():
        first = known.row(0, named=True)
        raise InputError(
            f"{OPTION} {pairs}: none of {len(known):,} pairs can be scored: {first['user']!r} and "
            f"{first['item']!r}: {first['reason']}"
        )
    listed = list_unserved(
        out, known.filter(pl.col("reason").is_not_null()).select("user", "item", "reason")
    )
    announce(f"{len(wanted):,} pairs of {wanted['number'].n_unique():,} users")
    scores = _score(
        trained,
        reader,
        wanted["number"].to_numpy(),
        wanted["id"].to_numpy(),
        window=trained.window,
        at=at,
    )
    _write(wanted.select("user", "item", "domain", pl.Series("score", scores)), out, named)
    users = wanted["number"].n_unique()
    return ScoredPairs(out, len(wanted), users, len(known) - len(wanted), listed)


def read_pairs(file: Path) -> pl.DataFrame:
    """Read pairs: columns user and item as text, and domain, which may be empty.

    Raises:
        InputError: no such file or columns, no pair, or one without a user or an item.
    """
    table = read_table(file, OPTION)
    domain = find_id_column(file, table, "domain")
    pairs = table.select(
        id_column(file, table, "user"),
        id_column(file, table, "item"),
        pl.lit(None, pl.String).alias("domain") if domain is None else domain,
    )
    if pairs.is_empty():
        raise InputError(f"{OPTION} {file}: holds no pair; give a user and an item on every row")
    for role in ("user", "item"):
        empty = (pairs[role].is_null() | (pairs[role] == "")).arg_true()
        if len(empty):
            raise InputError(f"{OPTION} {file}: row {empty[0] + 1} has no {role}; give it one")
    return pairs


def _numbered(
    asked: pl.DataFrame,
    tokens: pl.Series,
    served: np.ndarray,
    unserved: dict[str, str],
    catalog: DomainCatalog,
) -> pl.DataFrame:
    """Find users and items of pairs, or why a pair gets no score.

    Args:
        asked: of :func:`read_pairs`.
        tokens: of the users who can be served.
        served: their numbers.
        unserved: why the others cannot.
        catalog: of the model.

    Returns:
        A row a pair, in their order: user, item, domain (the item's own), number, id, reason.
    """
    present = catalog.item_domains.ge(0).nonzero().squeeze(1).tolist()
    names = [catalog.domain_names[d] for d in catalog.item_domains[present].tolist()]
    of_items = {"item": [catalog.token(i) for i in present], "id": present, "its": names}
    users = pl.DataFrame({"user": tokens, "number": served})
    nobody = pl.DataFrame(
        {"user": list(unserved), "why": list(unserved.values())},
        schema={"user": pl.String, "why": pl.String},
    )
    found = asked
    for table, key in ((users, "user"), (nobody, "user"), (pl.DataFrame(of_items), "item")):
        found = found.join(table, on=key, how="left", maintain_order="left")
    elsewhere = pl.format("the item is of domain '{}', not '{}'", "its", "domain")
    reason = (
        pl.when(pl.col("why").is_not_null())
        .then(pl.concat_str(pl.lit("the user "), "why"))
        .when(pl.col("id").is_null())
        .then(pl.lit(UNKNOWN_ITEM))
        .when(pl.col("domain") != pl.col("its"))
        .then(elsewhere)
    )
    columns = ("user", "item", pl.col("its").alias("domain"), "number", "id")
    return found.select(*columns, reason.alias("reason"))


@torch.no_grad()
def _score(
    trained: TrainedRun,
    reader: HistoryReader,
    users: np.ndarray,
    items: np.ndarray,
    *,
    window: Window,
    at: int | None,
) -> np.ndarray:
    """Score (P,) user indices with (P,) item ids, a batch of users after the other: (P,) float32.

    Raises:
        HstuXdError: a score is not finite.
    """
    scores, order = np.empty(len(users), np.float32), np.argsort(users, kind="stable")
    distinct, firsts = np.unique(users[order], return_index=True)
    bounds = np.append(firsts, len(users))
    for start in range(0, len(distinct), BATCH_USERS):
        batch = distinct[start : start + BATCH_USERS]
        rows = order[bounds[start] : bounds[start + len(batch)]]
        ids = torch.from_numpy(items[rows])
        owners = torch.from_numpy(np.searchsorted(batch, users[rows]))
        domains, places = trained.ranker.catalog.domain_of(ids).unique(return_inverse=True)
        windows = reader.read(batch).read_by(window, reader.catalog)
        vectors = user_vectors(trained.ranker, windows, domains.tolist(), at=at)
        for place in range(len(domains)):
            asked = (places == place).nonzero().squeeze(1)
            found = _of_domain(trained, vectors[:, place], owners[asked], ids[asked])
            scores[rows[asked.numpy()]] = found.numpy()
    if not np.isfinite(scores).all():
        raise HstuXdError(
            "scores are not finite: the model has diverged; train again with a lower learning "
            "rate or take an earlier checkpoint"
        )
    return scores


def _of_domain(trained: TrainedRun, vectors: Tensor, owners: Tensor, ids: Tensor) -> Tensor:
    """Score pairs of one domain: (Q,) rows of (B, K) user vectors, ascending, with (Q,) items."""
    pool, columns = ids.unique(return_inverse=True)
    score, found = trained.scorer(pool), []
    size = max(1, BLOCK_SCORES // pool.numel())
    for start in range(0, len(vectors), size):
        first, last = torch.searchsorted(owners, torch.tensor([start, start + size])).tolist()
        own = slice(first, last)
        found.append(score(vectors[start : start + size])[owners[own] - start, columns[own]])
    return torch.cat(found)


def _write(table: pl.DataFrame, out: Path, file_format: str) -> None:
    """Write the whole file, which then takes the place of the output."""
    partial = partial_file(out)
    write = {
        "parquet": table.write_parquet,
        "csv": table.write_csv,
        "jsonl": table.write_ndjson,
    }[file_format]
    try:
        write(partial)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise HstuXdError(f"{out}: cannot be written ({error.strerror or error})") from error
