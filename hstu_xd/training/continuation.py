"""Continue a trained run on a newer store: what is carried over, and what begins anew.

Items are matched by their ids in the log and domains by their names. Rows of both go with them,
those of the optimiser's state as those of the weights, so that on the same store a run continues
with the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import NO_BASELINE
from hstu_xd.files import sha256_of
from hstu_xd.model.featured_items import VALUES, FeatureTable
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.training.checkpoint import (
    MODEL_FILE,
    STATE_FILE,
    load_checkpoint,
    parameter_of,
)
from hstu_xd.training.run_facts import TRAIN_UNTIL, last_time_of, read_run
from hstu_xd.training.run_features import load_features
from hstu_xd.training.settings import RunSettings

# Settings of the encoder that change neither the weights nor what they compute.
_FREE = ("xd_encoder.linear_dropout_rate", "xd_encoder.impl")
# Settings of the training that the weights follow from.
_SIZES = (
    "xd_item.features",
    "xd_train.item_embedding_dim",
    "xd_train.max_sequence_length",
    "xd_train.older_per_domain",
    "xd_train.gr_output_length",
)
_ITEM, _DOMAIN, _VALUE = "item", "domain", "value of a category"


def check_continuable(run: Path, settings: RunSettings, stored: RunSettings) -> None:
    """Refuse settings whose weights those of a run cannot be.

    Args:
        run: the run folder.
        settings: of the training that is to continue it.
        stored: its own.

    Raises:
        InputError: another architecture or size, with the setting's name; a run that counts, or one
            whose epoch validation does not pick.
    """
    if stored.train.until is not Split.TRAIN:
        raise InputError(
            f"{run} was trained with {TRAIN_UNTIL} = {stored.train.train_until!r}, a last training "
            "that nothing continues; continue a run that was trained until 'train', such as the "
            "one that it may be a refit of"
        )
    if settings.train.until is not Split.TRAIN:
        raise InputError(
            f"{TRAIN_UNTIL} = {settings.train.train_until!r} leaves validation nothing to pick the "
            "epoch of a continued run by; leave it at 'train'"
        )
    for which in (stored, settings):
        if which.train.baseline != NO_BASELINE:
            raise InputError(
                f"xd_train.baseline = {which.train.baseline!r} counts anew on every store, and "
                "continues nothing; train without --continue-from"
            )
    ours, theirs = settings.flat, stored.flat
    fixed = [name for name in ours if name.startswith("xd_encoder.") and name not in _FREE]
    for name in [*fixed, *_SIZES]:
        if ours[name] == theirs[name]:
            continue
        raise InputError(
            f"{run} was trained with {name} = {theirs[name]!r} and cannot continue with "
            f"{ours[name]!r}: its weights are of another model; leave the setting as it is, or "
            "train without --continue-from"
        )


@dataclass(frozen=True)
class Predecessor:
    """A run that another one continues.

    Attributes:
        run: its folder.
        until: time of the last event of the log that it was trained on.
    """

    run: Path
    until: int

    @classmethod
    def of(cls, run: Path) -> "Predecessor":
        """Take a run folder.

        Raises:
            InputError: not a run folder, or an old one whose store is no more.
        """
        return cls(run, last_time_of(run, read_run(run)))

    @classmethod
    def recorded_in(cls, facts: Mapping[str, Any]) -> "Predecessor | None":
        """Take what a run's run.json says it continues, if it does."""
        recorded = facts.get("continues")
        return recorded and cls(Path(recorded["run"]), recorded["until"])

    def check_news(self, store: InteractionStore, settings: RunSettings) -> None:
        """Refuse a store that gives nothing new to train on, unless all of it is to be replayed.

        Args:
            store: the newer store.
            settings: of the training that is to continue the run.

        Raises:
            InputError: there is nothing, or the log is cut in time or in domains.
        """
        data = settings.protocol.sequences(
            store,
            Split.TRAIN,
            settings.train.window,
            domain=settings.train.domain,
        )
        if settings.train.replay_share < 1 and not data.begin_at_news(self.until, 0).size:
            raise InputError(
                f"{store.path} holds nothing to train on that is later than what {self.run} was "
                f"trained on (time {self.until}); give a newer store, or train on with the old "
                'events: --gin_bindings "xd_train.replay_share = 1.0"'
            )


@dataclass(frozen=True)
class Continuation:
    """What a training begins with.

    Attributes:
        weights: of the new model, by name.
        optimizer: its optimiser's state, as :func:`hstu_xd.training.checkpoint.optimizer_tensors`
            names it; empty where the run has none any more.
        facts: what run.json says of it.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]

    def __str__(self) -> str:
        """Say in a line what was kept, what is new and what has left."""
        said = [
            f"{what} "
            + ", ".join(
                f"{len(each) if isinstance(each, list) else each:,} {name}"
                for name, each in self.facts[what].items()
            )
            for what in ("items", "domains", "users")
        ]
        fresh = "" if self.optimizer else "; the optimiser's state begins anew"
        return f"continues {self.facts['run']}: {'; '.join(said)}{fresh}"


def continuation_of(
    earlier: Predecessor,
    store: InteractionStore,
    model: CrossDomainHSTU,
    settings: RunSettings,
    build: Callable[[DomainCatalog], CrossDomainHSTU],
    users: Mapping[str, int],
) -> Continuation:
    """Carry a run's best weights, and the optimiser's state of its last step, into a new model.

    Args:
        earlier: the run that is continued.
        store: the newer store.
        model: of that store, as it would start.
        settings: of the new training; ``train.new_items`` says how new items begin.
        build: makes a model of the same settings for another catalogue.
        users: numbers of users that it trains on, to be told.

    Raises:
        InputError: no checkpoint there, an item that has changed its domain, another number of
            domains where each has positions, or a layer of one's own whose parameters follow from
            the items or domains in a way that is not understood.
    """
    run = earlier.run
    old, new = DomainCatalog.load(run), store.catalog
    item_rows = new.ids_in(old)
    item_rows[1:][item_rows[1:] == 0] = -1  # row 0 is padding, in both
    if (older := settings.train.older_per_domain) and old.num_domains != new.num_domains:
        raise InputError(
            f"{store.path} has {new.num_domains} domains, {run} was trained with "
            f"{old.num_domains}: with xd_train.older_per_domain = {older!r} a model has positions "
            "for the events of each; train without --continue-from"
        )
    names = {name: number for number, name in enumerate(old.domain_names)}
    domain_rows = torch.tensor([names.get(name, -1) for name in new.domain_names])
    kinds, rows = _kinds(build), {_ITEM: item_rows, _DOMAIN: domain_rows}
    if model.item_features is not None:
        theirs = load_features(run, settings)
        assert theirs is not None
        _check_widths(run, model.item_features, theirs)
        rows[_VALUE] = model.item_features.value_rows_in(theirs)
        kinds |= {name: _VALUE for name in model.state_dict() if name.endswith(f".{VALUES}")}
    weights, _ = load_checkpoint(run / MODEL_FILE)
    carried = {}
    for name, fresh in model.state_dict().items():
        fresh = fresh.cpu()
        _check_known(run, name, weights)
        if (kind := kinds.get(name)) is None:
            carried[name] = weights[name]
            continue
        if kind == _ITEM:
            fresh = _begin_new(fresh, weights[name], item_rows, store, settings)
        carried[name] = _with_rows(fresh, weights[name], rows[kind])
    present = old.item_domains[1:] >= 0
    kept = int((item_rows[1:] > 0).sum())
    facts = {
        "run": str(run.resolve()),
        "until": earlier.until,
        "weights": sha256_of(run / MODEL_FILE),
        "items": {
            "kept": kept,
            "new": int((new.item_domains[1:] >= 0).sum()) - kept,
            "removed": int(present.sum()) - kept,
        },
        "domains": {
            "kept": [name for name in new.domain_names if name in names],
            "new": [name for name in new.domain_names if name not in names],
            "removed": [name for name in old.domain_names if name not in new.domain_names],
        },
        "users": dict(users),
    }
    return Continuation(carried, _optimizer_state(run, kinds, rows), facts)


def _check_widths(run: Path, ours: FeatureTable, theirs: FeatureTable) -> None:
    """Refuse features that are of another kind or length in the newer store.

    Raises:
        InputError: the message names the first of them.
    """
    for name in (*theirs.categories, *theirs.widths):
        here, there = (table.widths.get(name, "a category") for table in (ours, theirs))
        if here != there:
            told = [f"{x} numbers" if isinstance(x, int) else x for x in (here, there)]
            raise InputError(
                f"{run} was trained with {told[1]} as the feature {name!r}, and the newer store "
                f"has {told[0]}; prepare it with the same features"
            )


def _check_known(run: Path, name: str, weights: Mapping[str, Tensor]) -> None:
    if name not in weights:
        raise InputError(f"{run / MODEL_FILE}: has no {name}; continue from a whole run")


def _optimizer_state(
    run: Path, kinds: Mapping[str, str], rows: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Carry the moments row by row; those of new rows are zero, as at the start of a training."""
    if not (run / STATE_FILE).exists():
        return {}
    state, carried = load_checkpoint(run / STATE_FILE)[0], {}
    for key, value in state.items():
        if (name := parameter_of(key)) is None:
            continue
        kind = kinds.get(name)
        if kind is not None and value.ndim:
            value = _with_rows(
                value.new_zeros(len(rows[kind]), *value.shape[1:]), value, rows[kind]
            )
        carried[key] = value
    return carried


def _with_rows(fresh: Tensor, old: Tensor, rows: Tensor) -> Tensor:
    """Put the old rows where they belong; -1 leaves a fresh one."""
    kept = rows >= 0
    value = fresh.clone()
    value[kept] = old[rows[kept]]
    return value


def _begin_new(
    fresh: Tensor, old: Tensor, rows: Tensor, store: InteractionStore, settings: RunSettings
) -> Tensor:
    """Let new items begin around the mean of others, each with the noise of its own start.

    The noise keeps items apart that are new together: with equal vectors none would rank above
    another.

    Args:
        fresh: (I + 1, K) float, vectors as a new model draws them.
        old: those of the run.
        rows: (I + 1,) int64, the row of each item in ``old``, -1 for a new one.
        store: the newer store.
        settings: ``train.new_items``.
    """
    if settings.train.new_items == "random":
        return fresh
    catalog, known, begun = store.catalog, rows > 0, fresh.clone()
    vectors = torch.zeros_like(fresh)
    vectors[known] = old[rows[known]]
    for domain in range(catalog.num_domains):
        items = catalog.items_of(domain)
        if bool(known[items].any()):
            begun[items] += vectors[items[known[items]]].mean(0)
    if settings.train.new_items == "co-occurring":
        means, found = _neighbours(vectors, known, store, settings)
        begun[found] = fresh[found] + means[found]
    return begun


def _neighbours(
    vectors: Tensor, known: Tensor, store: InteractionStore, settings: RunSettings
) -> tuple[Tensor, Tensor]:
    """Return the mean vector of known items next to each item in training, and where there is one.

    Args:
        vectors: (I + 1, K) float.
        known: (I + 1,) bool.
        store: whose training events are read, and no held-out ones.
        settings: of the training.
    """
    data = SequenceData(store, Split.TRAIN, settings.train.window)
    items, _, users = data.events()
    same = users[1:] == users[:-1]
    before, after = items[:-1][same], items[1:][same]
    sums, counts = torch.zeros_like(vectors), torch.zeros(len(vectors))
    for one, other in ((before, after), (after, before)):
        of_known = known[other]
        sums.index_add_(0, one[of_known], vectors[other[of_known]])
        counts += torch.bincount(one[of_known], minlength=len(vectors))
    return sums / counts.clamp(min=1).unsqueeze(1), counts > 0


def _kinds(build: Callable[[DomainCatalog], CrossDomainHSTU]) -> dict[str, str]:
    """Name the parameters that have a row for every item or every domain.

    They are found by what grows in a model of one more of them, so that a layer of one's own needs
    to say nothing.

    Raises:
        InputError: a parameter that grows otherwise.
    """

    def shapes(items: int, domains: int) -> dict[str, torch.Size]:
        catalog = DomainCatalog(torch.zeros(items + 1), [str(d) for d in range(domains)])
        with torch.device("meta"):  # shapes alone, without memory or random numbers
            return {name: value.shape for name, value in build(catalog).state_dict().items()}

    least = shapes(1, 2)
    kinds = {}
    for kind, more in ((_ITEM, shapes(2, 2)), (_DOMAIN, shapes(1, 3))):
        for name, shape in more.items():
            if shape == least.get(name):
                continue
            before = least.get(name)
            if before is None or shape != (before[0] + 1, *before[1:]):
                raise InputError(
                    f"{name} has shape {tuple(shape)} where one {kind} less has "
                    f"{None if before is None else tuple(before)}; only parameters with a row for "
                    f"each {kind} can be carried to a newer store: train without --continue-from"
                )
            kinds[name] = kind
    return kinds
