"""Writes a log as the CSV that the research trainer of generative-recommenders reads.

Ids are this package's: users 0..U-1, items 1..num_items, so upstream must not shift them.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.store_files import ITEM_DOMAINS, SEQUENCES, Log
from hstu_xd.errors import InputError

RATING = 5
# Its training sample of a user leaves the last event out, and needs a target and an event before.
MIN_EVENTS = 3
BLOCK_EVENTS = 1 << 20


def write_upstream_csv(
    folder: Path, log: Log, *, block_events: int = BLOCK_EVENTS
) -> dict[str, Any]:
    """Write ``sasrec_format.csv`` and ``item_domains.csv``.

    The first has a line for each user of at least three events, in the order of the store, with
    columns ``user_id`` and, each a string such as "1,2,3" oldest first, ``sequence_item_ids``,
    ``sequence_ratings`` (:data:`RATING` throughout) and ``sequence_timestamps`` (seconds). The
    second has columns ``item`` and ``domain``. Equal logs give equal bytes.

    Args:
        folder: where to write.
        log: the events.
        block_events: events turned into text at once, at least one user's.

    Returns:
        The manifest's entry: users written, users left out, bytes and SHA-256 of each file.

    Raises:
        InputError: no user has three events.
    """
    users = np.flatnonzero(np.diff(log.offsets) >= MIN_EVENTS)
    if users.size == 0:
        raise InputError(
            f"no user has {MIN_EVENTS} events, the fewest upstream can train on; prepare a longer "
            "log, or leave --write-upstream out"
        )
    return {
        "users": int(users.size),
        "left_out": len(log.users) - int(users.size),
        "files": {
            SEQUENCES: _write(folder / SEQUENCES, _sequences(log, users, block_events)),
            ITEM_DOMAINS: _write(folder / ITEM_DOMAINS, _item_domains(log, block_events)),
        },
    }


def _write(file: Path, blocks: Iterator[str]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for block in blocks:
            data = block.encode()
            digest.update(data)
            size += stream.write(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sequences(log: Log, users: NDArray[np.int64], block_events: int) -> Iterator[str]:
    """CSV text of blocks of users, the header before the first."""
    import polars as pl

    lengths = np.diff(log.offsets)[users]
    ends = np.cumsum(lengths)
    first = 0
    while first < users.size:
        done = ends[first - 1] if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, done + block_events, "right")))
        block, sizes = users[first:stop], lengths[first:stop]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        rows = np.arange(starts[-1]) + np.repeat(log.offsets[block] - starts[:-1], sizes)
        longest = f"{RATING}," * int(sizes.max())
        table = pl.DataFrame(
            {
                "user_id": block,
                "sequence_item_ids": _joined(log.item_ids[rows], starts),
                "sequence_ratings": [longest[: 2 * size - 1] for size in sizes.tolist()],
                "sequence_timestamps": _joined(log.time[rows], starts),
            }
        )
        yield table.write_csv(include_header=first == 0)
        first = stop


def _joined(values: NDArray[np.integer], starts: NDArray[np.int64]) -> Any:
    """Each run of numbers as text with commas between: an Arrow array of strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    runs = pa.ListArray.from_arrays(starts.astype(np.int32), pa.array(values).cast(pa.string()))
    return pc.call_function("binary_join", [runs, pa.scalar(",")])


def _item_domains(log: Log, block_rows: int) -> Iterator[str]:
    import polars as pl

    for first in range(0, len(log.items), block_rows):
        domains = log.items["domain"].slice(first, block_rows).cast(pl.String)
        ids = np.arange(first + 1, first + 1 + len(domains))
        table = pl.DataFrame({"item": ids, "domain": domains})
        yield table.write_csv(include_header=first == 0)
