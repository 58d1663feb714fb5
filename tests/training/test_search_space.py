"""What a search tries, as it is written in gin."""

import pytest

from hstu_xd.errors import InputError
from hstu_xd.training.settings import load_settings


def space(*lines: str) -> list[str]:
    return [f"xd_tune.space = {lines!r}"]


def test_a_line_is_a_range_or_choices() -> None:
    rate, dropout, blocks, width = load_settings(
        [],
        space(
            "xd_train.learning_rate = (1e-4, 1, 'log')",
            "xd_train.dropout_rate, xd_encoder.linear_dropout_rate = (0.1, 0.5)",
            "xd_encoder.num_blocks = [1, 3]",
            "xd_encoder.dqk, xd_encoder.dv = [8, (16, 32)]",
        ),
    ).search_space
    assert (rate.low, rate.high, rate.log) == (1e-4, 1.0, True)
    assert rate.values(0.5) == {"xd_train.learning_rate": 0.5}
    assert not dropout.log
    assert [*dropout.values(0.3).values()] == [0.3, 0.3]
    assert blocks.choices == ((1,), (3,))
    assert width.choices == ((8, 8), (16, 32))
    assert width.values((16, 32)) == {"xd_encoder.dqk": 16, "xd_encoder.dv": 32}


def test_where_settings_lie_in_a_dimension() -> None:
    lines = space("xd_encoder.dqk, xd_encoder.dv = (8, 16)", "xd_encoder.num_blocks = [1, 3]")
    flat = load_settings([], lines).flat | {"xd_encoder.dqk": 16, "xd_encoder.dv": 16}
    equal, blocks = load_settings([], lines).search_space
    assert equal.holding(flat) == 16
    assert blocks.holding(flat) is None
    assert equal.holding(flat | {"xd_encoder.dv": 8}) is None
    assert equal.holding(flat | {"xd_encoder.dqk": 17, "xd_encoder.dv": 17}) is None
    assert blocks.holding(flat | {"xd_encoder.num_blocks": 3}) == (3,)


def test_the_recipe_lies_in_the_space_that_is_searched_by_default() -> None:
    settings = load_settings([])
    assert None not in [each.holding(settings.flat) for each in settings.search_space]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("xd_train.lerning_rate = (1, 2)", "no setting; did you mean xd_train.learning_rate"),
        ("xd_train.temperature", "has no values; give .lowest, highest"),
        ("xd_train.temperature = 0.1", "has no values"),
        ("xd_train.temperature = (0.1, 0.2, 'ln')", "has no values"),
        ("xd_train.temperature = (0.1, x)", "has no values"),
        ("xd_train.temperature = []", "has no values"),
        ("xd_train.temperature = (0.2, 0.1)", "0.2 is not below 0.1; give the lowest"),
        ("xd_train.temperature = (0, 0.1)", "temperature = 0.0; it must be above 0"),
        ("xd_train.weight_decay = (0, 0.1, 'log')", "logarithmic scale starts above 0, got 0.0"),
        ("xd_train.num_epochs = (1.5, 2)", "num_epochs = 1.5 is a float; a int is needed"),
        ("xd_train.negatives = ('domain', 'catalogue')", "a range needs settings that are all"),
        ("xd_train.learning_rate, xd_encoder.dv = (1, 2)", "a range needs settings that are all"),
        ("xd_encoder.dqk, xd_encoder.dv = [(1, 2, 3)]", r"\(1, 2, 3\) has 3 values; 2 settings"),
        ("xd_encoder.num_blocks = [1, 2, 1]", "holds a choice twice"),
        ("xd_encoder.num_domains = [1]", "no setting"),
        ("xd_encoder.dqk, xd_encoder.dqk = [1]", "decides xd_encoder.dqk twice"),
    ],
)
def test_a_bad_line_is_refused(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings([], space(line))


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(InputError, match=r"xd_tune.space is empty; give what is tried"):
        load_settings([], ["xd_tune.space = ()"])
