"""Every switch off is HSTU: outputs, gradients and ten steps of training, in float64."""

import pytest
import torch
from plain_hstu import PlainHSTU
from tiny_models import (
    NORM_LENGTH,
    SWITCHES,
    draw_histories,
    hidden_states,
    tiny_model,
    to_batch,
)
from torch import Tensor

LENGTHS = [20, 1, 7, NORM_LENGTH, 2]
HISTORIES = draw_histories(LENGTHS)
BATCH = to_batch(HISTORIES)
PRESENT = torch.arange(NORM_LENGTH) < torch.tensor(LENGTHS)[:, None]

every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])


def padded(values: Tensor) -> Tensor:
    out = values.new_zeros(PRESENT.shape)
    out[PRESENT] = values
    return out


def plain_hidden(model: PlainHSTU) -> Tensor:
    """(L, K) states of the real tokens."""
    inputs = (padded(x) for x in (BATCH.item_ids, BATCH.timestamps, BATCH.next_timestamps))
    return model(*inputs)[PRESENT]


def pair(impl: str) -> tuple[torch.nn.Module, PlainHSTU]:
    ours = tiny_model(impl=impl).double()
    plain = PlainHSTU(ours.catalog.num_items, 16, NORM_LENGTH, 2, 4, 5, 4).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@every_impl
def test_the_same_outputs(impl: str) -> None:
    ours, plain = pair(impl)
    expected = plain_hidden(plain)
    torch.testing.assert_close(hidden_states(ours, BATCH), expected, rtol=1e-12, atol=1e-12)
    unit = torch.nn.functional.normalize(expected, dim=1)
    torch.testing.assert_close(ours(BATCH).double(), unit, rtol=1e-6, atol=1e-6)


@every_impl
def test_the_same_parameters_after_ten_steps(impl: str) -> None:
    ours, plain = pair(impl)
    direction = torch.randn(len(BATCH.item_ids), 16, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, plain)]
    for _ in range(10):
        for optimizer, hidden in zip(optimizers, (hidden_states(ours, BATCH), plain_hidden(plain))):
            optimizer.zero_grad()
            (hidden * direction).tanh().sum().backward()
            optimizer.step()
    trained = dict(ours.named_parameters())
    assert trained.keys() == dict(plain.named_parameters()).keys()
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(trained[name], expected, rtol=1e-10, atol=1e-10, msg=name)


OTHER_PARAMETERS = {"hstu", "concat_ua", "no_bias"}


@pytest.mark.parametrize("name", [name for name in SWITCHES if name not in OTHER_PARAMETERS])
def test_the_comparison_notices_a_switch(name: str) -> None:
    """Were a switch without effect, or always on, the two tests above would prove little."""
    switched = tiny_model(**SWITCHES[name]).double()
    plain = PlainHSTU(switched.catalog.num_items, 16, NORM_LENGTH, 2, 4, 5, 4).double()
    own = switched.state_dict()
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    difference = (hidden_states(switched, BATCH) - plain_hidden(plain)).abs().max()
    assert difference > 1e-3
