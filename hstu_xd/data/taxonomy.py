"""The taxonomy of a catalogue: the node of every item on each level, finest level first.

A node is a value of its level's column. Nothing says that nodes of a level lie within one node of
the next: a category that occurs in two departments has two parents, and that is allowed, since a
node is looked for on its own level only. There are no cycles, since a level is a column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.tables import id_column, read_table
from hstu_xd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

NO_NODE = -1


@dataclass(frozen=True)
class Taxonomy:
    """Nodes of the items of a catalogue.

    Attributes:
        names: of the levels, finest first.
        nodes: (H, I) int32; -1 where an item has no node on a level. Column r is item id r + 1.
        values: of each level, its nodes' names in sorted order.
    """

    names: tuple[str, ...]
    nodes: NDArray[np.int32]
    values: tuple[list[str], ...]

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of each level: its nodes and how many items lack one."""
        lacking = (self.nodes == NO_NODE).sum(1).tolist()
        return {
            name: {"nodes": len(values), "items_without": count}
            for name, values, count in zip(self.names, self.values, lacking, strict=True)
        }


@dataclass(frozen=True)
class FeatureOptions:
    """Where the taxonomy comes from.

    Attributes:
        path: a Parquet or CSV file with one row an item.
        levels: columns that are levels, finest first.
        item: the log's column of the item id; None, or where the file has none of this name: its
            usual names.
    """

    path: Path
    levels: tuple[str, ...]
    item: str | None = None


class ItemFeatures:
    """A table of items, read and checked before the log is.

    Args:
        options: file and columns.

    Raises:
        InputError: a file that cannot be read, a column that is not there, or an item that has
            two rows.
    """

    def __init__(self, options: FeatureOptions) -> None:
        self.options = options
        path, levels = options.path, options.levels
        if not levels:
            raise InputError(f"--item-features {path}: name its levels with --levels, finest first")
        repeated = next((name for name in levels if levels.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"--levels names {repeated!r} twice; name every level once")
        frame = read_table(path, "--item-features")
        for name in levels:
            if name not in frame.columns:
                raise InputError(
                    f"{path}: no column {name!r}{did_you_mean(name, frame.columns)}; it has "
                    f"{', '.join(frame.columns)}; give --levels columns of it"
                )
        # The log's name of the column, where the file has it too.
        columns = ColumnOptions(item=options.item if options.item in frame.columns else None)
        self._table = frame.select(
            id_column(path, frame, "item", columns),
            *(_text(name).alias(str(at)) for at, name in enumerate(levels)),
        ).drop_nulls("item")
        twice = self._table.filter(self._table["item"].is_duplicated())
        if len(twice):
            raise InputError(
                f"{path}: item {twice['item'][0]!r} has more than one row; give every item one"
            )

    def of(self, items: "pl.Series", warn: Callable[[str], object]) -> Taxonomy:
        """Return the nodes of a catalogue's items.

        Args:
            items: their ids in the log, in the catalogue's order.
            warn: is told how many items have no row.

        Raises:
            InputError: no item has a row.
        """

        path, levels = self.options.path, self.options.levels
        known = items.is_in(self._table["item"].implode())
        if not known.any():
            raise InputError(
                f"{path}: none of the log's items has a row there ({items[0]!r} is one of the log, "
                f"{self._table['item'].first()!r} one of the file); give the file with the same ids"
            )
        if not known.all():
            warn(
                f"{(~known).sum():,} of {len(items):,} items have no row in {path.name}: they have "
                "no node on any level and are found by their id alone"
            )
        rows = (
            items.alias("item")
            .to_frame()
            .join(self._table, on="item", how="left", maintain_order="left")
        )
        names = {str(at): name for at, name in enumerate(levels)}
        return numbered_levels(rows.select(*names).rename(names))


def numbered_levels(nodes: "pl.DataFrame") -> Taxonomy:
    """Give the nodes of each level their numbers.

    Args:
        nodes: a column of text for each level, finest first, and a row for each item.
    """
    import polars as pl

    codes, values = [], []
    for column in nodes.iter_columns():
        names = column.drop_nulls().unique().sort()
        ranks = column.cast(pl.Enum(names)).to_physical().cast(pl.Int32)
        codes.append(ranks.fill_null(NO_NODE).to_numpy())
        values.append(names.to_list())
    return Taxonomy(tuple(nodes.columns), np.stack(codes), tuple(values))


def _text(name: str) -> "pl.Expr":
    """Write a level's values as text; empty texts are missing."""
    import polars as pl

    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def level_paths(
    taxonomy: Taxonomy | None, item_domains: NDArray[np.integer], num_domains: int
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Put the item itself before a taxonomy's levels, and the domain behind where there are two.

    Args:
        taxonomy: None: of a store without one.
        item_domains: (I + 1,) domain of each item id; row 0 is no item.
        num_domains: of the catalogue.

    Returns:
        Names of the levels, and (I + 1, H + 1) int64 nodes of every item id; row 0 is all -1.
    """
    names: Sequence[str] = ("item",)
    count = len(item_domains)
    columns: list[Any] = [np.arange(count)]
    if taxonomy is not None:
        names = (*names, *taxonomy.names)
        columns += [np.concatenate([[NO_NODE], level]) for level in taxonomy.nodes]
    if num_domains > 1:
        names = (*names, "domain")
        columns += [np.asarray(item_domains)]
    paths = np.stack(columns, axis=1).astype(np.int64)
    paths[0] = NO_NODE
    return tuple(names), paths
