"""Attention over packed texts in plain PyTorch, where flash-attn is not there or cannot run.

HLLM packs the texts of a batch into one row and leaves it to flash-attn to keep them apart. Without
flash-attn its LLMs let every text read all others, later tokens included, and say nothing.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hstu_xd.plugins.rebinding import Rebinding, apply

_logger = logging.getLogger(__name__)

_NAME = "compute_flash_attention"
# Modules of REC that look the name up when they attend.
_MODULES = tuple(
    f"REC.model.HLLM.{name}"
    for name in (
        "modeling_llama",
        "modeling_mistral",
        "modeling_bert",
        "baichuan.modeling_baichuan",
    )
)


def provide_packed_attention() -> None:
    """Rebind flash-attn's work in the LLMs that REC has imported, where flash-attn cannot run."""
    needing = []
    for name in _MODULES:
        current = getattr(sys.modules.get(name), _NAME, packed_attention)
        has_flash = current is not None and torch.cuda.is_available()
        if current is not packed_attention and not has_flash:
            needing.append(Rebinding(name, _NAME, lambda _: packed_attention))
    if needing:
        _logger.warning("flash-attn cannot run here: plain PyTorch does its work, slower")
        apply(needing)


def warn_if_texts_mix(config: Any) -> None:
    """Say so where REC's own configuration gives the item LLM no way to keep texts apart."""
    if config["item_pretrain_dir"] and not config["use_ft_flash_attn"]:
        _logger.warning(
            "use_ft_flash_attn: %r lets the items' texts of a batch read each other; set it to "
            "True, flash-attn need not be installed",
            config["use_ft_flash_attn"],
        )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    cu_input_lens: Tensor | None = None,
    causal: bool = True,
    training: bool = False,
    attention_dropout: float = 0.0,
) -> Tensor:
    """Compute what REC's ``compute_flash_attention`` does, for any device and type.

    Args:
        q, k, v: (B, S, H, d) float.
        attention_mask: (B, S) float, at least 0 where a token is.
        cu_input_lens: (T,) int64, lengths of the texts that fill the one row; B is 1 then.
        causal: a token reads none behind it.
        training: whether dropout applies.
        attention_dropout: its rate.

    Returns:
        (B, S, H, d) float, zeros where no token is.
    """
    rate = attention_dropout if training else 0.0
    if cu_input_lens is None:
        present = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        if attention_mask is not None:
            present = attention_mask >= 0
        return _attend((q, k, v), present, causal=causal, dropout_rate=rate)
    places = torch.arange(int(cu_input_lens.max()), device=q.device)
    present = places < cu_input_lens.unsqueeze(1)
    unpacked = [
        x.new_zeros(*present.shape, *x.shape[2:]).masked_scatter(present[..., None, None], x)
        for x in (q, k, v)
    ]
    out = _attend(unpacked, present, causal=causal, dropout_rate=rate)
    return out[present].unsqueeze(0)


def _attend(qkv: Sequence[Tensor], present: Tensor, *, causal: bool, dropout_rate: float) -> Tensor:
    seen = present.unsqueeze(1).expand(-1, present.shape[1], -1)
    if causal:
        seen = seen.tril()
    # A place without a token reads itself, or its softmax would be over nothing.
    itself = torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
    query, key, value = (x.transpose(1, 2) for x in qkv)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=(seen | itself).unsqueeze(1), dropout_p=dropout_rate
    )
    return out.transpose(1, 2).masked_fill(~present[..., None, None], 0)
