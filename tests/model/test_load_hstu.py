"""Loading a plain HSTU's checkpoint: upstream's names, what is ours alone, what does not fit."""

import re

import pytest
import torch
from tiny_models import EVERYTHING, draw_histories, encode, tiny_model
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU

HISTORIES = draw_histories([12, 3])


def names_of(num_blocks: int) -> set[str]:
    """Parameter names of a trained upstream HSTU."""
    layers = [
        f"_hstu._attention_layers.{i}.{name}"
        for i in range(num_blocks)
        for name in (
            "_uvqk",
            "_o.weight",
            "_o.bias",
            "_rel_attn_bias._ts_w",
            "_rel_attn_bias._pos_w",
        )
    ]
    tables = ["_embedding_module._item_emb.weight", "_input_features_preproc._pos_emb.weight"]
    return {*tables, *layers}


def checkpoint() -> dict[str, Tensor]:
    return dict(tiny_model().state_dict())


def test_every_switch_off_has_the_names_of_hstu() -> None:
    assert set(checkpoint()) == names_of(2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_fills_the_model(prefix: str) -> None:
    fresh = tiny_model(trained=False)
    state = {prefix + name: value for name, value in checkpoint().items()}
    assert fresh.load_hstu(state) == []
    assert torch.equal(encode(fresh, HISTORIES), encode(tiny_model(), HISTORIES))


def test_the_mask_buffer_of_upstream_is_ignored() -> None:
    state = {**checkpoint(), "_attn_mask": torch.ones(24, 24)}
    assert tiny_model(trained=False).load_hstu(state) == []


def test_names_of_ours_alone_are_returned() -> None:
    model = tiny_model(trained=False, **EVERYTHING)
    left = model.load_hstu(checkpoint())
    assert left == sorted(set(dict(model.named_parameters())) - names_of(2))
    assert all(
        name.startswith(("_tape.", "_target_domain_emb.")) or "._ddsr." in name for name in left
    )
    assert len(left) == 4 + 1 + 2 * 6


def test_an_extended_model_continues_a_checkpoint_unchanged() -> None:
    """What is ours starts at zero (the mask and the target view are no additions: left off)."""
    extended = tiny_model(trained=False, tape=True, ddsr=True, target_domain_embedding=True)
    extended.load_hstu(checkpoint())
    assert torch.equal(encode(extended, HISTORIES), encode(tiny_model(), HISTORIES))


def refuse(state: dict[str, Tensor], message: str, model: CrossDomainHSTU | None = None) -> None:
    """Loading fails with this message and leaves the model as it was."""
    model = model or tiny_model(trained=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(message)):
        model.load_hstu(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_missing_parameters_are_named() -> None:
    state = checkpoint()
    del state["_hstu._attention_layers.1._uvqk"]
    refuse(
        state,
        "unknown [], missing ['_hstu._attention_layers.1._uvqk']; give the model the "
        "checkpoint's num_blocks and bias settings",
    )


def test_unknown_parameters_are_named() -> None:
    refuse({**checkpoint(), "_head.weight": torch.ones(1)}, "unknown ['_head.weight'], missing []")


def test_a_model_without_bias_does_not_take_the_tables() -> None:
    without = tiny_model(trained=False, enable_relative_attention_bias=False)
    refuse(checkpoint(), "unknown ['_hstu._attention_layers.0._rel_attn_bias._pos_w'", without)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("_embedding_module._item_emb.weight", (99, 16)),
        ("_input_features_preproc._pos_emb.weight", (30, 16)),
        ("_hstu._attention_layers.0._uvqk", (16, 70)),
    ],
)
def test_wrong_sizes_are_named(name: str, shape: tuple[int, int]) -> None:
    state = {**checkpoint(), name: torch.ones(shape)}
    own = tuple(checkpoint()[name].shape)
    refuse(state, f"{name} has shape {shape} in the checkpoint and {own} here; give the model")


def test_a_checkpoint_of_another_catalogue_is_refused() -> None:
    settings = tiny_model().settings
    names = tiny_model().catalog.domain_names
    other = CrossDomainHSTU(DomainCatalog(torch.zeros(9, dtype=torch.int64), names), settings)
    refuse(checkpoint(), "_embedding_module._item_emb.weight has shape (25, 16)", other)
