"""What a layer's heads read and what DDSR is given and answers, against the plain layer."""

from typing import Any

import pytest
import torch
from plain_hstu import PlainLayer
from tiny_models import NORM_LENGTH, domain_of, draw_histories, tiny_model, to_batch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.state_tiles import StateTiles

# As long as the model's window, so that the plain layer needs no padding.
HISTORY = draw_histories([NORM_LENGTH])[0]
BATCH = to_batch([HISTORY])
DOMAINS = torch.tensor([domain_of(item) for item in HISTORY.items])


def calls_of(model: nn.Module, name: str) -> tuple[list[Any], Tensor]:
    """Arguments and result of a submodule during one pass over the history."""
    kept: list[tuple[list[Any], Tensor]] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _module, inputs, output: kept.append((list(inputs), output))
    )
    model(BATCH)
    hook.remove()
    return kept[0]


def plain_gate_and_read(model: nn.Module, name: str, x: Tensor, visible: Tensor) -> Any:
    """U and LN(Y) of a layer with the same parameters, (N, H dv) each."""
    plain = PlainLayer(16, NORM_LENGTH, 4, 5, 4).double()
    own = model.get_submodule(name).state_dict()
    # The output projection stays out: with concat_ua it has another width.
    own = {key: value for key, value in own.items() if not key.startswith(("_ddsr.", "_o."))}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    times, next_times = BATCH.timestamps[None], BATCH.next_timestamps[None]
    return (part[0] for part in plain.gate_and_read(x[None], times, next_times, visible))


def seen(switches: dict[str, Any], layer: int) -> Tensor:
    """(1, H, N, N) which keys each head may read, causality aside."""
    same = BATCH.target_domains[:, None] == DOMAINS
    own = DOMAINS[:, None] == DOMAINS
    if not switches.get("domain_mask") or layer in switches.get("full_attention_layers", ()):
        own = torch.ones_like(own)
    target_heads = switches.get("target_view_heads", 0)
    return torch.stack([own] * (4 - target_heads) + [same] * target_heads)[None]


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"domain_mask": True},
        {"domain_mask": True, "full_attention_layers": (1,)},
        {"domain_mask": True, "target_view_heads": 1},
        {"domain_mask": True, "target_view_heads": 3, "full_attention_layers": (0,)},
        {"target_view_heads": 2},
        {"domain_mask": True, "target_view_heads": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_each_head_reads(switches: dict[str, Any], layer: int) -> None:
    model = tiny_model(**switches).double()
    name = f"_hstu._attention_layers.{layer}"
    (x, *_), out = calls_of(model, name)
    u, read = plain_gate_and_read(model, name, x, seen(switches, layer))
    expected = model.get_submodule(f"{name}._o")(u * read) + x
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("state_from", ["input", "output"])
@pytest.mark.parametrize("combine", ["before_gate", "after_gate", "concat_ua"])
@pytest.mark.parametrize("states_per_domain", [1, 3])
def test_what_ddsr_is_given_and_where_its_answer_goes(
    state_from: str, combine: str, states_per_domain: int
) -> None:
    """H = X + Wo(U * (LN(Y) + C)), or C after the gate; the query is made of LN(X) always."""
    concat = combine == "concat_ua"
    model = tiny_model(
        domain_mask=True,
        ddsr=True,
        state_from=state_from,
        states_per_domain=states_per_domain,
        concat_ua=concat,
        combine="before_gate" if concat else combine,
    ).double()
    name = "_hstu._attention_layers.1"
    (x, *_), out = calls_of(model, name)
    (hidden, states, reads, targets), answer = calls_of(model, f"{name}._ddsr")

    normed = layer_norm(x, [16], eps=1e-6)
    u, read = plain_gate_and_read(model, name, x, seen({"domain_mask": True}, 1))
    answered = read + answer
    inner = {
        "before_gate": u * answered,
        "after_gate": u * read + answer,
        "concat_ua": torch.cat([u, answered, u * answered], dim=1),
    }[combine]
    expected = model.get_submodule(f"{name}._o")(inner) + x
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hidden, normed, rtol=1e-12, atol=1e-12)
    written = normed if state_from == "input" else read
    torch.testing.assert_close(states, written, rtol=1e-10, atol=1e-10)
    assert answer.abs().max() > 0.01
    assert targets.tolist() == [*DOMAINS[1:].tolist(), HISTORY.request_domain]
    built = StateTiles.build(
        DomainGrouping.from_jagged(DOMAINS, BATCH.offsets, 3),
        BATCH.timestamps,
        BATCH.next_timestamps,
        states_per_domain=states_per_domain,
    )
    for part in ("tokens", "rows", "slots", "unseen", "ages"):
        assert torch.equal(getattr(reads.tiles, part), getattr(built, part)), part
