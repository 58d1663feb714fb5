"""A gradient reaches every parameter of every switch combination.

At the very first step it cannot reach what lies behind an output that starts at zero (TAPE's
scale, DDSR's values); after one optimiser step it must. Rows of tables that no event touched stay
without one, and those alone.
"""

import re
from typing import Any

import pytest
import torch
from tiny_models import (
    EVERYTHING,
    NORM_LENGTH,
    SWITCHES,
    History,
    domain_of,
    draw_histories,
    tiny_model,
    to_batch,
)
from torch import Tensor, nn

HISTORIES = draw_histories([20, 1, 15, 7], seed=3)
BATCH = to_batch(HISTORIES)

# Parameters whose path to the loss leads through a factor that is zero in a fresh model.
BEHIND_A_ZERO = re.compile(
    r"_tape\.(_domain_emb|_transition)\."
    r"|_ddsr\.(_query|_key|_target_emb)\.|_ddsr\.(_initial_state|_age_w)$"
)

every_switch = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


def backward(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of an arbitrary, nowhere symmetric loss on all tokens' vectors."""
    model.zero_grad()
    direction = torch.randn(len(BATCH.item_ids), 16, generator=torch.Generator().manual_seed(5))
    (model(BATCH) * direction).tanh().sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not part of the graph"
        assert parameter.grad.isfinite().all(), name
        gradients[name] = parameter.grad.clone()
    return gradients


def after_one_step(**switches: Any) -> dict[str, Tensor]:
    model = tiny_model(trained=False, **switches).train()
    backward(model)
    torch.optim.AdamW(model.parameters(), lr=0.01).step()
    return backward(model)


@every_switch
def test_at_the_start_only_what_lies_behind_a_zero_has_none(switches: dict[str, Any]) -> None:
    gradients = backward(tiny_model(trained=False, **switches).train())
    without = {name for name, gradient in gradients.items() if not gradient.any()}
    assert without == {name for name in gradients if BEHIND_A_ZERO.search(name)}


@every_switch
def test_after_one_step_every_parameter_has_one(switches: dict[str, Any]) -> None:
    for name, gradient in after_one_step(**switches).items():
        assert gradient.any(), f"no gradient reaches {name}"
        if not is_table_of_events(name):
            rows = gradient.view(len(gradient), -1).any(1)
            assert rows.all(), f"no gradient reaches rows {(~rows).nonzero().flatten()} of {name}"


def is_table_of_events(name: str) -> bool:
    """Tables with rows for items, positions or time differences that need not occur."""
    return name.endswith(("_item_emb.weight", "_pos_emb.weight", "_pos_w", "_ts_w", "_age_w"))


def read_pairs(history: History, switches: dict[str, Any], layer: int) -> set[tuple[int, int]]:
    """(query, key) positions that some head of a layer reads."""
    domains = [*map(domain_of, history.items), history.request_domain]
    target_heads = switches.get("target_view_heads", 0)
    own = target_heads < 4
    masked = switches.get("domain_mask") and layer not in switches.get("full_attention_layers", ())
    return {
        (i, j)
        for i in range(len(history.items))
        for j in range(i + 1)
        if (own and (not masked or domains[j] == domains[i]))
        or (target_heads and domains[j] == domains[i + 1])
    }


@pytest.mark.parametrize("name", [n for n, s in SWITCHES.items() if "segment_by" not in s])
def test_only_touched_rows_have_one(name: str) -> None:
    switches = SWITCHES[name]
    touched: dict[str, set[int]] = {
        "_embedding_module._item_emb.weight": {item for h in HISTORIES for item in h.items},
        "_input_features_preproc._pos_emb.weight": set(range(20)),
    }
    if switches.get("enable_relative_attention_bias", True):
        for layer in (0, 1):
            pairs = [(h, i, j) for h in HISTORIES for i, j in read_pairs(h, switches, layer)]
            bias = f"_hstu._attention_layers.{layer}._rel_attn_bias."
            touched[bias + "_pos_w"] = {NORM_LENGTH - 1 + j - i for _, i, j in pairs}
            touched[bias + "_ts_w"] = {time_row(h, i, j) for h, i, j in pairs}
    gradients = after_one_step(**switches)
    for table, rows in touched.items():
        gradient = gradients[table]
        found = gradient.view(len(gradient), -1).any(1).nonzero().flatten().tolist()
        assert set(found) == rows, table


def time_row(history: History, query: int, key: int) -> int:
    next_time = [*history.times[1:], history.request_time][query]
    difference = max(1, abs(next_time - history.times[key]))
    return min(128, int(torch.tensor(float(difference)).log() / 0.301))


def test_unread_ages_have_none() -> None:
    """Ages that occur, "never written" included, and no others, have a bias to learn."""
    gradients = after_one_step(ddsr=True)
    for name in (n for n in gradients if n.endswith("_age_w")):
        rows = gradients[name].any(1)
        assert rows[128], "never written"
        assert not rows[60:128].any(), "no state is older than the longest history"
        assert torch.equal(gradients[name].all(1), rows), "a head has no gradient"


def test_dropout_leaves_no_parameter_behind() -> None:
    """Training mode with dropout on, as `train` runs it."""
    torch.manual_seed(0)
    model = tiny_model(**EVERYTHING).train()
    for module in model.modules():
        if hasattr(module, "_dropout_rate"):
            module._dropout_rate = 0.5
    assert all(gradient.any() for gradient in backward(model).values())
