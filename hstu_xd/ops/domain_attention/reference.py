"""The definition of domain attention: dense, masked, obvious. It costs O(B H n^2) memory."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from hstu_xd.ops.grouping import DomainGrouping, pair_rule
from hstu_xd.ops.relative_bias import RelativeBias


def reference_domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
    normalization: str = "silu",
) -> Tensor:
    """Compute the formula of :func:`hstu_xd.ops.domain_attention` over all pairs of each user."""
    offsets = grouping.batch_offsets
    lengths, n = offsets.diff(), grouping.longest
    if n == 0:
        return v.clone()  # no tokens: (0, H, dv), still part of the graph
    column = torch.arange(n, device=q.device)
    present = column < lengths.unsqueeze(1)  # (B, n)
    token = (offsets[:-1].unsqueeze(1) + column) * present  # (B, n); padding points at token 0
    scores = torch.einsum("bihd,bjhd->bhij", q[token], k[token])
    if normalization == "softmax":
        scores = scores * q.shape[2] ** -0.5
    if bias is not None:
        scores = scores + bias.dense(token, token).to(scores.dtype).unsqueeze(1)
    seen = pair_rule(grouping)(token.unsqueeze(2), token.unsqueeze(1)) & present.unsqueeze(1)
    mask = seen.unsqueeze(1)  # (B, 1, n, n)
    if normalization == "softmax":
        # Finite, so that a query without keys gets zeros and no NaN.
        lowest = torch.finfo(scores.dtype).min
        attention = scores.masked_fill(~mask, lowest).softmax(3) * mask
    else:
        attention = silu(scores) / norm_length * mask
    out = torch.einsum("bhij,bjhd->bihd", attention, v[token])
    owner = grouping.group_of // grouping.num_domains
    return out[owner, grouping.positions]
