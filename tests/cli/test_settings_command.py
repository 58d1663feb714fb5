"""``hstu-xd settings``: every setting that a user can bind, with what it is."""

import json

import pytest

from hstu_xd.cli.app import run
from hstu_xd.declaration import settings_of
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.plugins.rec.settings import RecSettings, keys
from hstu_xd.training.settings import TrainSettings


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict]:
    assert run(["settings", *words, "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_binding_and_key_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    encoder = {n for n, each in settings_of(EncoderSettings).items() if not each.from_data}
    assert {f"xd_encoder.{name}" for name in encoder} <= set(rows)
    assert {f"xd_train.{name}" for name in settings_of(TrainSettings)} <= set(rows)
    assert {"xd_upstream.item_domain_path", "xd_upstream.seed", "item_domain_path"} <= set(rows)
    assert set(keys()) <= set(rows)
    assert {"xd_ddsr", "xd_relative_bias", "xd_warm_start"} <= set(keys())
    assert not {"xd_encoder.num_domains", "xd_num_blocks", "xd_model", "xd_encoder"} & set(rows)
    assert all(row["meaning"].endswith(".") for row in rows.values())
    assert {block for row in rows.values() for block in [row["block"]]} == {
        "xd_encoder",
        "xd_train",
        "xd_item",
        "xd_evaluate",
        "xd_tune",
        "xd_search",
        "xd_interest",
        "xd_rank",
        "xd_short",
        "xd_upstream",
        "xd_dlrm",
        "rec",
    }


def test_row_says_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "learning_rate")
    assert rows["xd_train.learning_rate"] == {
        "name": "xd_train.learning_rate",
        "type": "float",
        "default": 0.002,
        "meaning": "peak rate of AdamW.",
        "block": "xd_train",
        "also": ["lr"],
    }
    layers = listed(capsys, "full_attention_layers")["xd_encoder.full_attention_layers"]
    assert (layers["type"], layers["default"]) == ("tuple[int, ...]", [])
    assert listed(capsys, "xd_upstream")["xd_upstream.seed"]["type"] == "int | None"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("lr", "xd_train.learning_rate"),
        ("AdamW", "xd_train.weight_decay"),
        ("view", "xd_encoder.target_view_heads"),
    ],
)
def test_word_is_looked_for_in_names_meanings_and_synonyms(
    word: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed(capsys, word)
    assert name in rows
    assert len(rows) < 8


def test_text_is_what_a_gin_file_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "checkpoint_every"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "xd_train.checkpoint_every = 1000  (int)"
    assert all(line.startswith("    ") for line in lines[1:])


def test_word_of_no_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "xd_train.lr"]) == 2
    assert "see xd_train.learning_rate" in capsys.readouterr().err
    assert run(["settings", "qqqq"]) == 2
    assert "no setting speaks of 'qqqq'" in capsys.readouterr().err


def test_every_setting_of_rec_is_declared() -> None:
    assert set(settings_of(RecSettings)) == {
        "item_domain_path",
        "relative_bias",
        "negatives",
        "candidates",
        "warm_start",
    }
