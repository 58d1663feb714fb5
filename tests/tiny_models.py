"""Small histories and models, written as lists so that a test can change one event and rerun."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings

NUM_DOMAINS = 3
ITEMS_PER_DOMAIN = 8
NORM_LENGTH = 24

EVERYTHING: dict[str, Any] = {
    "domain_mask": True,
    "tape": True,
    "ddsr": True,
    "target_domain_embedding": True,
    "target_view_heads": 2,
    "states_per_domain": 2,
}
# All combinations that take different paths through the layer.
SWITCHES: dict[str, dict[str, Any]] = {
    "hstu": {},
    "mask": {"domain_mask": True},
    "tape": {"tape": True},
    "target_domain_embedding": {"target_domain_embedding": True},
    "target_view": {"domain_mask": True, "target_view_heads": 2},
    "target_view_all_heads": {"domain_mask": True, "target_view_heads": 4},
    "target_view_beside_full": {"target_view_heads": 1},
    "ddsr": {"ddsr": True},
    "mask_ddsr": {"domain_mask": True, "ddsr": True},
    "ddsr_reads_output": {"domain_mask": True, "ddsr": True, "state_from": "output"},
    "ddsr_after_gate": {"domain_mask": True, "ddsr": True, "combine": "after_gate"},
    "ddsr_of_the_paper": {
        "domain_mask": True,
        "ddsr": True,
        "query_target_domain": False,
        "state_age_bias": False,
        "states_per_domain": 1,
    },
    "ddsr_three_states": {"domain_mask": True, "ddsr": True, "states_per_domain": 3},
    "one_full_layer": {"domain_mask": True, "full_attention_layers": (1,)},
    "concat_ua": {"domain_mask": True, "ddsr": True, "concat_ua": True},
    "no_bias": {"domain_mask": True, "enable_relative_attention_bias": False},
    "no_activation": {"linear_activation": "none"},
    "everything": EVERYTHING,
    "ddsr_in_the_first_layer": {"domain_mask": True, "ddsr": True, "ddsr_layers": (0,)},
    "ddsr_in_the_last_layer": EVERYTHING | {"ddsr_layers": (1,)},
    "segments_alone": {"segment_by": "count", "segment_length": 3},
    "history_tokens": {"segment_by": "count", "segment_length": 4, "history_tokens": 2},
    "history_tokens_of_domains": {
        "domain_mask": True,
        "segment_by": "session",
        "segment_gap": 50_000,
        "history_tokens": 1,
    },
    "history_tokens_and_everything": EVERYTHING
    | {"segment_by": "count", "segment_length": 2, "history_tokens": 2},
}


@dataclass(frozen=True)
class History:
    """One user's events and the request that follows them."""

    items: tuple[int, ...]
    times: tuple[int, ...]
    request_domain: int
    request_time: int

    def with_item(self, position: int, item: int) -> "History":
        """The same history with another item at one position."""
        return replace(self, items=(*self.items[:position], item, *self.items[position + 1 :]))

    def before(self, position: int, domain: int) -> "History":
        """The first events, and a request for the event at ``position`` (its domain is given)."""
        return History(self.items[:position], self.times[:position], domain, self.times[position])


def domain_of(item: int) -> int:
    """Domains alternate from item to item: their ids are not contiguous."""
    return (item - 1) % NUM_DOMAINS


def other_item(item: int) -> int:
    """Another item of the same domain."""
    return (item + NUM_DOMAINS - 1) % (NUM_DOMAINS * ITEMS_PER_DOMAIN) + 1


def tiny_catalog() -> DomainCatalog:
    items = range(1, NUM_DOMAINS * ITEMS_PER_DOMAIN + 1)
    domains = torch.tensor([0, *(domain_of(item) for item in items)])
    return DomainCatalog(domains, ["books", "films", "games"])


def draw_histories(lengths: Sequence[int], seed: int = 0) -> list[History]:
    rng = np.random.default_rng(seed)
    histories = []
    for length in lengths:
        items = rng.integers(1, NUM_DOMAINS * ITEMS_PER_DOMAIN + 1, length)
        times = np.cumsum(rng.integers(0, 3, length) * rng.integers(0, 100_000, length))
        histories.append(
            History(
                tuple(items.tolist()),
                tuple(times.tolist()),
                int(rng.integers(NUM_DOMAINS)),
                int(times.max(initial=0) + rng.integers(0, 1000)),
            )
        )
    return histories


def to_batch(histories: Sequence[History]) -> JaggedBatch:
    """Each token predicts the event after it; the last one predicts the request."""
    targets, next_times = [], []
    for history in histories:
        if history.items:
            targets += [*map(domain_of, history.items[1:]), history.request_domain]
            next_times += [*history.times[1:], history.request_time]
    return JaggedBatch(
        item_ids=torch.tensor([i for h in histories for i in h.items], dtype=torch.int64),
        timestamps=torch.tensor([t for h in histories for t in h.times], dtype=torch.int64),
        next_timestamps=torch.tensor(next_times, dtype=torch.int64),
        target_domains=torch.tensor(targets, dtype=torch.int64),
        offsets=torch.tensor([0, *np.cumsum([len(h.items) for h in histories]).tolist()]),
    )


def encode(
    model: CrossDomainHSTU, histories: Sequence[History], padded: int | None = None
) -> Tensor:
    """``model.encode`` with histories padded to ``padded`` events."""
    width = padded or max(len(h.items) for h in histories)
    return model.encode(
        torch.tensor([[*h.items, *[0] * (width - len(h.items))] for h in histories]),
        torch.tensor([[*h.times, *[0] * (width - len(h.times))] for h in histories]),
        torch.tensor([h.request_domain for h in histories]),
        torch.tensor([h.request_time for h in histories]),
    )


def tiny_model(*, trained: bool = True, impl: str = "auto", **switches: Any) -> CrossDomainHSTU:
    """A model in evaluation mode; ``trained`` moves every parameter, zero-initialised ones too."""
    torch.manual_seed(1)
    settings = EncoderSettings(
        num_domains=NUM_DOMAINS,
        norm_length=NORM_LENGTH,
        embedding_dim=16,
        num_blocks=2,
        num_heads=4,
        dqk=5,
        dv=4,
        linear_dropout_rate=0.0,
        impl=impl,
        **switches,
    )
    model = CrossDomainHSTU(tiny_catalog(), settings, dropout_rate=0.0).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def hidden_states(model: nn.Module, batch: JaggedBatch) -> Tensor:
    """What the encoder hands on before the output is normalised and cut to float32."""
    kept: list[Tensor] = []
    hook = model.get_submodule("_hstu").register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    try:
        model(batch)
    finally:
        hook.remove()
    return kept[0]
