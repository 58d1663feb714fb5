"""The plain jagged operators against a loop over sequences, and against fbgemm where it is."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from hstu_xd.bench.encoder_passes import (
    dense_to_jagged,
    jagged_to_padded_dense,
    register_jagged_operators,
)

OFFSETS = torch.tensor([0, 3, 3, 8])
VALUES = torch.arange(16.0).view(8, 2)


@pytest.mark.parametrize("columns", [2, 5, 7])
def test_sequences_are_padded_and_cut(columns: int) -> None:
    found = jagged_to_padded_dense(VALUES, [OFFSETS], [columns], -1.0)
    expected = torch.full((3, columns, 2), -1.0)
    for user, (start, end) in enumerate([(0, 3), (3, 3), (3, 8)]):
        n = min(columns, end - start)
        expected[user, :n] = VALUES[start : start + n]
    assert torch.equal(found, expected)


def test_there_and_back_is_the_identity() -> None:
    padded = jagged_to_padded_dense(VALUES, [OFFSETS], [5], 9.0)
    values, (offsets,) = dense_to_jagged(padded, [OFFSETS], 8)
    assert torch.equal(values, VALUES)
    assert offsets is OFFSETS


def test_registered_operators_are_called_as_upstream_calls_them() -> None:
    register_jagged_operators("hstu_xd_plain_jagged")
    ops = torch.ops.hstu_xd_plain_jagged
    values = VALUES.clone().requires_grad_()
    padded = ops.jagged_to_padded_dense(
        values=values, offsets=[OFFSETS], max_lengths=[5], padding_value=0.0
    )
    back = ops.dense_to_jagged(2 * padded, [OFFSETS])[0]
    (gradient,) = torch.autograd.grad(back.sum(), values)
    assert torch.equal(gradient, torch.full_like(VALUES, 2))


@pytest.mark.skipif(
    not find_spec("fbgemm_gpu"),
    reason="fbgemm_gpu is not importable: NOT covered is that the plain operators equal its own",
)
def test_they_equal_fbgemms() -> None:
    import_module("fbgemm_gpu")
    ops = torch.ops.fbgemm
    for columns in (2, 5, 7):
        padded = jagged_to_padded_dense(VALUES, [OFFSETS], [columns])
        assert torch.equal(padded, ops.jagged_to_padded_dense(VALUES, [OFFSETS], [columns], 0.0))
    dense = torch.randn(3, 5, 2)
    assert torch.equal(
        dense_to_jagged(dense, [OFFSETS])[0], ops.dense_to_jagged(dense, [OFFSETS])[0]
    )
