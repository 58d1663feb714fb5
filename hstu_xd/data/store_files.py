"""Write the files of a prepared store: their names, their version and their contents."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.event_fields import EventFields
from hstu_xd.data.item_features import StoredFeatures
from hstu_xd.data.statistics import describe
from hstu_xd.data.taxonomy import Taxonomy
from hstu_xd.files import HashedFile, sha256_of
from hstu_xd.version import __version__

if TYPE_CHECKING:
    import polars as pl


FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CATALOG = "catalog.parquet"
USERS = "users.parquet"
OFFSETS = "offsets.npy"
ITEM_IDS = "item_ids.npy"
TIMESTAMPS = "timestamps.npy"
SEQUENCES = "sasrec_format.csv"
ITEM_DOMAINS = "item_domains.csv"
DATA_FILES = (CATALOG, USERS, OFFSETS, ITEM_IDS, TIMESTAMPS)
# Where such were asked for: fields of events, and levels of the items' taxonomy.
EVENT_FIELDS = "event_fields.npy"
EVENT_VALUES = "event_values.parquet"
ITEM_LEVELS = "item_levels.npy"
LEVEL_VALUES = "level_values.parquet"
# Likewise features of items: codes of categories with their values, and numbers.
ITEM_CATEGORIES = "item_categories.npy"
CATEGORY_VALUES = "category_values.parquet"
ITEM_NUMBERS = "item_numbers.npy"
_VALUE_FILES = (EVENT_VALUES, LEVEL_VALUES, CATEGORY_VALUES)
SIDE_FILES = (
    *(EVENT_FIELDS, EVENT_VALUES, ITEM_LEVELS, LEVEL_VALUES),
    *(ITEM_CATEGORIES, CATEGORY_VALUES, ITEM_NUMBERS),
)
# What generative-recommenders reads, where it was asked for.
UPSTREAM_FILES = (SEQUENCES, ITEM_DOMAINS)
# The lines that --skip-faulty left out.
FAULTY_LINES = "faulty_lines.csv"
ALL_FILES = (MANIFEST, *DATA_FILES, *SIDE_FILES, *UPSTREAM_FILES, FAULTY_LINES)


ROW_GROUP = 1 << 18


@dataclass
class Log:
    """A log ready to be stored.

    Attributes:
        users: (U,) user tokens, sorted.
        items: columns item and domain, sorted by (domain, item); row r is item id r + 1.
        offsets: (U + 1,) int64, start of each user's events.
        item_ids: (L,) int32, in 1..I, in time order within a user.
        time: (L,) int64, seconds.
        fields: of the events, in the order of ``item_ids``; None without such.
        taxonomy: of ``items``; None without one.
        features: of ``items``; None without such.
    """

    users: "pl.Series"
    items: "pl.DataFrame"
    offsets: NDArray[np.int64]
    item_ids: NDArray[np.int32]
    time: NDArray[np.int64]
    fields: EventFields | None = None
    taxonomy: Taxonomy | None = None
    features: StoredFeatures | None = None


def domains_of(items: "pl.DataFrame") -> tuple[list[str], NDArray[np.int32]]:
    """Domain names in order and the domain id of each row, of items sorted by domain."""
    runs = items["domain"].rle().struct
    names, sizes = runs.field("value").to_list(), runs.field("len").to_numpy()
    return names, np.repeat(np.arange(len(names), dtype=np.int32), sizes)


def write_store(
    folder: Path, log: Log, facts: dict[str, Any], *, hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write all files of a store into an existing, empty folder.

    Equal logs and facts give equal bytes: nothing of the machine, the clock or a path is written.

    Args:
        folder: where to write.
        log: the events.
        facts: further entries of the manifest (synthetic, filters, ...).
        hashes: of the log's arrays that are in the folder already.

    Returns:
        The manifest.
    """
    names, item_domain = domains_of(log.items)
    users = log.users.alias("user").to_frame()
    tables = {CATALOG: log.items, USERS: users}
    arrays = {
        OFFSETS: log.offsets.astype("<i8", copy=False),
        ITEM_IDS: log.item_ids.astype("<i4", copy=False),
        TIMESTAMPS: log.time.astype("<i8", copy=False),
    }
    side = _write_side(folder, log, arrays)
    files = [folder / name for name in (*DATA_FILES, *(n for n in SIDE_FILES if n in arrays))]
    files += [folder / name for name in _VALUE_FILES if (folder / name).exists()]
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(_save_and_hash, arrays, tables, files, hashes or {})
        description = describe(log.offsets, log.item_ids, item_domain, names)
        digests = saved.result()
    manifest = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        **description,
        **side,
        **facts,
        "sizes": {file.name: file.stat().st_size for file in files},
        "hashes": {file.name: digests[file.name] for file in files},
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _write_side(folder: Path, log: Log, arrays: dict[str, NDArray]) -> dict[str, Any]:
    """Write the values of fields and levels, add their codes to ``arrays``; return the facts."""
    facts: dict[str, Any] = {}
    if log.fields is not None:
        arrays[EVENT_FIELDS] = log.fields.codes.astype("<i4", copy=False)
        _write_values(folder / EVENT_VALUES, log.fields.names, log.fields.values)
        facts["event_fields"] = log.fields.described()
    if log.taxonomy is not None:
        arrays[ITEM_LEVELS] = log.taxonomy.nodes.astype("<i4", copy=False)
        _write_values(folder / LEVEL_VALUES, log.taxonomy.names, log.taxonomy.values)
        facts["levels"] = log.taxonomy.described()
    if log.features is not None:
        if (categories := log.features.categories) is not None:
            arrays[ITEM_CATEGORIES] = categories.nodes.astype("<i4", copy=False)
            _write_values(folder / CATEGORY_VALUES, categories.names, categories.values)
        if log.features.numbers:
            arrays[ITEM_NUMBERS] = log.features.stacked().astype("<f4", copy=False)
        facts["item_features"] = log.features.described()
    return facts


def _write_values(file: Path, names: Sequence[str], values: Sequence[Sequence[str]]) -> None:
    """Write the values of fields or levels: a row each, in the order of their codes."""
    import polars as pl

    rows = [(name, value) for name, known in zip(names, values, strict=True) for value in known]
    schema = {"name": pl.String, "value": pl.String}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(file, row_group_size=ROW_GROUP)


def _save_and_hash(
    arrays: Mapping[str, NDArray],
    tables: "Mapping[str, pl.DataFrame]",
    files: Sequence[Path],
    hashes: Mapping[str, str],
) -> dict[str, str]:
    """Write tables, and arrays whose hashes are unknown; return every file's hash by its name."""
    digests = dict(hashes)
    for file in files:
        if file.name in tables:
            table = tables[file.name].rechunk()
            table.write_parquet(file, row_group_size=ROW_GROUP)
        if file.name in arrays and file.name not in hashes:
            with HashedFile(file) as hashed:
                np.save(hashed, arrays[file.name])
            digests[file.name] = hashed.digest
        elif file.name not in hashes:
            digests[file.name] = sha256_of(file)
    return digests
