"""Softmax domain attention by PyTorch's FlexAttention: a block mask over the mixed sequence.

Blocks of 128 x 128 pairs are skipped where no query sees a key. Where domains interleave, nearly
every block of a user's history holds such a pair. Compiled on CUDA; on a CPU PyTorch has the
forward pass only and lays out all scores.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

from hstu_xd.errors import InputError
from hstu_xd.ops.grouping import DomainGrouping, pair_rule
from hstu_xd.ops.relative_bias import RelativeBias

# Of every grouping in use, its block mask: all layers of a model share it.
_block_masks = WeakIdKeyDictionary()


def flex_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Compute :func:`hstu_xd.ops.domain_attention` with softmax: (L, H, dv).

    Raises:
        InputError: a bias, or gradients on a CPU: FlexAttention has neither here.

    Source: arXiv 2508.20945, section on intra-domain attention.
    """
    if bias is not None:
        raise InputError(
            "bias is given; impl 'flex' has no relative bias: use impl='eager', or bias=None "
            "(xd_encoder.enable_relative_attention_bias = False)"
        )
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError(
            f"q, k or v on {q.device} needs gradients; impl 'flex' has them on CUDA only: "
            "use impl='eager', or torch.no_grad()"
        )
    if not grouping.num_tokens:
        # No tokens: nothing to launch, but still part of the graph.
        return v.clone()
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _attention(q.is_cuda)(*heads_first, block_mask=block_mask(grouping))
    return out.squeeze(0).transpose(0, 1)


def block_mask(grouping: DomainGrouping) -> BlockMask:
    """Find the blocks of the mixed sequence with a pair of a query and a key that it sees."""
    if grouping not in _block_masks:
        sees, device = pair_rule(grouping), grouping.permutation.device

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(query, key)

        length, create = grouping.num_tokens, _create_block_mask(device.type == "cuda")
        _block_masks[grouping] = create(visible, None, None, length, length, device=str(device))
    return _block_masks[grouping]


@cache
def _create_block_mask(compiled: bool) -> Callable[..., BlockMask]:
    # Uncompiled, the mask of all L x L pairs is laid out first.
    return torch.compile(create_block_mask) if compiled else create_block_mask


@cache
def _attention(compiled: bool) -> Callable[..., Any]:
    if compiled:
        return torch.compile(flex_attention)

    def uncompiled(*tensors: Tensor, block_mask: BlockMask) -> Any:
        # Refused on a CPU are inputs that could have gradients, also where none are recorded.
        q, k, v = (x.detach() for x in tensors)
        with warnings.catch_warnings():
            # That all scores are laid out is known.
            warnings.filterwarnings("ignore", message="flex_attention called without")
            return flex_attention(q, k, v, block_mask=block_mask)

    return uncompiled
