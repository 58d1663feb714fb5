"""Files of recommendations for many users: written in parts, so that a killed run goes on.

The parts lie in a hidden folder beside the output, with what was asked for. The output itself
appears whole, when the last part is there. Several processes compute a part each at a time, and the
first one writes them all: the others may be on machines of their own.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.files import only_writer, partial_file
from hstu_xd.serving.bulk import BestItems
from hstu_xd.training.distributed import World
from hstu_xd.training.interruption import StopRequest, signal_name, stop_requests

FORMATS = ("parquet", "csv", "jsonl")
# Rows of a part, and so of a row group: some 30 MB in memory.
PART_ROWS = 400_000
_PLAN = "plan.json"

# Given (B,) user indices of a store, what is best for these users.
BestOf = Callable[[np.ndarray], BestItems]


def format_of(out: Path, asked: str | None) -> str:
    """Tell the format of an output: what was asked for, else what its suffix says.

    Raises:
        InputError: neither names a format.
    """
    named = asked or out.suffix.removeprefix(".")
    if named not in FORMATS:
        raise InputError(
            f"{f'--format {asked}' if asked else out}: the format is one of {', '.join(FORMATS)}; "
            "name one by --format or by the suffix of --out"
        )
    return named


@dataclass(frozen=True)
class BulkRequest:
    """Who is to get recommendations, and where they go.

    Attributes:
        users: (U,) user indices of the reader's store, in the order of the output.
        domains: names of the domains, in the order of the output.
        k: items of each domain.
        out: the file to write.
        file_format: one of :data:`FORMATS`.
        facts: all that decides about the numbers; parts made from other facts are not used.
    """

    users: np.ndarray
    domains: Sequence[str]
    k: int
    out: Path
    file_format: str
    facts: Mapping[str, Any]

    @property
    def users_per_part(self) -> int:
        """How many users share a part."""
        return max(1, PART_ROWS // (len(self.domains) * self.k))

    @property
    def folder(self) -> Path:
        """Where the parts lie until all are there."""
        return self.out.with_name(f".{self.out.name}.parts")

    def parts(self) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield the file of every part and its users."""
        size = self.users_per_part
        for number, start in enumerate(range(0, len(self.users), size)):
            yield self.folder / f"{number:06d}.parquet", self.users[start : start + size]


def write_recommendations(
    request: BulkRequest,
    best_of: BestOf,
    store: InteractionStore,
    catalog: DomainCatalog,
    here: World,
    *,
    announce: Callable[[str], object] = lambda line: None,
) -> int:
    """Write the best items of every domain for every user.

    Args:
        request: who and where; the same in all processes.
        best_of: ranks the items of the request's domains.
        store: names the users.
        catalog: of the model.
        here: this process among those that share the work.
        announce: called in the first process, with a line after every part.

    Returns:
        How many rows were written: user, domain, rank from 1, item and score.

    Raises:
        InputError: another process writes the same file, or processes that share the work were
            asked for different things.
        HstuXdError: the disk is full, or the model gives no numbers.
        Interrupted: Ctrl-C or a signal asked to stop; the parts stay.
    """
    plan = json.dumps(
        {**request.facts, "domains": list(request.domains), "k": request.k}, sort_keys=True
    )
    first, *others = here.gather(plan)
    if any(other != first for other in others):
        raise InputError(
            f"{request.out}: the processes of this job have another run, store or list of users "
            "each; give the same to all of them"
        )
    if not here.is_main:
        announce = _silence
    lock = request.out.with_name(f".{request.out.name}.lock")
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(only_writer(lock, f"writes {request.out}"))
            _begin(request, plan, announce)

        try:
            here.in_main(begin)
            _write_parts(request, best_of, store, catalog, here, announce)
            return here.from_main(lambda: _join(request))
        except OSError as error:
            raise HstuXdError(
                f"{request.out}: cannot be written ({error.strerror or error}); make room, and "
                "the same command goes on where it stopped"
            ) from error


def _silence(line: str) -> None:
    """Say nothing: the first process does."""


def _begin(request: BulkRequest, plan: str, announce: Callable[[str], object]) -> None:
    """Make the folder of the parts; one that was made for something else is emptied."""
    file = request.folder / _PLAN
    if request.folder.exists() and not (file.is_file() and file.read_text() == plan):
        announce(f"{request.folder} holds parts of another request; begins anew")
        shutil.rmtree(request.folder)
    request.folder.mkdir(exist_ok=True)
    file.write_text(plan)


def _write_parts(
    request: BulkRequest,
    best_of: BestOf,
    store: InteractionStore,
    catalog: DomainCatalog,
    here: World,
    announce: Callable[[str], object],
) -> None:
    """Compute the parts that are missing, one in each process at a time."""
    parts = list(request.parts())
    missing = here.from_main(
        lambda: [number for number, (file, _) in enumerate(parts) if not file.is_file()]
    )
    total, left = len(request.users), sum(len(parts[number][1]) for number in missing)
    if left < total:
        announce(f"goes on: {total - left:,} of {total:,} users are done")
    tokens = pa.array([catalog.token(item) for item in range(1, catalog.num_items + 1)])
    began, todo, stop = time.perf_counter(), left, StopRequest()

    def compute(users: np.ndarray) -> bytes:
        found = _table(best_of(users), store.user_tokens(users), request.domains, tokens)
        written = pa.BufferOutputStream()
        parquet.write_table(found, written, compression="zstd")
        return written.getvalue().to_pybytes()

    with stop_requests(stop):
        for start in range(0, len(missing), here.size):
            at_once = [parts[number] for number in missing[start : start + here.size]]
            own = [users for _, users in at_once[here.rank : here.rank + 1]]
            found = here.collect(here.in_all(lambda own=own: [compute(users) for users in own]))
            here.in_main(partial(_keep, [file for file, _ in at_once], found))
            left -= sum(len(users) for _, users in at_once)
            rate = (todo - left) / max(1e-9, time.perf_counter() - began)
            announce(
                f"{total - left:,} of {total:,} users, {rate:,.0f} users/s, "
                f"{left / rate:,.0f} s left"
            )
            if (number := max(here.gather(stop.signal))) and left:
                told = (
                    f"stopped by {signal_name(number)}, {total - left:,} of {total:,} users are "
                    "done; the same command goes on"
                )
                raise Interrupted(told if here.is_main else "", number)


def _keep(files: Sequence[Path], found: Sequence[Sequence[bytes]]) -> None:
    """Write parts, each of which appears whole; a process without one gives none."""
    for file, (content,) in zip(files, found, strict=False):
        file.with_suffix(".partial").write_bytes(content)
        file.with_suffix(".partial").replace(file)


def _table(best: BestItems, users: pl.Series, domains: Sequence[str], tokens: pa.Array) -> pa.Table:
    """Lay out what was found, a row an item."""
    found = best.items > 0
    user, domain, rank = (x.numpy() for x in found.nonzero(as_tuple=True))
    return pa.table(
        {
            "user": users.to_arrow().cast(pa.string()).take(pa.array(user)),
            "domain": pa.array(list(domains)).take(pa.array(domain)),
            "rank": pa.array(rank.astype(np.int32) + 1),
            "item": tokens.take(pa.array(best.items[found].numpy() - 1)),
            "score": pa.array(best.scores[found].numpy()),
        }
    )


def _join(request: BulkRequest) -> int:
    """Write the parts into one file, which takes the place of the output and of their folder."""
    whole, rows = partial_file(request.out), 0
    with whole.open("wb") as stream:
        writer = None
        for number, (file, _) in enumerate(request.parts()):
            table = parquet.read_table(file)
            rows += table.num_rows
            if request.file_format == "parquet":
                writer = writer or parquet.ParquetWriter(stream, table.schema, compression="zstd")
                writer.write_table(table)
                continue
            frame = pl.DataFrame(table)
            if request.file_format == "csv":
                frame.write_csv(stream, include_header=number == 0)
            else:
                frame.write_ndjson(stream)
        if writer is not None:
            writer.close()
    whole.replace(request.out)
    shutil.rmtree(request.folder)
    return rows
