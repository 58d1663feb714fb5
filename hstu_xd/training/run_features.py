"""Features of items in a run: taken from the store, kept in the run folder, loaded from there."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.evaluation.baselines import NO_BASELINE
from hstu_xd.evaluation.protocol import COLD
from hstu_xd.model.featured_items import FeatureTable
from hstu_xd.training.checkpoint import load_checkpoint, save_checkpoint
from hstu_xd.training.settings import RunSettings

FEATURES_FILE = "item_features.safetensors"


def features_of(store: InteractionStore, settings: RunSettings) -> FeatureTable | None:
    """Take the features that a training's settings name; None where they name none.

    Args:
        store: prepared with ``--item-features``.
        settings: of the training, whose events tell which items it meets.

    Raises:
        InputError: a feature that the store lacks, or a domain called as cold targets are.
    """
    names = settings.item.features
    if not names or settings.train.baseline != NO_BASELINE:
        return None
    if COLD in store.domain_names:
        raise InputError(
            f"{store.path}: domain {COLD!r} is also the name of a group of targets where "
            "xd_item.features is set; call the domain otherwise"
        )
    codes, values = {}, {}
    stored = store.features
    for taxonomy in (store.taxonomy, None if stored is None else stored.categories):
        if taxonomy is not None:
            codes |= dict(zip(taxonomy.names, taxonomy.nodes))
            values |= dict(zip(taxonomy.names, taxonomy.values))
    numbers = {} if stored is None else dict(stored.numbers)
    known = [*codes, *numbers]
    for name in names:
        if name not in known:
            raise InputError(
                f"xd_item.features names {name!r}{did_you_mean(name, known)}; the store "
                f"{store.path} has {', '.join(known) or 'none'}: prepare the log with "
                "--item-features FILE --features NAMES"
            )
    train = settings.train
    data = settings.protocol.sequences(
        store, Split.TRAIN, train.window, domain=train.domain, until=train.until
    )
    is_met = torch.zeros(store.num_items + 1, dtype=torch.bool)
    is_met[data.events()[0]] = True
    categories = {name: values[name] for name in names if name in codes}
    return FeatureTable(
        categories,
        {name: numbers[name].shape[1] for name in names if name in numbers},
        _numbered([codes[name] for name in categories], categories, store.num_items),
        _stacked([numbers[name] for name in names if name in numbers], store.num_items),
        is_met,
    )


def _numbered(codes: list[np.ndarray], categories: dict[str, list[str]], num_items: int) -> Tensor:
    """Give the values of all categories numbers in a row, 0 to none: (I + 1, C) int64."""
    table, first = torch.zeros(num_items + 1, len(codes), dtype=torch.int64), 1
    for column, (of_items, values) in enumerate(zip(codes, categories.values())):
        own = torch.from_numpy(of_items.astype(np.int64))
        table[1:, column] = torch.where(own >= 0, own + first, 0)
        first += len(values)
    return table


def _stacked(numbers: list[np.ndarray], num_items: int) -> Tensor:
    """Put numbers side by side: (I + 1, W) float32."""
    columns = np.concatenate([np.empty((num_items, 0), np.float32), *numbers], axis=1)
    padding = np.full((1, columns.shape[1]), np.nan, np.float32)
    return torch.from_numpy(np.concatenate([padding, columns.astype(np.float32)]))


def save_features(run: Path, table: FeatureTable | None) -> None:
    """Keep features in a run folder; None leaves none there."""
    if table is not None:
        tensors = {"codes": table.codes, "numbers": table.numbers, "is_met": table.is_met}
        names = {"categories": dict(table.categories), "widths": dict(table.widths)}
        save_checkpoint(run / FEATURES_FILE, tensors, names)


def load_features(run: Path, settings: RunSettings) -> FeatureTable | None:
    """Load the features that a run was trained with; None where it was without.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not settings.item.features or settings.train.baseline != NO_BASELINE:
        return None
    tensors, names = load_checkpoint(run / FEATURES_FILE)
    return FeatureTable(
        names["categories"],
        names["widths"],
        tensors["codes"],
        tensors["numbers"],
        tensors["is_met"],
    )
