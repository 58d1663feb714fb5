"""Upstream's STU layer on a CPU: groups of like length padded together, queries in blocks."""

from collections.abc import Sequence

import torch
from generative_recommenders.modules.stu import STULayer
from generative_recommenders.ops.hstu_compute import hstu_compute_output, hstu_compute_uqvk
from torch import Tensor
from torch.nn.functional import silu

from hstu_xd.plugins.dlrm_v3.user_memory import NewGroup

# Upstream's own, in both of its layer norms.
_EPS = 1e-6
# A bucket ends before a group that is this much longer than the bucket's first one.
_GROWTH, _SLACK = 1.25, 8
# Queries that attend together; keys behind the last of them are left out.
_BLOCK = 128


class BucketedSTULayer(STULayer):
    """STULayer whose attention pads a group to the longest of its bucket and not of the batch.

    The PyTorch kernel of upstream pads every group to the length that scores are divided by, and
    computes the keys behind a query, too, before it masks them. Here queries attend in blocks, each
    over the keys up to its end. The results are the same up to rounding; parameters have the same
    names.
    """

    def forward(
        self,
        x: Tensor,
        x_lengths: Tensor,
        x_offsets: Tensor,
        max_seq_len: int,
        num_targets: Tensor,
        max_kv_caching_len: int = 0,
        kv_caching_lengths: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer.

        Args:
            x: (R, K) float, rows of all groups.
            x_lengths: (G,) int64, ascending.
            x_offsets: (G + 1,) int64.
            max_seq_len: what scores are divided by, at least the longest group.
            num_targets: (G,) int64, the last rows of each group.
            max_kv_caching_len, kv_caching_lengths: of upstream's cache, which is not kept here.
        """
        u, q, k, v = self._project(x)
        attended = _attend(
            (q, k, v), x_lengths, x_offsets, num_targets, alpha=self._attn_alpha, norm=max_seq_len
        )
        return self._complete(attended, u, x)

    def extend(self, x: Tensor, groups: Sequence[NewGroup], norm: int) -> Tensor:
        """Compute the newest rows of some groups, on top of what their earlier rows have left.

        Args:
            x: (R, K) float, new rows, group by group.
            groups: whose rows they are; they keep the keys and values of the new events.
            norm: what scores are divided by.

        Returns:
            (R, K) float, as the whole layer would.
        """
        u, q, k, v = self._project(x)
        sizes = [group.num_rows for group in groups]
        attended = [
            _attend_new(group, *rows, alpha=self._attn_alpha, norm=norm)
            for group, *rows in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes))
        ]
        return self._complete(torch.cat(attended), u, x)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make gates (R, H * dv), queries, keys (R, H, dqk) and values (R, H, dv) of rows."""
        return hstu_compute_uqvk(
            x=x,
            norm_weight=self._input_norm_weight.to(x.dtype),
            norm_bias=self._input_norm_bias.to(x.dtype),
            norm_eps=_EPS,
            num_heads=self._num_heads,
            attn_dim=self._attention_dim,
            hidden_dim=self._hidden_dim,
            uvqk_weight=self._uvqk_weight.to(x.dtype),
            uvqk_bias=self._uvqk_beta.to(x.dtype),
            kernel=self.hammer_kernel(),
        )

    def _complete(self, attended: Tensor, u: Tensor, x: Tensor) -> Tensor:
        """Gate what was attended, project it and add it to the layer's input: (R, K)."""
        return hstu_compute_output(
            attn=attended.flatten(1),
            u=u,
            x=x,
            norm_weight=self._output_norm_weight.to(x.dtype),
            norm_bias=self._output_norm_bias.to(x.dtype),
            norm_eps=_EPS,
            dropout_ratio=self._output_dropout_ratio,
            output_weight=self._output_weight.to(x.dtype),
            group_norm=self._use_group_norm,
            num_heads=self._num_heads,
            linear_dim=self._hidden_dim,
            concat_u=True,
            concat_x=True,
            mul_u_activation_type="none",
            training=self.training,
            kernel=self.hammer_kernel(),
            recompute_y_in_backward=self._recompute_y,
        )


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    offsets: Tensor,
    num_targets: Tensor,
    *,
    alpha: float,
    norm: int,
) -> Tensor:
    """Attend inside groups, bucket by bucket: (R, H, dv)."""
    parts = []
    for first, end in buckets(lengths.tolist()):
        rows = slice(int(offsets[first]), int(offsets[end]))
        places = offsets[first : end + 1] - offsets[first]
        q, k, v = (_padded(each[rows], places, int(lengths[end - 1])) for each in qkv)
        events = (lengths - num_targets)[first:end]
        attended = _attend_padded(q, k, v, events, alpha=alpha, norm=norm)
        parts.append(_unpadded(attended, places))
    return torch.cat(parts) if parts else qkv[2]


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, events: Tensor, *, alpha: float, norm: int
) -> Tensor:
    """Attend in blocks of queries, each over the keys up to its end: (G, H, n, dv).

    Args:
        q, k: (G, H, n, dqk).
        v: (G, H, n, dv).
        events: (G,) int64, rows of each group that stand before its targets; these see them and
            themselves.
        alpha: factor of the scores.
        norm: what weights are divided by.
    """
    at = torch.arange(q.shape[2])
    blocks = []
    for begin in range(0, q.shape[2], _BLOCK):
        end = min(begin + _BLOCK, q.shape[2])
        queries = at[begin:end].unsqueeze(1)
        seen = torch.minimum(queries, events.view(-1, 1, 1)) > at[:end]
        seen |= queries == at[:end]
        scores = q[:, :, begin:end] @ (k[:, :, :end] * alpha).transpose(2, 3)
        weights = silu(scores) * (seen / norm).unsqueeze(1)
        blocks.append(weights @ v[:, :, :end])
    return torch.cat(blocks, dim=2)


def _attend_new(
    group: NewGroup, q: Tensor, k: Tensor, v: Tensor, *, alpha: float, norm: int
) -> Tensor:
    """Attend from the newest rows of a group, and let it keep the keys and values of its events.

    Args:
        group: with ``num_events`` new events, then targets.
        q, k: (r, H, dqk).
        v: (r, H, dv).
        alpha: factor of the scores.
        norm: what weights are divided by.

    Returns:
        (r, H, dv).
    """
    n = group.num_events
    keys, values = (x.transpose(0, 1) for x in group.keep(k[:n], v[:n]))
    queries, kept = (q * alpha).transpose(0, 1), keys.shape[1] - n
    blocks = []
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        seen = kept + torch.arange(begin, end).unsqueeze(1) >= torch.arange(kept + end)
        scores = queries[:, begin:end] @ keys[:, : kept + end].transpose(1, 2)
        blocks.append((silu(scores) * (seen / norm)) @ values[:, : kept + end])
    # A target sees all events, and itself.
    seen_by_targets = silu(queries[:, n:] @ keys.transpose(1, 2)) / norm @ values
    own = silu((q[n:] * k[n:]).sum(2, keepdim=True) * alpha) / norm * v[n:]
    blocks.append(seen_by_targets + own.transpose(0, 1))
    return torch.cat(blocks, dim=1).transpose(0, 1)


def _padded(x: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Lay the rows of groups out alike: (R, H, d) -> (G, H, length, d)."""
    padded = torch.ops.fbgemm.jagged_to_padded_dense(x.flatten(1), [offsets], [length], 0.0)
    return padded.unflatten(2, x.shape[1:]).transpose(1, 2)


def _unpadded(x: Tensor, offsets: Tensor) -> Tensor:
    """Undo :func:`_padded`: (G, H, length, d) -> (R, H, d)."""
    dense = x.transpose(1, 2)
    jagged = torch.ops.fbgemm.dense_to_jagged(dense.flatten(2), [offsets], int(offsets[-1]))[0]
    return jagged.unflatten(1, dense.shape[2:])


def buckets(lengths: list[int]) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs ``[first, end)`` that do not grow too much.

    Example:
        >>> buckets([3, 9, 11, 40, 41])
        [(0, 3), (3, 5)]
    """
    found, first = [], 0
    for at, length in enumerate(lengths):
        if length > lengths[first] * _GROWTH + _SLACK:
            found.append((first, at))
            first = at
    return [*found, (first, len(lengths))] if lengths else []
