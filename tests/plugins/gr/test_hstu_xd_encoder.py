"""HSTU_XD against upstream's HSTU: equal with every switch off, and at its zero start."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from upstream_models import (
    BLOCKS,
    EVERYTHING,
    LENGTHS,
    batch,
    encode,
    hstu_xd,
    shake,
    upstream_hstu,
)

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.model.hstu import load_hstu
from hstu_xd.plugins.gr.research.domain_batches import NEXT_DOMAINS

# "auto" runs upstream's own layers; ours sum the gradient of the bias tables in another order.
TOKENS: dict[str, Any] = {"segment_by": "count", "segment_length": 4, "history_tokens": 2}
GRADIENT_TOLERANCE = {"auto": 0.0, "reference": 1e-5}


def twins(**switches: Any) -> tuple[nn.Module, nn.Module]:
    """Upstream's model and ours with the same parameters, ours grown by what it adds."""
    theirs, ours = shake(upstream_hstu()), hstu_xd(**switches)
    load_hstu(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("impl", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("timed", [True, False], ids=["rel_bias", "no_rel_bias"])
def test_all_off_is_hstu_to_the_last_bit_forward_and_backward(impl: str, timed: bool) -> None:
    bias = {} if timed or impl == "auto" else {"enable_relative_attention_bias": False}
    theirs, ours = shake(upstream_hstu()), hstu_xd(impl=impl, **bias)
    features = batch()
    if not timed:  # upstream's way of going without the bias
        del features["past_payloads"]["timestamps"]
    state = {k: v for k, v in theirs.state_dict().items() if not bias or "_rel_attn_bias" not in k}
    load_hstu(ours, state)
    expected, found = encode(theirs, features), encode(ours, features)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if name in gradients and parameter.grad is not None:
            tolerance = GRADIENT_TOLERANCE[impl]
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=0, atol=tolerance * scale, msg=name
            )


def test_all_off_eager_agrees() -> None:
    theirs, ours = twins(impl="eager")
    features = batch()
    torch.testing.assert_close(encode(ours, features), encode(theirs, features), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", GRADIENT_TOLERANCE)
def test_fifty_steps_of_training_are_the_same_steps(impl: str) -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
        torch.manual_seed(5)
        values = []
        for step in range(50):
            optimizer.zero_grad()
            encoded = encode(model, batch(step))
            loss = (encoded[..., :4] - encoded[..., 4:8]).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    expected = losses(upstream_hstu(dropout=0.2))
    found = losses(hstu_xd(dropout=0.2, impl=impl))
    assert found == pytest.approx(expected, rel=10 * GRADIENT_TOLERANCE[impl], abs=0)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("switch", ["tape", "ddsr", "target_domain_embedding"])
def test_warm_start_computes_what_the_checkpoint_computed(switch: str) -> None:
    theirs, ours = shake(upstream_hstu()), hstu_xd(**{switch: True})
    prefixed = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    new = load_hstu(ours, prefixed)
    assert new
    assert set(new) == set(ours.state_dict()) - set(theirs.state_dict())
    torch.testing.assert_close(encode(ours, batch()), encode(theirs, batch()), rtol=0, atol=1e-6)


def test_parameter_names_are_upstreams_and_its_addition() -> None:
    theirs, ours = upstream_hstu(), hstu_xd(**EVERYTHING)
    missing = {n for n, _ in theirs.named_parameters()} - {n for n, _ in ours.named_parameters()}
    assert not missing
    assert len(ours._hstu._attention_layers) == BLOCKS


def test_initial_weights_are_those_upstream_would_draw() -> None:
    theirs, ours = upstream_hstu(seed=7).state_dict(), hstu_xd(seed=7, **EVERYTHING).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize("more", [{}, TOKENS], ids=["everything", "history_tokens"])
def test_every_parameter_receives_a_gradient(more: dict[str, Any]) -> None:
    model = shake(hstu_xd(**EVERYTHING, **more))
    encode(model, batch()).square().sum(2)[:, :1].sum().backward()
    encoded = encode(model, batch())
    (encoded * torch.randn_like(encoded)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_encode_gives_the_last_position_and_the_domain_matters() -> None:
    model, features = shake(hstu_xd(**EVERYTHING)).eval(), batch()
    embeddings = model.get_item_embeddings(features["past_ids"])
    vectors = model.encode(past_embeddings=embeddings, **features)
    whole = encode(model, features)
    assert torch.equal(vectors, whole[torch.arange(len(LENGTHS)), LENGTHS - 1])
    payload = features["past_payloads"][NEXT_DOMAINS]
    payload.scatter_(1, LENGTHS[:, None] - 1, (payload.gather(1, LENGTHS[:, None] - 1) + 1) % 3)
    asked_otherwise = model.encode(past_embeddings=embeddings, **features)
    assert (vectors - asked_otherwise).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("more", [{}, TOKENS], ids=["everything", "history_tokens"])
def test_what_lies_behind_the_history_is_not_read(more: dict[str, Any]) -> None:
    model, features = shake(hstu_xd(**EVERYTHING, **more)).eval(), batch()
    embeddings = model.get_item_embeddings(features["past_ids"])
    before = model.encode(past_embeddings=embeddings, **features)
    # Training scatters the target's id there before the forward pass.
    features["past_ids"].scatter_(1, LENGTHS[:, None], 5)
    embeddings = model.get_item_embeddings(features["past_ids"])
    assert torch.equal(model.encode(past_embeddings=embeddings, **features), before)


@pytest.mark.parametrize("name", [NEXT_DOMAINS, "timestamps"])
def test_missing_payload_is_named(name: str) -> None:
    model, features = hstu_xd(**EVERYTHING), batch()
    del features["past_payloads"][name]
    with pytest.raises(InputError, match=name):
        encode(model, features)


def test_incremental_arguments_work_as_upstreams_or_are_refused() -> None:
    features = batch()

    def run(model: nn.Module) -> Any:
        embeddings = model.get_item_embeddings(features["past_ids"])
        return model.encode(past_embeddings=embeddings, return_cache_states=True, **features)

    theirs, ours = twins()
    (expected, states), (found, own) = run(theirs), run(ours)
    assert torch.equal(found, expected)
    assert len(states) == len(own) == BLOCKS
    with pytest.raises(HstuXdError, match="return_cache_states"):
        run(hstu_xd(domain_mask=True))


def test_bfloat16_is_as_exact_as_a_dense_reference_in_bfloat16() -> None:
    features = batch()
    rows = torch.arange(features["past_ids"].shape[1]) < LENGTHS[:, None]

    def errors(impl: str) -> Tensor:
        model = shake(hstu_xd(**EVERYTHING, impl=impl)).eval()
        expected = encode(model, features)
        found = encode(model.to(torch.bfloat16), features)
        assert found.dtype == torch.bfloat16
        return (found.float() - expected)[rows].norm(dim=1)

    ours, dense = errors("eager"), errors("reference")
    assert ours.max() <= 2 * dense.max()
    assert ours.mean() <= 2 * dense.mean()


def test_debug_str_tells_the_switches() -> None:
    theirs = upstream_hstu().debug_str()
    assert hstu_xd().debug_str() == theirs.replace("HSTU", "HSTU_XD")
    assert hstu_xd(normalization="softmax").debug_str().endswith("-softmax")
    text = hstu_xd(**EVERYTHING).debug_str()
    assert text == theirs.replace("HSTU", "HSTU_XD") + "-mask-view1-tape-ddsr4-target"
    text = hstu_xd(**TOKENS).debug_str()
    assert text == theirs.replace("HSTU", "HSTU_XD") + "-count4-tokens2"


@pytest.mark.parametrize(
    "detail",
    [
        {"combine": "after_gate"},
        {"query_target_domain": False},
        {"state_age_bias": False},
        {"state_from": "output"},
        {"full_attention_layers": (0,)},
        {"concat_ua": True},
        {"impl": "eager"},
    ],
    ids=str,
)
def test_two_models_never_share_the_path_of_a_checkpoint(detail: dict[str, Any]) -> None:
    switches = {"domain_mask": True, "ddsr": True}
    text = hstu_xd(**switches, **detail).debug_str()
    assert text != hstu_xd(**switches).debug_str()
    assert text.startswith(upstream_hstu().debug_str().replace("HSTU", "HSTU_XD") + "-")
    assert "/" not in text
