"""Dropout in training: where it acts, on which share of the numbers, and by what it scales."""

from typing import Any

import pytest
import torch
from tiny_models import NORM_LENGTH, NUM_DOMAINS, draw_histories, tiny_catalog, to_batch
from torch import Tensor, nn

from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings

INPUT, LAYERS = 0.2, 0.5
# Numbers are dropped one by one, so that 20,000 and more of them keep within 0.005 of the rate.
BATCH = to_batch(draw_histories([NORM_LENGTH] * 40))
MOST = 0.02


def model_with(dropout_rate: float, linear_dropout_rate: float, **switches: Any) -> CrossDomainHSTU:
    torch.manual_seed(1)
    settings = EncoderSettings(
        num_domains=NUM_DOMAINS,
        norm_length=NORM_LENGTH,
        embedding_dim=32,
        num_blocks=2,
        num_heads=4,
        dqk=4,
        dv=8,
        linear_dropout_rate=linear_dropout_rate,
        **switches,
    )
    model = CrossDomainHSTU(tiny_catalog(), settings, dropout_rate=dropout_rate)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """What the encoder is given and what each layer projects, during one pass over the batch."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = x.detach()

    features = model.get_submodule("_input_features_preproc")
    hooks = [features.register_forward_hook(lambda _module, _inputs, out: keep("input", out))]
    for layer in ("0", "1"):
        projection = model.get_submodule(f"_hstu._attention_layers.{layer}._o")
        hooks.append(
            projection.register_forward_pre_hook(
                lambda _module, inputs, layer=layer: keep(layer, inputs[0])
            )
        )
    model(BATCH)
    for hook in hooks:
        hook.remove()
    return found


def share_of_zeros(x: Tensor) -> float:
    assert x.numel() >= 20_000
    return (x == 0).float().mean().item()


def check_scale(dropped: Tensor, whole: Tensor, rate: float) -> None:
    """What is not dropped is larger by so much that the mean stays."""
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - rate), rtol=1e-5, atol=1e-6)


every_combination = pytest.mark.parametrize(
    "switches",
    [{}, {"ddsr": True, "combine": "after_gate"}, {"domain_mask": True, "concat_ua": True}],
    ids=["hstu", "after_gate", "concat_ua"],
)


@every_combination
def test_training_drops_the_share_that_the_settings_say(switches: dict[str, Any]) -> None:
    found = numbers(model_with(INPUT, LAYERS, **switches).train())
    shares = {name: share_of_zeros(x) for name, x in found.items()}
    assert shares == pytest.approx({"input": INPUT, "0": LAYERS, "1": LAYERS}, abs=MOST)


@every_combination
def test_what_is_kept_is_scaled(switches: dict[str, Any]) -> None:
    model = model_with(INPUT, 0.0, **switches)
    check_scale(numbers(model.train())["input"], numbers(model.eval())["input"], INPUT)
    # Without dropout before them, so that the first layer is given the same in both modes.
    model = model_with(0.0, LAYERS, **switches)
    check_scale(numbers(model.train())["0"], numbers(model.eval())["0"], LAYERS)


def test_nothing_is_dropped_outside_training() -> None:
    found = numbers(model_with(INPUT, LAYERS).eval())
    assert not any((x == 0).any() for x in found.values())


def test_every_pass_draws_anew() -> None:
    model = model_with(INPUT, LAYERS).train()
    first, second = numbers(model), numbers(model)
    for name, x in first.items():
        agreeing = ((x == 0) == (second[name] == 0)).float().mean().item()
        assert agreeing < 0.9, name
