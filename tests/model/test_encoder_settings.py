"""Every message of the settings names the value and the mend."""

import dataclasses
import re
from typing import Any

import pytest

from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0; at least 1 is needed")
            for name in (
                "num_domains",
                "norm_length",
                "embedding_dim",
                "num_blocks",
                "num_heads",
                "dqk",
                "dv",
                "states_per_domain",
            )
        ),
        ({"dqk": -3}, "dqk is -3; at least 1 is needed"),
        (
            {"target_view_heads": 5},
            "target_view_heads is 5; 0..num_heads=4 heads can read the target domain",
        ),
        ({"target_view_heads": -1}, "target_view_heads is -1; 0..num_heads=4"),
        ({"linear_dropout_rate": 1.0}, "linear_dropout_rate is 1.0; 0 <= rate < 1"),
        ({"linear_dropout_rate": -0.1}, "linear_dropout_rate is -0.1; 0 <= rate < 1"),
        ({"linear_activation": "relu"}, "linear_activation is 'relu'; one of silu, none"),
        ({"state_from": "middle"}, "state_from is 'middle'; one of input, output"),
        ({"combine": "gate"}, "combine is 'gate'; one of before_gate, after_gate"),
        ({"normalization": "relu"}, "normalization is 'relu'; one of silu, softmax"),
        (
            {"full_attention_layers": (0, 2)},
            "full_attention_layers names layer 2; the layers are 0 to 1, or -2 to -1 from the end",
        ),
        (
            {"full_attention_layers": (-3,)},
            "full_attention_layers names layer -3; the layers are 0 to 1, or -2 to -1 from the end",
        ),
        (
            {"ddsr": True, "ddsr_layers": (2,)},
            "ddsr_layers names layer 2; the layers are 0 to 1, or -2 to -1 from the end",
        ),
        (
            {"combine": "after_gate", "concat_ua": True},
            "combine='after_gate' needs concat_ua=False: the widths differ",
        ),
        (
            {"state_from": "output", "dv": 8},
            "state_from='output' needs num_heads * dv = embedding_dim, got 4 * 8 and 64",
        ),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        EncoderSettings(**{"num_domains": 2, "norm_length": 8, **changes})


def test_the_defaults_are_plain_hstu() -> None:
    settings = EncoderSettings(num_domains=2, norm_length=8)
    switches = ("domain_mask", "tape", "ddsr", "target_domain_embedding", "target_view_heads")
    assert not any(getattr(settings, name) for name in switches)


def test_a_layer_counted_from_the_end_is_the_layer_itself() -> None:
    names = ("full_attention_layers", "ddsr_layers")
    sizes: dict[str, Any] = {"num_domains": 2, "norm_length": 4, "domain_mask": True, "ddsr": True}
    for last, number in [((-1,), (2,)), ((-3, 1), (0, 1))]:
        one, other = (
            EncoderSettings(**sizes, num_blocks=3, **dict.fromkeys(names, layers))
            for layers in (last, number)
        )
        assert one == other


def test_every_field_is_documented() -> None:
    assert EncoderSettings.__doc__ is not None
    for field in dataclasses.fields(EncoderSettings):
        assert f"{field.name}:" in EncoderSettings.__doc__
