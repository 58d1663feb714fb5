"""A prepared store as the interaction file that HLLM and PerSRec read."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

_logger = logging.getLogger(__name__)

_LEAST = 3
# What pandas, by which REC reads the file, takes for missing values, quoted or not.
_MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip


def write_interactions(
    store: InteractionStore | Path | str, out: Path | str, *, force: bool = False
) -> int:
    """Write ``dataset/NAME.csv`` with columns item_id, user_id, timestamp, oldest first per user.

    REC orders events by time with an unstable sort, so that ties may come out in another order.
    It evaluates a user's last two events after at least one: users with fewer are left out.
    The store itself serves as ``item_domain_path``: items bear the same tokens.

    Args:
        store: the store, or its folder.
        out: the CSV; its folder must exist.
        force: replace a file that is there.

    Returns:
        The number of events.

    Raises:
        InputError: no folder to write to, a file that is there without ``force``, no user with
            three events, or a token that REC's reader takes for a missing one.
    """
    if not isinstance(store, InteractionStore):
        store = InteractionStore.open(store)
    out = Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; make it first")
    if out.exists() and not force:
        raise InputError(f"{out}: exists; add --force to replace it, or choose another --out")
    table = _events(store)
    partial = Path(f"{out}.partial-{os.getpid()}")
    try:
        table.write_csv(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return len(table)


def _events(store: InteractionStore) -> "pl.DataFrame":
    """Collect the events of the users that REC can evaluate; refuse tokens that it cannot read."""
    import polars as pl

    tokens = store.catalog.item_tokens
    assert tokens is not None, "a prepared store keeps the tokens"
    items = pl.Series(["", *tokens], dtype=pl.String).gather(np.asarray(store.item_ids))
    lengths = np.diff(np.asarray(store.offsets))
    users = pl.Series([store.user_token(u) for u in range(store.num_users)], dtype=pl.String)
    kept = np.repeat(lengths >= _LEAST, lengths)
    table = pl.DataFrame(
        {
            "item_id": items,
            "user_id": users.gather(np.repeat(np.arange(store.num_users), lengths)),
            "timestamp": np.asarray(store.timestamps),
        }
    ).filter(pl.Series(kept))
    if table.is_empty():
        raise InputError("no user has three events: two to evaluate after at least one to train on")
    if short := int((lengths < _LEAST).sum()):
        _logger.warning("%d users with fewer than three events are left out", short)
    for kind in ("item", "user"):
        unread = table[f"{kind}_id"].filter(table[f"{kind}_id"].is_in(_MISSING))
        if len(unread):
            raise InputError(
                f"{kind} {unread[0]!r} would be read as no {kind} at all; call it otherwise in the "
                "log and prepare that again"
            )
    return table
