"""The encoder's input: items, positions, and what is said of the next event's domain.

The next domain is told by TAPE, which embeds a switch of domains, and by a plain embedding of the
target domain. Parameters of HSTU have upstream's names, so that its checkpoints load.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hstu_xd.model.settings import EncoderSettings


class TransitionAwarePositionalEmbedding(nn.Module):
    """Embedding of a domain switch, added to the encoder's input: zero while the domain stays.

    ``r_i = scale * m[d_{i+1}] * (W m[d_i] + b)`` where ``d_{i+1} != d_i``, else 0. It uses the
    *domain* of the next event, which the request names, never its item. ``scale`` starts at zero,
    so that a trained HSTU continues unchanged at step 0.

    Args:
        num_domains: number of domains ``D``.
        embedding_dim: model width ``K``.

    Source: arXiv 2508.20945, transition-aware positional embedding; the scale is this project's.
    """

    def __init__(self, num_domains: int, embedding_dim: int) -> None:
        super().__init__()
        self._domain_emb = nn.Embedding(num_domains, embedding_dim)
        self._transition = nn.Linear(embedding_dim, embedding_dim)
        self._scale = nn.Parameter(torch.zeros(embedding_dim))
        nn.init.normal_(self._domain_emb.weight)
        nn.init.xavier_uniform_(self._transition.weight)
        nn.init.zeros_(self._transition.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return what a switch's embedding is the product of: by domain left and by domain entered.

        Both are (D, K), and the scale is in the first.
        """
        entered = self._domain_emb.weight
        return self._transition(entered) * self._scale, entered

    def forward(self, domains: Tensor, target_domains: Tensor) -> Tensor:
        """Embed the transitions.

        Args:
            domains: (L,) int64, domain of each token.
            target_domains: (L,) int64, domain of the event after it.

        Returns:
            (L, K) float.
        """
        source = self._transition(self._domain_emb.weight)  # (D, K)
        entered = look_up(self._domain_emb.weight, target_domains)
        transition = entered * look_up(source, domains) * self._scale
        return transition * (domains != target_domains).unsqueeze(-1)


def dropout(x: Tensor, *, rate: float, training: bool) -> Tensor:
    """Drop entries and scale the others up, as ``torch.nn.functional.dropout`` does, to the bit.

    That one draws entry by entry on a CPU: a double below the kept share or not. All doubles at
    once, then compared, take half the time.

    Args:
        x: of any shape.
        rate: share of the entries that become zero, in [0, 1).
        training: drop at all.
    """
    if not training or not rate or x.device.type != "cpu":
        return functional.dropout(x, rate, training)
    kept = torch.rand(x.shape, dtype=torch.float64, device=x.device) < 1 - rate
    return x * kept.to(x.dtype).div_(1 - rate)


def look_up(
    table: Tensor, ids: Tensor, *, padding: int | None = None, sparse: bool = False
) -> Tensor:
    """Look up rows: (I, K), (...) int64 -> (..., K), as ``torch.nn.functional.embedding`` does.

    On a CPU the gradient of a plain selection of rows is summed in the same order and in half the
    time. That of an index would be summed in any order where there are several threads.

    Args:
        table: rows.
        ids: numbers of rows; on a CPU nothing that is learnt from may be at the padding.
        padding: a row that gets no gradient.
        sparse: on a CPU, give the table a sparse gradient of the same sums.
    """
    if ids.device.type != "cpu":
        return functional.embedding(ids, table, padding)
    rows = ids.flatten()
    found = _SparseRows.apply(table, rows) if sparse else table.index_select(0, rows)
    return found.view(*ids.shape, table.shape[1])


class _SparseRows(Function):
    """Rows of a table, whose gradient is that of the rows alone."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        """Select (n,) rows of a (I, K) table: (n, K)."""
        ctx.save_for_backward(ids)
        ctx.size = table.shape
        return table.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Sum (n, K) by row, in their order: sparse (I, K), coalesced."""
        (ids,) = ctx.saved_tensors
        rows, places = ids.unique(return_inverse=True)
        sums = grad.new_zeros(len(rows), ctx.size[1]).index_add_(0, places, grad)
        gradient = torch.sparse_coo_tensor(
            rows.unsqueeze(0), sums, ctx.size, is_coalesced=True, check_invariants=False
        )
        return gradient, None


class ItemEmbedding(nn.Module):
    """The table of item vectors: row 0 is padding.

    Args:
        num_items: items ``1..num_items``.
        embedding_dim: model width ``K``.
    """

    def __init__(self, num_items: int, embedding_dim: int) -> None:
        super().__init__()
        self._item_emb = nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)
        nn.init.trunc_normal_(self._item_emb.weight, std=0.02)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look items up: (...) int64 -> (..., K) float."""
        table = self._item_emb
        return look_up(table.weight, item_ids, padding=0, sparse=table.sparse)

    def give_sparse_gradients(self) -> Tensor:
        """Let look-ups on a CPU give the table sparse gradients from now on; return the table."""
        self._item_emb.sparse = True
        return self._item_emb.weight


class PositionalInput(nn.Module):
    """``sqrt(K) e + p``, then dropout: upstream's input features with learned absolute positions.

    Args:
        max_length: the padded length ``N``.
        embedding_dim: model width ``K``.
        dropout_rate: dropout on the sum.
    """

    def __init__(self, max_length: int, embedding_dim: int, dropout_rate: float) -> None:
        super().__init__()
        self._pos_emb = nn.Embedding(max_length, embedding_dim)
        self._dropout_rate = dropout_rate
        nn.init.trunc_normal_(self._pos_emb.weight, std=math.sqrt(1 / embedding_dim))

    def forward(self, items: Tensor, positions: Tensor, extra: Tensor | None) -> Tensor:
        """Add up (..., K) item vectors, (...) int64 positions, (..., K) signals or None."""
        x = items * math.sqrt(items.shape[-1]) + look_up(self._pos_emb.weight, positions)
        if extra is not None:
            x = x + extra
        return dropout(x, rate=self._dropout_rate, training=self.training)


def next_domain_modules(
    settings: EncoderSettings,
) -> tuple[TransitionAwarePositionalEmbedding | None, nn.Embedding | None]:
    """Build TAPE and the target-domain embedding as the settings say; both start at zero."""
    sizes = settings.num_domains, settings.embedding_dim
    tape = TransitionAwarePositionalEmbedding(*sizes) if settings.tape else None
    embedding = None
    if settings.target_domain_embedding:
        embedding = nn.Embedding(*sizes)
        nn.init.zeros_(embedding.weight)
    return tape, embedding


def next_domain_signal(
    tape: nn.Module | None, embedding: nn.Embedding | None, domains: Tensor, target_domains: Tensor
) -> Tensor | None:
    """Add up what both say.

    Args:
        tape: of :func:`next_domain_modules`.
        embedding: likewise.
        domains: (L,) int64, domain of each token.
        target_domains: (L,) int64, domain of the event after it.

    Returns:
        (L, K) float; None without either.
    """
    signal = None if tape is None else tape(domains, target_domains)
    if embedding is None:
        return signal
    embedded = look_up(embedding.weight, target_domains)
    return embedded if signal is None else signal + embedded
