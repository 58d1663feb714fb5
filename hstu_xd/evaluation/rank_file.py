"""Everybody's target, its rank and the best candidates beside it, as a Parquet file.

A row is a candidate of a user, so that ranx and RecTools read the file as it is: its user_id,
item_id and score are a ranx ``Run``, with rank they are RecTools' recommendations, and each user's
target_item_id is what either measures them by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.metrics import UNREACHABLE
from hstu_xd.evaluation.ranks import ListedTargets
from hstu_xd.files import check_output_file, partial_file

OPTION = "--ranks"

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("domain", pa.string()),
        ("item_id", pa.string()),
        ("rank", pa.int64()),
        ("score", pa.float64()),
        ("target_item_id", pa.string()),
        ("target_rank", pa.int64()),
    ]
)


class RankFile:
    """Takes what evaluation lists, see :func:`writing_ranks`.

    Args:
        writer: of the file.
        store: names users and items.
    """

    def __init__(self, writer: parquet.ParquetWriter, store: InteractionStore) -> None:
        self._writer, self._store = writer, store
        catalog = store.catalog
        self._domains = pa.array(catalog.domain_names, pa.string())
        self._items = pa.array([catalog.token(i + 1) for i in range(catalog.num_items)])

    def write(self, listed: ListedTargets) -> None:
        """Write the rows of some users."""
        items, targets = listed.items.cpu(), listed.targets.cpu()
        is_row = items > 0
        is_row[:, 0] = True  # a user without any candidate has one row, without an item
        user, place = (x.numpy() for x in is_row.nonzero(as_tuple=True))
        item, has_item = items[is_row].numpy(), (items[is_row] > 0).numpy()
        ranks = listed.ranks.cpu().numpy()[user]
        users = self._store.user_tokens(listed.users).to_arrow().cast(pa.string())
        columns = [
            users.take(pa.array(user)),
            self._domains.take(pa.array(listed.domains.cpu().numpy()[user])),
            self._items.take(pa.array(item - 1, mask=~has_item)),
            pa.array(place + 1, mask=~has_item),
            pa.array(listed.scores.cpu()[is_row].numpy(), mask=~has_item),
            self._items.take(pa.array(targets.numpy()[user] - 1)),
            pa.array(ranks, mask=ranks == UNREACHABLE),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))


@contextmanager
def writing_ranks(out: Path, store: InteractionStore, *, force: bool = False) -> Iterator[RankFile]:
    """Open a Parquet file of ranks, which appears whole when the block succeeds.

    A user has a row for each of the best candidates, as many as the protocol's largest k: their
    place in ``rank`` and their ``score``. ``target_item_id`` and ``target_rank``, its place among
    all candidates, are the same in all rows of a user; the rank is empty where the target is no
    candidate.

    Args:
        out: the file.
        store: names users and items.
        force: replace an existing file.

    Raises:
        InputError: another suffix than .parquet, or the file cannot be written.
        HstuXdError: the disk is full.
    """
    if out.suffix != ".parquet":
        raise InputError(f"{OPTION} {out}: ranks are written as Parquet; name a .parquet file")
    check_output_file(out, force=force, option=OPTION)
    partial = partial_file(out)
    try:
        with parquet.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            yield RankFile(writer, store)
        partial.replace(out)
    except OSError as error:
        raise HstuXdError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
