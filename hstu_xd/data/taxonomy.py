"""The taxonomy of a catalogue: the node of every item on each level, finest level first.

A node is a value of its level's column. Nothing says that nodes of a level lie within one node of
the next: a category that occurs in two departments has two parents, and that is allowed, since a
node is looked for on its own level only. There are no cycles, since a level is a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


def text_of(name: str) -> "pl.Expr":
    """Write a column's values as text; empty texts are missing."""
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
