"""The file of ``--item-features``: levels of a taxonomy, features, and items without events."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hstu_xd.data.item_features import StoredFeatures, features_from
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.sources.flat_sequences import is_flat
from hstu_xd.data.tables import find_id_column, id_column, read_table
from hstu_xd.data.taxonomy import Taxonomy, numbered_levels, text_of
from hstu_xd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

    from hstu_xd.data.store_files import Log


@dataclass(frozen=True)
class FeatureOptions:
    """What is taken of a table of items.

    Attributes:
        path: a Parquet or CSV file with one row an item, or a log in the flat layout
            (:mod:`hstu_xd.data.sources.flat_sequences`), whose rows are impressions of items.
        levels: columns that are levels of a taxonomy, finest first.
        item: the log's column of the item id; None, or where the file has none of this name: its
            usual names.
        features: columns that are features.
        cold_items: whether items without events are put into the catalogue.
        domain: the log's column of the domain, which such items need where there are several.
    """

    path: Path
    levels: tuple[str, ...] = ()
    item: str | None = None
    features: tuple[str, ...] = ()
    cold_items: bool = False
    domain: str | None = None


class ItemTable:
    """A table of items, read and checked before the log is.

    Args:
        options: file and columns.

    Raises:
        InputError: a file that cannot be read, a column that is not there, or an item that has
            two rows; in the flat layout, two that differ in what is taken.
    """

    def __init__(self, options: FeatureOptions) -> None:
        self.options = options
        path = options.path
        if not (options.levels or options.features):
            raise InputError(
                f"--item-features {path}: name levels of a taxonomy with --levels, finest first, "
                "or features with --features"
            )
        frame = read_table(path, "--item-features")
        for option, names in (("--levels", options.levels), ("--features", options.features)):
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                raise InputError(f"{option} names {repeated!r} twice; name every column once")
            for name in names:
                if name not in frame.columns:
                    raise InputError(
                        f"{path}: no column {name!r}{did_you_mean(name, frame.columns)}; it has "
                        f"{', '.join(frame.columns)}; give {option} columns of it"
                    )
        # The log's names of the columns, where the file has them too.
        item, domain = (
            name if name in frame.columns else None for name in (options.item, options.domain)
        )
        ids = [id_column(path, frame, "item", ColumnOptions(item=item))]
        if options.cold_items:
            found = find_id_column(path, frame, "domain", ColumnOptions(domain=domain))
            ids += [] if found is None else [found]
        self._has_domains = len(ids) > 1
        self._table = frame.select(
            *(column.name.prefix("id:") for column in ids),
            *(text_of(name).alias(f"level:{name}") for name in options.levels),
            *(frame[name].alias(f"feature:{name}") for name in options.features),
        ).drop_nulls("id:item")
        if is_flat(frame.columns, ColumnOptions()):  # a row is an impression there, not an item
            self._table = self._table.unique(maintain_order=True)
        twice = self._table.filter(self._table["id:item"].is_duplicated())
        if len(twice):
            raise InputError(
                f"{path}: item {twice['id:item'][0]!r} has more than one row; give every item one"
            )

    def describe_items(self, log: "Log", warn: Callable[[str], object]) -> int:
        """Put the items' levels and features into a log, and the items without events.

        Args:
            log: is changed in place.
            warn: is told how many items have no row, or lack a feature.

        Returns:
            The number of items that were added.

        Raises:
            InputError: no item of the log has a row, an item without events has no domain, or
                features cannot be taken.
        """
        path, items = self.options.path, log.items["item"]
        known = items.is_in(self._table["id:item"].implode())
        if not known.any():
            raise InputError(
                f"{path}: none of the log's items has a row there ({items[0]!r} is one of the log, "
                f"{self._table['id:item'].first()!r} one of the file); give the file with the same "
                "ids"
            )
        if not known.all():
            warn(
                f"{(~known).sum():,} of {len(items):,} items have no row in {path.name}: they have "
                "no node on any level and are found by their id alone"
            )
        added = self._add_cold(log, warn) if self.options.cold_items else 0
        log.taxonomy, log.features = self._of(log.items["item"], warn)
        return added

    def _of(
        self, items: "pl.Series", warn: Callable[[str], object]
    ) -> tuple[Taxonomy | None, StoredFeatures | None]:
        """Return levels and features of items, in their order."""
        rows = (
            items.alias("id:item")
            .to_frame()
            .join(self._table, on="id:item", how="left", maintain_order="left")
        )
        levels = {f"level:{name}": name for name in self.options.levels}
        features = {f"feature:{name}": name for name in self.options.features}
        taxonomy = numbered_levels(rows.select(*levels).rename(levels)) if levels else None
        if not features:
            return taxonomy, None
        named = rows.select("id:item", *features).rename(features | {"id:item": "item"})
        return taxonomy, features_from(self.options.path, named, warn)

    def _add_cold(self, log: "Log", warn: Callable[[str], object]) -> int:
        """Put items without events into the catalogue; return how many."""
        import polars as pl

        path, names = self.options.path, log.items["domain"].unique(maintain_order=True)
        fresh = self._table.filter(~self._table["id:item"].is_in(log.items["item"].implode()))
        if not self._has_domains:
            if len(names) > 1:
                raise InputError(
                    f"{path}: has no domain column, and the log has {len(names)} domains; items "
                    "without events need one: name it as the log's, domain or --domain-col"
                )
            fresh = fresh.with_columns(pl.lit(names[0]).alias("id:domain"))
        elsewhere = fresh.filter(~fresh["id:domain"].is_in(names.implode()).fill_null(False))
        if len(elsewhere):
            warn(
                f"{len(elsewhere):,} items without events are left out: no event of the log is of "
                f"their domain ({elsewhere['id:item'][0]!r}: {elsewhere['id:domain'][0]!r})"
            )
        fresh = fresh.filter(fresh["id:domain"].is_in(names.implode()).fill_null(False))
        cold = fresh.select(pl.col("id:item").alias("item"), pl.col("id:domain").alias("domain"))
        columns = [pl.col(name).cast(pl.String) for name in log.items.columns]
        both = pl.concat([log.items.select(columns), cold.select(columns)])
        both = both.with_row_index("was").sort("domain", "item")
        places = np.empty(len(both), np.int32)
        places[both["was"].to_numpy()] = np.arange(len(both), dtype=np.int32)
        log.item_ids = places[log.item_ids - 1] + np.int32(1)
        log.items = both.drop("was")
        return len(fresh)
