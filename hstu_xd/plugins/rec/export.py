"""A prepared store as the interaction file that HLLM and PerSRec read."""

import os
from pathlib import Path

import numpy as np

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError


def write_interactions(
    store: InteractionStore | Path | str, out: Path | str, *, force: bool = False
) -> int:
    """Write ``dataset/NAME.csv`` with columns item_id, user_id, timestamp, oldest first per user.

    REC orders events by time with an unstable sort, so that ties may come out in another order.
    The store itself serves as ``item_domain_path``: items bear the same tokens.

    Args:
        store: the store, or its folder.
        out: the CSV; its folder must exist.
        force: replace a file that is there.

    Returns:
        The number of events.

    Raises:
        InputError: no folder to write to, or a file that is there without ``force``.
    """
    import polars as pl

    if not isinstance(store, InteractionStore):
        store = InteractionStore.open(store)
    out = Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; make it first")
    if out.exists() and not force:
        raise InputError(f"{out}: exists; add --force to replace it, or choose another --out")
    tokens = store.catalog.item_tokens
    assert tokens is not None, "a prepared store keeps the tokens"
    items = pl.Series(["", *tokens], dtype=pl.String).gather(np.asarray(store.item_ids))
    lengths = np.diff(np.asarray(store.offsets))
    users = pl.Series([store.user_token(u) for u in range(store.num_users)], dtype=pl.String)
    table = pl.DataFrame(
        {
            "item_id": items,
            "user_id": users.gather(np.repeat(np.arange(store.num_users), lengths)),
            "timestamp": np.asarray(store.timestamps),
        }
    )
    partial = Path(f"{out}.partial-{os.getpid()}")
    try:
        table.write_csv(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return len(table)
