"""Sizes of REC's encoders under this package's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu_xd.errors import InputError


def hstu_sizes(config: Any) -> dict[str, Any]:
    """Of REC's HSTU.

    Args:
        config: REC's configuration, or a mapping like it.
    """
    width, heads = config["hstu_embedding_size"], config["n_heads"]
    return {
        "norm_length": config["MAX_ITEM_LIST_LENGTH"],
        "embedding_dim": width,
        "num_blocks": config["n_layers"],
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
        "linear_dropout_rate": config["hidden_dropout_prob"],
        "linear_activation": config["hidden_act"] or "silu",
    }


def llm_sizes(llm: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Of HLLM's user LLM.

    Args:
        llm: the LLM's own configuration: its config.json.
        config: REC's configuration, or a mapping like it.
    """
    width, heads = llm["hidden_size"], llm["num_attention_heads"]
    return {
        "norm_length": config["MAX_ITEM_LIST_LENGTH"],
        "embedding_dim": width,
        "num_blocks": llm["num_hidden_layers"],
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
    }


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
