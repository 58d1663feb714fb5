"""Switches whose outputs start at zero leave a fresh model bit-equal to plain HSTU."""

from typing import Any

import pytest
import torch
from tiny_models import draw_histories, encode, tiny_model

HISTORIES = draw_histories([20, 1, 9])
ADDITIONS: dict[str, dict[str, Any]] = {
    "tape": {"tape": True},
    "target_domain_embedding": {"target_domain_embedding": True},
    "ddsr": {"ddsr": True},
    "ddsr_reads_output": {"ddsr": True, "state_from": "output"},
    "ddsr_after_gate": {"ddsr": True, "combine": "after_gate"},
    "ddsr_three_states": {"ddsr": True, "states_per_domain": 3},
    "all": {"tape": True, "ddsr": True, "target_domain_embedding": True, "states_per_domain": 2},
    "all_masked": {
        "tape": True,
        "ddsr": True,
        "target_domain_embedding": True,
        "domain_mask": True,
    },
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_bit_equal_at_the_start(name: str) -> None:
    """A mask is no addition: it stays the same on both sides."""
    switches = ADDITIONS[name]
    base = tiny_model(domain_mask=switches.get("domain_mask", False))
    extended = tiny_model(trained=False, **switches)
    extended.load_hstu(base.state_dict())
    assert torch.equal(encode(extended, HISTORIES), encode(base, HISTORIES))


@pytest.mark.parametrize("name", ADDITIONS)
def test_no_longer_equal_once_trained(name: str) -> None:
    switches = ADDITIONS[name]
    base = tiny_model(domain_mask=switches.get("domain_mask", False))
    extended = tiny_model(**switches)
    extended.load_hstu(base.state_dict())
    assert not torch.allclose(encode(extended, HISTORIES), encode(base, HISTORIES), atol=1e-3)


def test_the_mask_changes_the_model() -> None:
    plain, masked = tiny_model(), tiny_model(domain_mask=True)
    assert not torch.allclose(encode(plain, HISTORIES), encode(masked, HISTORIES), atol=1e-3)


def test_a_full_layer_under_the_mask_is_full() -> None:
    every_layer = tiny_model(domain_mask=True, full_attention_layers=(0, 1))
    assert torch.equal(encode(every_layer, HISTORIES), encode(tiny_model(), HISTORIES))
