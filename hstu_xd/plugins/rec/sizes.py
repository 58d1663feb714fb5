"""Sizes of REC's encoders under this package's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu_xd.errors import InputError


def hstu_sizes(config: Any) -> dict[str, Any]:
    """Of REC's HSTU.

    Args:
        config: REC's configuration, or a mapping like it: None for a key that is not there.

    Raises:
        InputError: a size that is missing or no number.
    """
    width, heads = _size(config, "hstu_embedding_size"), _size(config, "n_heads")
    rate = config["hidden_dropout_prob"]
    if not isinstance(rate, int | float):
        raise InputError(
            f"hidden_dropout_prob: {rate!r}; a number is needed, IDNet/hstu.yaml has one"
        )
    return {
        "norm_length": _size(config, "MAX_ITEM_LIST_LENGTH"),
        "embedding_dim": width,
        "num_blocks": _size(config, "n_layers"),
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
        "linear_dropout_rate": rate,
        "linear_activation": config["hidden_act"] or "silu",
    }


def llm_sizes(llm: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Of HLLM's user LLM.

    Args:
        llm: the LLM's own configuration: its config.json.
        config: REC's configuration, or a mapping like it: None for a key that is not there.

    Raises:
        InputError: MAX_ITEM_LIST_LENGTH is missing or no number.
    """
    width, heads = llm["hidden_size"], llm["num_attention_heads"]
    return {
        "norm_length": _size(config, "MAX_ITEM_LIST_LENGTH"),
        "embedding_dim": width,
        "num_blocks": llm["num_hidden_layers"],
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
    }


def _size(config: Any, name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 1:
        raise InputError(
            f"{name}: {value!r}; a whole number from 1 on is needed; REC's own two files come "
            "first: overall/ID.yaml IDNet/hstu.yaml xd.yaml"
        )
    return value


def local_llm_config(pretrain_dir: str) -> dict[str, Any] | None:
    """The config.json of an LLM in a folder; None for a name that only a hub knows.

    Raises:
        InputError: a folder without it.
    """
    folder = Path(pretrain_dir)
    if not folder.is_dir():
        return None
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json here; give the folder of a pretrained LLM")
    return json.loads(file.read_text(encoding="utf-8"))
