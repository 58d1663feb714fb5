"""TAPE against its formula, and as the identity it starts as."""

import pytest
import torch
from tiny_models import draw_histories, hidden_states, tiny_model, to_batch

from hstu_xd.model.inputs import TransitionAwarePositionalEmbedding

DOMAINS = torch.tensor([0, 0, 2, 1, 3, 3])
TARGETS = torch.tensor([1, 0, 0, 1, 3, 2])


def trained_tape() -> TransitionAwarePositionalEmbedding:
    tape = TransitionAwarePositionalEmbedding(4, 6).double()
    with torch.no_grad():
        for parameter in tape.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return tape


def test_zero_at_the_start() -> None:
    tape = TransitionAwarePositionalEmbedding(4, 6)
    assert torch.equal(tape(DOMAINS, TARGETS), torch.zeros(6, 6))


def test_the_formula() -> None:
    """r_i = scale * m[d_{i+1}] * (W m[d_i] + b) where the domain changes."""
    tape = trained_tape()
    state = tape.state_dict()
    table, scale = state["_domain_emb.weight"], state["_scale"]
    weight, intercept = state["_transition.weight"], state["_transition.bias"]
    found = tape(DOMAINS, TARGETS)
    for row, (source, target) in enumerate(zip(DOMAINS.tolist(), TARGETS.tolist())):
        expected = torch.zeros(6, dtype=torch.float64)
        if source != target:
            expected = scale * table[target] * (weight @ table[source] + intercept)
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_zero_while_the_domain_stays() -> None:
    assert torch.equal(trained_tape()(DOMAINS, DOMAINS), torch.zeros(6, 6).double())


def test_the_direction_of_a_switch_matters() -> None:
    there, back = trained_tape()(torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert not torch.allclose(there, back)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "target_domain_embedding"])
def test_the_model_adds_it_before_the_first_layer(beside: bool) -> None:
    """The input of the first layer is sqrt(K) e + p + r, and what the control adds, no more."""
    model = tiny_model(tape=True, target_domain_embedding=beside)
    batch = to_batch(draw_histories([9, 4]))
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule("_hstu").register_forward_pre_hook(
        lambda _module, arguments: inputs.append(arguments[0])
    )
    hidden_states(model, batch)
    hook.remove()
    items = model.get_parameter("_embedding_module._item_emb.weight")[batch.item_ids]
    positions = torch.cat([torch.arange(9), torch.arange(4)])
    expected = items * 4 + model.get_parameter("_input_features_preproc._pos_emb.weight")[positions]
    signal = model.get_submodule("_tape")(
        model.catalog.domain_of(batch.item_ids), batch.target_domains
    )
    assert signal.abs().max() > 0
    expected = expected + signal
    if beside:
        expected = expected + model.get_parameter("_target_domain_emb.weight")[batch.target_domains]
    torch.testing.assert_close(inputs[0], expected)
