import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.cross_domain_mixin import hstu_sizes, llm_sizes, local_llm_config
from hstu_xd.plugins.rec.launch import _converted
from hstu_xd.plugins.rec.settings import ENCODER_KEYS, RecSettings

SIZES = {
    "MAX_ITEM_LIST_LENGTH": 10,
    "n_layers": 2,
    "n_heads": 4,
    "hstu_embedding_size": 32,
    "hidden_dropout_prob": 0.1,
    "hidden_act": None,
}


def read(**keys: Any) -> RecSettings:
    return RecSettings.read({"model": "HSTU_XD", "item_domain_path": "items.csv", **keys})


def test_nothing_asked_is_their_hstu() -> None:
    assert RecSettings.read({"model": "HSTU_XD"}).is_plain
    assert read().is_plain
    assert read(xd_domain_mask=False, xd_target_view_heads=0).is_plain


@pytest.mark.parametrize(
    "keys",
    [
        {"xd_tape": True},
        {"xd_relative_bias": True},
        {"xd_negatives": "domain"},
        {"xd_impl": "eager"},
        {"xd_normalization": "softmax"},
        {"xd_target_view_heads": 1},
        {"xd_segment_by": "count"},
        {"xd_history_tokens": 4},
        {"xd_segment_lookback": 1},
    ],
)
def test_any_request_is_not(keys: dict[str, Any]) -> None:
    assert not read(**keys).is_plain


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("PersonalizedHSTU_XD", {"xd_target_view_heads": 2, "xd_state_from": "output"}),
        ("PersonalizedHLLM_XD", {"xd_full_attention_layers": [0]}),
    ],
)
def test_personalised_models_have_the_switches_of_those_they_extend(
    model: str, keys: dict[str, Any]
) -> None:
    switches = {"xd_domain_mask": True, "xd_tape": True, "xd_ddsr": True}
    settings = read(model=model, **switches, **keys)
    assert settings.is_ours
    assert settings.is_personalized
    assert settings.is_around_llm == ("HLLM" in model)


def test_negatives_follow_the_switches() -> None:
    assert not read(xd_relative_bias=True).scopes_negatives
    assert read(xd_ddsr=True).scopes_negatives
    assert not read(xd_ddsr=True, xd_negatives="catalogue").scopes_negatives


def test_time_is_read_for_the_bias_and_the_age_of_states_only() -> None:
    assert not read(xd_tape=True).reads_time
    assert read(xd_relative_bias=True).reads_time
    assert read(xd_ddsr=True).reads_time
    assert not read(xd_ddsr=True, xd_state_age_bias=False).reads_time
    assert not read(xd_segment_by="count").reads_time
    assert read(xd_segment_by="session").reads_time


def test_an_llm_gives_the_sizes_of_hllm(tmp_path: Path) -> None:
    llm = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(llm), encoding="utf-8")
    sizes = llm_sizes(local_llm_config(str(tmp_path)) or {}, SIZES)
    settings = read(model="HLLM_XD", xd_ddsr=True).encoder_settings(sizes, 2)
    assert (settings.num_blocks, settings.embedding_dim, settings.dv) == (3, 48, 8)
    assert local_llm_config("hub/name") is None


def test_sizes_are_theirs() -> None:
    settings = read(xd_full_attention_layers=[1], xd_domain_mask=True).encoder_settings(
        hstu_sizes(SIZES), 3
    )
    assert (settings.num_blocks, settings.dqk, settings.norm_length) == (2, 8, 10)
    assert settings.full_attention_layers == (1,)
    assert settings.linear_activation == "silu"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"xd_domain_maks": True}, "unknown key xd_domain_maks; did you mean xd_domain_mask?"),
        ({"tape": True}, "unknown key tape; did you mean xd_tape?"),
        ({"history_tokens": 4}, "unknown key history_tokens; did you mean xd_history_tokens?"),
        ({"relative_bias": True}, "unknown key relative_bias; did you mean xd_relative_bias?"),
        ({"item_domains_path": "x"}, "did you mean item_domain_path?"),
        ({"xd_qqqqqqqq": 1}, "unknown key xd_qqqqqqqq; known: xd_domain_mask"),
        ({"xd_tape": "yes"}, "xd_tape: 'yes' is a str; a bool is needed"),
        ({"xd_target_view_heads": True}, "is a bool; a int is needed"),
        ({"xd_negatives": "all"}, "xd_negatives: 'all'; known: auto, domain, catalogue"),
        ({"xd_candidates": "all"}, "xd_candidates: 'all'; known: domain, catalogue"),
        ({"xd_tape": True, "item_domain_path": None}, "xd_tape needs to know every item's domain"),
        (
            {"model": "HLLM_XD", "xd_domain_mask": True, "item_domain_path": None},
            "xd_domain_mask needs to know every item's domain",
        ),
        (
            {"model": "HLLM_XD", "xd_target_view_heads": 2},
            "xd_target_view_heads: 2; HLLM_XD has no such setting, leave it at 0",
        ),
        ({"model": "HLLM_XD", "xd_relative_bias": True}, "HLLM_XD has no such setting"),
        ({"model": "HLLM_XD", "xd_normalization": "softmax"}, "HLLM_XD has no such setting"),
        (
            {"model": "PersonalizedHLLM_XD", "xd_target_view_heads": 2},
            "xd_target_view_heads: 2; PersonalizedHLLM_XD has no such setting, leave it at 0",
        ),
        (
            {"model": "PersonalizedHSTU_XD", "xd_segment_by": "count"},
            "xd_segment_by: 'count'; PersonalizedHSTU_XD has no such setting, leave it at 'none'",
        ),
        (
            {"model": "PersonalizedHSTU_XD", "xd_relative_bias": True},
            "xd_relative_bias: True; PersonalizedHSTU_XD has no such setting",
        ),
        (
            {"model": "PersonalizedHSTU_XD", "xd_target_view_heads": 2},
            "xd_target_view_heads: 2; PersonalizedHSTU_XD needs xd_domain_mask: True with it",
        ),
    ],
)
def test_faults_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**keys)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"xd_target_view_heads": 9}, "target_view_heads is 9; 0..num_heads=4"),
        ({"xd_history_tokens": 4}, "history_tokens is 4 but segment_by is 'none'"),
        ({"xd_impl": "fast"}, "xd_impl: 'fast'; available here: auto, reference, eager"),
    ],
)
def test_values_out_of_range_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(**keys).encoder_settings(hstu_sizes(SIZES), 3)


def test_inert_keys_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(xd_states_per_domain=2)
        RecSettings.read({"model": "HSTU", "xd_tape": True, "item_domain_path": "x"})
        RecSettings.read({"model": "HLLM", "xd_warm_start": "HLLM-0.pth"})
    assert "xd_states_per_domain: 2 does nothing while xd_ddsr is False" in caplog.text
    assert "xd_tape: no effect on model HSTU" in caplog.text
    assert "xd_warm_start: no effect on model HLLM" in caplog.text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"xd_segment_length": 8}, "xd_segment_length: 8 does nothing while xd_segment_by is none"),
        (
            {"xd_segment_gap": 60, "xd_segment_by": "count"},
            "xd_segment_gap: 60 does nothing while xd_segment_by is count",
        ),
        (
            {"xd_segment_length": 8, "xd_segment_by": "session"},
            "xd_segment_length: 8 does nothing while xd_segment_by is session",
        ),
        (
            {"xd_candidates": "domain", "item_domain_path": None},
            "xd_candidates: 'domain' does nothing without item_domain_path",
        ),
        (
            {"xd_candidates": "domain", "item_domain_path": None, "model": "HSTU"},
            "xd_candidates: 'domain' does nothing without item_domain_path",
        ),
        ({"xd_segment_length": 8, "xd_segment_by": "count"}, ""),
        ({"xd_segment_gap": 60, "xd_segment_by": "time_gap"}, ""),
        ({"xd_candidates": "domain"}, ""),
    ],
)
def test_keys_that_others_make_inert_are_told(
    keys: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(**keys)
    assert said in caplog.text
    assert bool(caplog.messages) == bool(said)


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("none", None), ("3", 3), ("0.5", 0.5), ("a/b", "a/b"), ('["1"]', [1])],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert _converted(text) == value


def test_lists_of_the_command_line_are_of_words() -> None:
    with pytest.raises(InputError, match=r"wants the entries of a list in quotes"):
        _converted("[1, 2]")


@pytest.mark.parametrize("name", ["xd.yaml", "xd_hllm.yaml"])
def test_keys_of_the_yaml_files_are_known(name: str) -> None:
    from hstu_xd.plugins.rec.launch import YAML_FOLDER

    text = (YAML_FOLDER / name).read_text(encoding="utf-8")
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    keys = [line.split(":")[0] for line in lines if line.startswith("xd_") and ":" in line]
    assert "xd_warm_start" in keys
    known = {
        f"xd_{name}"
        for name in (*ENCODER_KEYS, "relative_bias", "negatives", "candidates", "warm_start")
    }
    assert set(keys) <= known
