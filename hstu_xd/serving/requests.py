"""What a session refuses before anything changes.

What a session is asked for one user, and what it answers.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.encoder import HSTULayer
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving.state import UserState


@dataclass(frozen=True)
class Request:
    """What a user is asked for.

    Attributes:
        user: who.
        target_domains: (V,) domain ids, at least one.
        timestamp: time of the request; None: that of the last event.
    """

    user: Hashable
    target_domains: Sequence[int]
    timestamp: int | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a request is answered with.

    Attributes:
        vectors: (V, K) float, the user's unit vector for each domain.
        seen: (n,) int64, items that the user has met, those that left the window too.
        last_time: time of the user's last event; None without events.
    """

    vectors: Tensor
    seen: Tensor
    last_time: int | None


def arriving_events(
    catalog: DomainCatalog,
    users: Sequence[Hashable],
    item_ids: Sequence[int],
    timestamps: Sequence[int],
) -> dict[Hashable, Tensor]:
    """(3, m) int64 events of each user, see :func:`checked_events`.

    Raises:
        InputError: lengths that differ, or an unknown item.
    """
    if not len(users) == len(item_ids) == len(timestamps):
        raise InputError(
            f"{len(users)} users, {len(item_ids)} items and {len(timestamps)} timestamps; one "
            "of each an event is needed"
        )
    columns: dict[Hashable, tuple[list[int], list[int]]] = {}
    for user, item, time in zip(users, item_ids, timestamps):
        items, times = columns.setdefault(user, ([], []))
        items.append(item)
        times.append(time)
    return {user: checked_events(catalog, *events) for user, events in columns.items()}


def checked_events(
    catalog: DomainCatalog, item_ids: Sequence[int], timestamps: Sequence[int]
) -> Tensor:
    """(3, m) int64: items, timestamps and domains.

    Raises:
        InputError: an unknown item.
    """
    check_items(catalog, item_ids)
    items = torch.tensor(item_ids, dtype=torch.int64)
    times = torch.tensor(timestamps, dtype=torch.int64)
    return torch.stack([items, times, catalog.domain_of(items)])


def check_items(catalog: DomainCatalog, item_ids: Sequence[int]) -> None:
    """Refuse ids beyond the catalogue."""
    known = catalog.num_items
    for item in item_ids:
        if not 1 <= item <= known:
            raise InputError(f"unknown item {item}; the catalogue has items 1..{known}")


def check_domains(catalog: DomainCatalog, requested: Sequence[Sequence[int]]) -> None:
    """Refuse unknown domains."""
    known = catalog.num_domains
    for domains in requested:
        for domain in domains:
            if not 0 <= domain < known:
                raise InputError(f"unknown domain {domain}; the catalogue has 0..{known - 1}")


def check_order(user: Hashable, state: UserState, events: Tensor) -> None:
    """Refuse events that go back in time."""
    times = state.timestamps[-1:].tolist() + events[1].tolist()
    for last, time in pairwise(times):
        if time < last:
            raise InputError(
                f"user {user!r}: an event at {time} after one at {last}; append events in order of "
                "time"
            )


def check_model(model: CrossDomainHSTU) -> None:
    """Refuse a model that a session would not compute as the full encoder does."""
    weight, settings = next(model.parameters()), model.settings
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise InputError(
            f"model is {weight.dtype} on {weight.device}; a session needs torch.float32 on the "
            "CPU: model.float().cpu()"
        )
    if settings.normalization != "silu":
        raise InputError(
            f"the model's normalization is {settings.normalization!r}; a session computes 'silu' "
            "only: encode whole histories with model.encode"
        )
    for layer in model.get_submodule("_hstu._attention_layers").children():
        _check_layer(layer, settings.layer)


# What a subclass of HSTU's layer may override, as a session asks the layer itself for it.
_ASKED = ("__init__", "combine")


def _check_layer(layer: nn.Module, name: str) -> None:
    """Refuse a layer that computes otherwise in the encoder than a session would."""
    needed = (
        "a session computes layers derived from hstu_xd.model.encoder.HSTULayer that override "
        "combine alone; encode whole histories with model.encode or hstu-xd recommend"
    )
    if not isinstance(layer, HSTULayer):
        raise InputError(f"the model's layer is {name}; {needed}")
    for cls in type(layer).mro()[: type(layer).mro().index(HSTULayer)]:
        changed = [x for x in vars(HSTULayer) if x in vars(cls) and x not in _ASKED]
        changed = [x for x in changed if callable(getattr(HSTULayer, x))]
        if changed:
            raise InputError(f"the model's layer {name} overrides {changed[0]}; {needed}")
