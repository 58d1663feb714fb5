"""The examples in the docstrings of the core run and print what they show."""

import doctest
from importlib import import_module

import pytest

WITH_EXAMPLES = [
    "catalog",
    "ops.grouping",
    "ops.domain_attention.api",
    "ops.state_attention.api",
    "ops.state_attention.state_reads",
    "model.hstu",
    "evaluation.popularity",
    "evaluation.ranking",
    "interest.positions",
    "serving.session",
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    result = doctest.testmod(import_module(f"hstu_xd.{name}"), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
