"""Every message names the argument, what came and what is needed."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import every_float64_impl

from hstu_xd.errors import InputError
from hstu_xd.ops import RelativeBias, domain_attention
from hstu_xd.ops.grouping import DomainGrouping

GROUPING = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)


def call(**changes: Any) -> torch.Tensor:
    given = {
        "q": torch.ones(3, 2, 4),
        "k": torch.ones(3, 2, 4),
        "v": torch.ones(3, 2, 5),
        "grouping": GROUPING,
        "norm_length": 8,
        **changes,
    }
    return domain_attention(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(3, 8)}, "q has shape (3, 8); (L, heads, width) with L=3 tokens"),
        ({"v": torch.ones(4, 2, 5)}, "v has shape (4, 2, 5); (L, heads, width) with L=3 tokens"),
        ({"k": torch.ones(3, 2, 3)}, "k has shape (3, 2, 3); the shape of q, (3, 2, 4), is needed"),
        ({"v": torch.ones(3, 1, 5)}, "v has 1 heads; the 2 of q and k are needed"),
        (
            {"k": torch.ones(3, 2, 4).double()},
            "k is torch.float64; q, k and v need one float dtype",
        ),
        ({"q": torch.ones(3, 2, 4).long()}, "q is torch.int64; q, k and v need one float dtype"),
        ({"norm_length": 0}, "norm_length is 0; the padded length N >= 1 is needed"),
        ({"impl": "fast"}, "impl 'fast' is not available here; use auto, reference"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(**changes)


def bias(length: int = 3, **changes: Any) -> RelativeBias:
    time = torch.arange(length)
    given = {
        "position_weights": torch.zeros(15),
        "time_weights": torch.zeros(129),
        "positions": time,
        "timestamps": time,
        "next_timestamps": time + 1,
        **changes,
    }
    return RelativeBias(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"timestamps": torch.zeros(2, dtype=torch.int64)},
            "bias.timestamps is torch.int64 of shape (2,); torch.int64 of shape (3,) is needed",
        ),
        (
            {"next_timestamps": torch.zeros(3)},
            "bias.next_timestamps is torch.float32 of shape (3,); torch.int64 of shape (3,)",
        ),
        (
            {"positions": torch.zeros(3, dtype=torch.int32)},
            "bias.positions is torch.int32 of shape (3,)",
        ),
        (
            {"position_weights": torch.zeros(16)},
            "bias.position_weights has shape (16,); (2 * N - 1,) is needed",
        ),
    ],
)
def test_bias_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        bias(**changes)


def test_a_bias_of_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match="bias covers 4 tokens; the batch has 3"):
        call(bias=bias(4))


@every_float64_impl
def test_a_history_longer_than_the_position_table_is_refused(impl: str) -> None:
    short = replace(bias(), position_weights=torch.zeros(3))
    with pytest.raises((InputError, IndexError, RuntimeError)):
        call(bias=short, impl=impl)
