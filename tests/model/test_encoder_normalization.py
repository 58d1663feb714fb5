"""The encoder's ``normalization``: every layer follows it, and a session refuses what it lacks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import Events
from hstu_xd.serving import EncoderSession
from hstu_xd.training.settings import load_settings

LENGTHS = (20, 0, 1, 33)
DOMAINS = 3


def encode(**changes: Any) -> Tensor:
    """Hidden states of a small encoder, always with the same parameters and inputs."""
    switches = {"domain_mask": True, "target_view_heads": 1, **changes}
    settings = EncoderSettings(
        num_domains=DOMAINS, norm_length=40, embedding_dim=8, num_heads=2, dqk=3, dv=4,
        linear_dropout_rate=0.0, **switches,
    )  # fmt: skip
    torch.manual_seed(1)
    encoder = CrossDomainEncoder(settings).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    length = sum(LENGTHS)
    domains, targets = torch.randint(DOMAINS, (2, length))
    times = torch.randint(10_000, (length,)).sort().values
    events = Events(
        domains=domains,
        target_domains=targets,
        timestamps=times,
        next_timestamps=times + 5,
        offsets=torch.tensor((0, *LENGTHS)).cumsum(0),
    )
    x = torch.randn(length, 8, dtype=torch.float64)
    with torch.no_grad():
        return encoder(x, events)


@pytest.mark.parametrize("mask", [False, True])
def test_softmax_is_the_same_in_every_implementation_and_not_silu(mask: bool) -> None:
    found = encode(normalization="softmax", impl="eager", domain_mask=mask)
    truth = encode(normalization="softmax", impl="reference", domain_mask=mask)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
    silu = encode(impl="reference", domain_mask=mask)
    assert (truth - silu).norm() > 0.01 * silu.norm()


def test_gin_binds_it() -> None:
    settings = load_settings([], ['xd_encoder.normalization = "softmax"'])
    assert settings.encoder_settings(num_domains=2).normalization == "softmax"


def test_flex_attention_encodes_without_bias() -> None:
    plain = {"normalization": "softmax", "enable_relative_attention_bias": False}
    found = encode(impl="flex", **plain)
    torch.testing.assert_close(found, encode(impl="reference", **plain), rtol=1e-11, atol=1e-11)
    with pytest.raises(InputError, match="enable_relative_attention_bias = False"):
        encode(impl="flex", normalization="softmax")


def test_a_session_refuses_a_softmax_model() -> None:
    catalog = DomainCatalog(torch.tensor([-1, 0, 1]), ["books", "films"])
    settings = EncoderSettings(num_domains=2, norm_length=8, normalization="softmax")
    with pytest.raises(InputError, match=r"normalization is 'softmax'; a session computes 'silu'"):
        EncoderSession(CrossDomainHSTU(catalog, settings))
