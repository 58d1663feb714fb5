"""The logarithmic time bucket: edges, precision, and the promise the oracle tests rest on."""

import math

import numpy as np
import pytest
import torch
from attention_cases import MAX_TIME_STEPS, TIME_UNIT
from attention_oracle import BUCKET_WIDTH
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.ops.relative_bias import time_bucket


def bucket(difference: int, num_buckets: int = 128) -> int:
    return int(time_bucket(torch.tensor([difference]), num_buckets))


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0, 0), (1, 0), (2, 2), (3, 3), (4, 4), (10, 7), (60, 13), (3600, 27), (86_400, 37)],
)
def test_known_buckets(difference: int, expected: int) -> None:
    assert bucket(difference) == expected
    assert bucket(-difference) == expected


def test_the_last_bucket_takes_the_rest() -> None:
    assert bucket(10**6, num_buckets=5) == 5
    assert bucket(2**62) == 128


@given(st.integers(-(10**12), 10**12))
def test_formula_away_from_the_edges(difference: int) -> None:
    exact = math.log(max(1, abs(difference))) / BUCKET_WIDTH
    if abs(exact - round(exact)) > 1e-4 or abs(difference) <= 1:
        assert bucket(difference) == math.floor(exact)


def test_the_logarithm_is_taken_in_float32_as_upstream_takes_it() -> None:
    """Near an edge a few differences fall on its other side in float64."""
    differences = torch.arange(1, 2_000_000)
    upstream, wide = ((x.log() / 0.301).int() for x in (differences.float(), differences.double()))
    assert 0 < int((upstream != wide).sum()) < 100
    assert torch.equal(time_bucket(differences, 128), upstream)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(time_bucket(differences, 128), upstream)
    finally:
        torch.set_default_dtype(torch.float32)


def test_input_is_left_alone() -> None:
    differences = torch.tensor([-5, 0, 5])
    time_bucket(differences, 128)
    assert differences.tolist() == [-5, 0, 5]


def test_time_unit_of_the_cases_avoids_every_edge() -> None:
    exact = np.log(np.arange(1, MAX_TIME_STEPS) * TIME_UNIT) / BUCKET_WIDTH
    assert np.abs(exact - exact.round()).min() > 1e-5
