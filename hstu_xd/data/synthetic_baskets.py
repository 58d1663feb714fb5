"""Write a synthetic log of shoppers whose habits are older than any window that models attend to.

A shopper visits now and then and fills a basket. Most of it are habits, each with a rhythm of days
or months of its own: that it is due can be told from the whole history only. The rest is something
new of a type that the shopper has a habit in, or what everybody buys. Items have a type, an aisle
and a domain, and are on deal in some weeks.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import Events
from hstu_xd.data.event_fields import numbered
from hstu_xd.data.filters import Filters
from hstu_xd.data.ids import number_tokens
from hstu_xd.data.prepare import build_log
from hstu_xd.data.store import is_store
from hstu_xd.data.store_files import write_store
from hstu_xd.data.synthetic import SynthOptions, domain_names
from hstu_xd.data.taxonomy import Taxonomy, numbered_levels
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

LEVELS = ("type", "aisle")
DEAL = "deal"
_ITEMS_OF_TYPE, _TYPES_OF_AISLE = 10, 5
_HABITS, _BASKET = 30, 7
_SAME_TYPE, _ANY = 0.2, 0.3
_SHORTEST, _LONGEST = 4.0, 120.0
_DEALS = 0.3
_FIRST, _DAY, _YEAR = 1_600_000_000, 86_400, 365
_TYPE_WIDTH = len("d00_t0000")


def synthesize_baskets(out: Path, options: SynthOptions, *, force: bool = False) -> dict[str, Any]:
    """Simulate shoppers and write a prepared store marked as synthetic.

    Args:
        out: the folder to write; appears whole or not at all.
        options: size; ``skew`` must be 0.
        force: replace an existing prepared store.

    Returns:
        The manifest.

    Raises:
        InputError: an option out of range, or an output folder that may not be written.
    """
    options.check()
    if options.skew:
        raise InputError(
            f"--skew {options.skew}: does nothing with --baskets; leave one of them out"
        )
    check_output(
        out, force=force, ours=is_store, kind="prepared store", parts=store_files.ALL_FILES
    )
    log, facts = build_log(simulate_baskets(options), Filters())
    log.taxonomy = _taxonomy(log.items["item"].to_list())
    facts |= {"synthetic": True, "synth": {**vars(options), "baskets": True}}
    with replaced_folder(out, force=force) as partial:
        return write_store(partial, log, facts)


def simulate_baskets(options: SynthOptions) -> Events:
    """Draw all events; equal options give equal events."""
    import polars as pl

    rng = np.random.default_rng(options.seed)
    count = options.domains * options.items_per_domain
    popularity = rng.permutation(1.0 / np.arange(1, count + 1) ** 0.7)
    popularity /= popularity.sum()
    on_deal = rng.random((_YEAR // 7 + 1, count)) < _DEALS
    parts = [_shopper(user, options, popularity, rng) for user in range(options.users)]
    user, item, time = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    deals = on_deal[(time - _FIRST) // (7 * _DAY), item]
    width = max(5, len(str(options.users - 1)))
    catalogue, ranks = number_tokens(_catalogue(options))
    return Events(
        users=pl.Series("user", [f"u{u:0{width}d}" for u in range(options.users)]),
        items=catalogue.select("item", "domain"),
        user=user.astype(np.int32),
        item=ranks[item],
        time=time,
        fields=numbered(pl.DataFrame({DEAL: np.where(deals, "yes", "no")})),
    )


def _catalogue(options: SynthOptions) -> Any:
    """Name the items after their domain, type and number; the type is in the name."""
    import polars as pl

    rows = [
        (name, f"d{d:02d}_t{i // _ITEMS_OF_TYPE:04d}_i{i:05d}")
        for d, name in enumerate(domain_names(options.domains))
        for i in range(options.items_per_domain)
    ]
    return pl.DataFrame(rows, schema=["domain", "item"], orient="row")


def _taxonomy(items: list[str]) -> Taxonomy:
    """Read the types off the items' names, and put neighbouring types into an aisle."""
    import polars as pl

    types = [item[:_TYPE_WIDTH] for item in items]
    aisles = [f"{name[:3]}_a{int(name[5:]) // _TYPES_OF_AISLE:04d}" for name in types]
    return numbered_levels(pl.DataFrame(dict(zip(LEVELS, (types, aisles), strict=True))))


def _shopper(
    user: int, options: SynthOptions, popularity: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw one shopper's year: user, item and time of every event."""
    count = len(popularity)
    habits = rng.choice(count, min(_HABITS, count), replace=False, p=popularity)
    rhythm = np.exp(rng.uniform(np.log(_SHORTEST), np.log(_LONGEST), len(habits)))
    due = rng.random(len(habits)) * rhythm
    visits = max(1, rng.poisson(options.mean_length / _BASKET))
    seconds = np.sort(rng.choice(_YEAR * _DAY, visits, replace=False))
    baskets = []
    for second in seconds:
        chance = rng.random(max(1, rng.poisson(_BASKET)))
        drawn = rng.choice(count, len(chance), p=popularity)
        liked = habits[rng.integers(0, len(habits), len(chance))]
        # A type's items stand side by side; the last type of a domain may be short.
        shelf = liked % options.items_per_domain // _ITEMS_OF_TYPE * _ITEMS_OF_TYPE
        size = np.minimum(_ITEMS_OF_TYPE, options.items_per_domain - shelf)
        base = liked // options.items_per_domain * options.items_per_domain + shelf
        similar = base + (rng.random(len(chance)) * size).astype(np.int64)
        most_due = np.argsort(due - second / _DAY)[: int((chance >= _ANY + _SAME_TYPE).sum())]
        most_due = most_due[due[most_due] <= second / _DAY]
        due[most_due] = second / _DAY + rhythm[most_due]
        others = np.where(chance < _ANY, drawn, similar)[chance < _ANY + _SAME_TYPE]
        baskets.append(np.unique(np.concatenate([habits[most_due], others])))
    items = np.concatenate(baskets)
    times = np.repeat(_FIRST + seconds, [len(basket) for basket in baskets])
    return np.full(len(items), user), items, times
