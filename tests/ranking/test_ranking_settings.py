"""Settings of a ranker that exclude one another, and those that do nothing."""

import pytest

from hstu_xd.errors import InputError
from hstu_xd.ranking.settings import load_ranking_settings


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["xd_short.events = -1"], "xd_short.events = -1; it must be 0 or more"),
        (["xd_short.width = 0"], "xd_short.width = 0; it must be at least 1"),
        (
            ["xd_short.events = 5", "xd_interest.kind = 'towers'"],
            "xd_short.events = 5 with xd_interest.kind = 'towers'.*give xd_short.events = 0",
        ),
        (
            ["xd_short.events = 5", "xd_encoder.normalization = 'softmax'"],
            "xd_encoder.normalization = 'softmax' with xd_short.events = 5.*needs 'silu'",
        ),
        (
            [
                *("xd_short.events = 5", "xd_encoder.layer = 'sasrec'"),
                *("xd_encoder.normalization = 'softmax'",),
                "xd_encoder.enable_relative_attention_bias = False",
            ],
            "xd_encoder.layer = 'sasrec' with xd_short.events = 5: a ranker encodes with HSTU",
        ),
        (["xd_short.events = 5", "xd_encoder.target_view_heads = 9"], "target_view_heads is 9"),
        (
            ["xd_short.events = 5", "xd_encoder.state_from = 'output'", "xd_encoder.ddsr = True"],
            r"needs num_heads \* dv = embedding_dim, got 4 \* 32 and 32",
        ),
        (["xd_encoder.num_domains = 3"], "num_domains"),
        (
            ["xd_interest.domain_states = True"],
            "xd_interest.domain_states = True with xd_short.events = 0.*give xd_short.events, or",
        ),
    ],
)
def test_bad_settings_are_refused(bindings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_ranking_settings([], bindings)


def test_an_encoder_that_nobody_asks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    load_ranking_settings([], ["xd_encoder.tape = True", "xd_short.width = 8"])
    assert "xd_encoder.tape = True does nothing while xd_short.events is 0" in caplog.text
    assert "xd_short.width = 8 does nothing while xd_short.events is 0" in caplog.text
