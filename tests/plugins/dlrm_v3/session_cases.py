"""Sessions over the production path's model in its variants, and the whole models beside them."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream_dlrm  # noqa: F401  (skips where upstream is not importable)
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.configs import get_hstu_configs
from torch import Tensor

from hstu_xd.data.store import InteractionStore
from hstu_xd.plugins.dlrm_v3.domain_states import DomainStateStack, UncachedStack
from hstu_xd.plugins.dlrm_v3.launch import parsed_gin
from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU
from hstu_xd.plugins.dlrm_v3.requests import RequestBatch
from hstu_xd.plugins.dlrm_v3.session import DlrmSession, new_model
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings, cross_domain
from hstu_xd.plugins.dlrm_v3.store_dataset import configure, request_features, tables

GIN = Path(__file__).parents[3] / "gin" / "dlrm_stock.gin"
SIZES = ("xd_dlrm.norm_length = 40", "xd_dlrm.max_history = 12")
VARIANTS = {
    "stock": (),
    "tape": ("xd_encoder.tape = True",),
    "mask": ("xd_encoder.domain_mask = True", "xd_dlrm.user_token = True"),
    "mask+tape": (
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.target_domain_embedding = True",
    ),
    "ddsr": ("xd_encoder.ddsr = True", "xd_dlrm.user_token = True"),
    "all": (
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.ddsr = True",
        "xd_encoder.states_per_domain = 2",
        "xd_dlrm.user_token = True",
    ),
    "order": ("xd_dlrm.positions = 'order'", "xd_encoder.domain_mask = True"),
    "order+all": (
        "xd_dlrm.positions = 'order'",
        "xd_encoder.domain_mask = True",
        "xd_encoder.tape = True",
        "xd_encoder.ddsr = True",
        "xd_dlrm.user_token = True",
    ),
    "interest": ("xd_dlrm.interest = True", "xd_encoder.domain_mask = True"),
    "order+interest": (
        "xd_dlrm.interest = True",
        "xd_interest.kind = 'din'",
        "xd_dlrm.positions = 'order'",
        "xd_encoder.ddsr = True",
        "xd_dlrm.user_token = True",
    ),
    "feature": ("xd_dlrm.domain_as_feature = True", "xd_encoder.domain_mask = True"),
}


@contextmanager
def bound(store: Path, bindings: Sequence[str]) -> Iterator[DlrmSettings]:
    with parsed_gin(GIN, (f'dataset = "xd:{store}"', *SIZES, *bindings), told=GIN):
        yield DlrmSettings()


def shown(events: Sequence[tuple[int, int]], settings: DlrmSettings) -> list[tuple[int, int]]:
    """The events of the window, which slides by one or by three."""
    window: list[tuple[int, int]] = []
    for event in events:
        window.append(event)
        if len(window) > 12:
            del window[: 1 if settings.positions == "recency" else 3]
    return window


class Whole:
    """The definition: upstream's layers as they are, over the whole request of one user."""

    def __init__(self, store: InteractionStore, settings: DlrmSettings) -> None:
        config = configure(get_hstu_configs("debug"), settings)
        extension = dataclasses.replace(cross_domain(settings, 3, config), in_buckets=False)
        self.model = CrossDomainDlrmHSTU(
            config, tables(store, settings, 64), False, bf16_training=False, cross_domain=extension
        )
        self.model.get_submodule("_embedding_collection").to_empty(device="cpu")
        self.model.set_hammer_kernel(HammerKernel.PYTORCH)
        self.model.eval()
        self.store, self.settings = store, settings

    @torch.no_grad()
    def scores(
        self, number: int, events: Sequence[tuple[int, int]], candidates: list[int], time: int
    ) -> Tensor:
        events = shown(events, self.settings)
        items, times = (
            torch.tensor([event[column] for event in events], dtype=torch.int64)
            for column in (0, 1)
        )
        domains, asked = self.store.catalog.item_domains, torch.tensor(candidates)
        batch = RequestBatch(
            users=torch.tensor([number]),
            history_lengths=torch.tensor([len(events)]),
            items=items,
            times=times,
            domains=domains[items],
            candidate_lengths=torch.tensor([len(candidates)]),
            candidates=asked,
            candidate_domains=domains[asked],
            request_times=torch.full_like(asked, time),
            labels=torch.zeros_like(asked),
            actions=torch.ones_like(items),
        )
        sample = request_features(batch, self.settings)
        return self.model(sample.uih_features_kjt, sample.candidates_features_kjt)[3][0].double()


def randomize(model: Any) -> None:
    """Make every parameter large, so that no term is negligible."""
    for name, parameter in model.named_parameters():
        is_weight = "norm" in name and "weight" in name
        with torch.no_grad():
            if parameter.ndim < 2 or "emb" in name or "_xd_" in name:
                parameter.normal_(std=0.3).add_(1.0 if is_weight else 0.0)


@contextmanager
def session_and_whole(
    store_path: Path, variant: str, **options: Any
) -> Iterator[tuple[DlrmSession, Whole, InteractionStore]]:
    with bound(store_path, VARIANTS[variant]) as settings:
        store = InteractionStore.open(store_path)
        torch.manual_seed(5)
        model, whole = new_model(store, settings), Whole(store, settings)
        randomize(model)
        whole.model.load_state_dict(model.state_dict())
        yield DlrmSession(model, store, settings, **options), whole, store


def logged(store: InteractionStore, number: int) -> list[tuple[int, int]]:
    items, times = store.history(number)
    return [(int(item), int(time)) for item, time in zip(items, times)]


def counted(extend: Any, rows: list[int]) -> Any:
    def counting(self: Any, x: Tensor, *others: Any) -> Tensor:
        rows.append(len(x))
        return extend(self, x, *others)

    return counting


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the first layer computes from now on, call by call."""
    rows: list[int] = []
    for stack in (UncachedStack, DomainStateStack):
        monkeypatch.setattr(stack, "extend", counted(stack.extend, rows))
    return rows
