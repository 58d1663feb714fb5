"""The public attention function: checks its arguments, chooses an implementation, runs it."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops import triton_support
from hstu_xd.ops.domain_attention import native
from hstu_xd.ops.domain_attention.eager import eager_domain_attention
from hstu_xd.ops.domain_attention.flex import flex_domain_attention
from hstu_xd.ops.domain_attention.fused import fused_domain_attention
from hstu_xd.ops.domain_attention.native import native_domain_attention
from hstu_xd.ops.domain_attention.reference import reference_domain_attention
from hstu_xd.ops.first_use import KernelUse, SmallBatch, holds, outputs
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias

# Normalization -> name -> function.
_IMPLS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "silu": {
        "reference": reference_domain_attention,
        "eager": eager_domain_attention,
        "native": native_domain_attention,
        "triton": fused_domain_attention,
    },
    "softmax": {
        "reference": partial(reference_domain_attention, normalization="softmax"),
        "eager": partial(eager_domain_attention, normalization="softmax"),
        "flex": flex_domain_attention,
    },
}


# Those that compute no more queries than a grouping asks for.
_TAKES_ASKED = ("eager", "native")

# Those whose first use is compared.
_FAST = {"native": native_domain_attention, "triton": fused_domain_attention}


def available_impls(normalization: str = "silu") -> tuple[str, ...]:
    """Return the names that ``domain_attention(..., impl=...)`` accepts here, slowest first.

    "native" is among them where a C compiler is; "triton" where triton is installed and there is a
    CUDA device, or where Triton's interpreter stands in for one.

    Args:
        normalization: "silu" or "softmax": the loops in C and the fused kernels know the first
            only, FlexAttention ("flex") the second only.

    Raises:
        InputError: an unknown normalization.
    """
    if normalization not in _IMPLS:
        raise InputError(f"normalization is {normalization!r}; one of {', '.join(_IMPLS)}")
    return tuple(filter(_is_here, _IMPLS[normalization]))


def _is_here(impl: str) -> bool:
    if impl == "native":
        return native.LIBRARY.problem() is None
    return impl != "triton" or triton_support.installed()


def check_impl(impl: str, normalization: str) -> None:
    """Refuse an implementation that cannot run here.

    Raises:
        InputError: neither "auto" nor one of :func:`available_impls`.
    """
    computing = _IMPLS.get(normalization, {})
    # Only the one that is named is looked for: a graph that is compiled cannot ask for a compiler.
    if computing and (impl == "auto" or (impl in computing and _is_here(impl))):
        return
    known = available_impls(normalization)
    if impl not in known:
        raise InputError(
            f"impl {impl!r} is not available here; use auto, {', '.join(known)} "
            f"for normalization {normalization!r}"
        )


def domain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    *,
    norm_length: int,
    bias: RelativeBias | None = None,
    normalization: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """Compute causal attention inside each (user, domain) run of a jagged batch.

    ``out_i = sum_j SiLU(<q_i, k_j> + bias_ij) v_j / norm_length`` over the keys ``j`` of query
    ``i``'s group with ``p_j <= p_i``, or
    ``out_i = sum_j softmax_j(<q_i, k_j> / sqrt(dqk) + bias_ij) v_j`` over the same keys. With
    ``grouping.target_view(...)`` queries are grouped by their target domain and keys by their own;
    with ``grouping.asking(tokens)`` some tokens alone are queries, and what they read is keys.
    Where an implementation cannot leave the others out ("reference", "flex", "triton"), it computes
    them, and they are dropped.

    Args:
        q: (L, H, dqk) float, queries of the batch's tokens in batch order, or (Q, H, dqk) of the Q
            tokens that the grouping asks for, in their order.
        k: (L, H, dqk) float, keys, or those of the tokens of ``grouping.keys`` in their order.
        v: (L, H, dv) float, values likewise.
        grouping: the plan of the batch, built once and shared by all layers.
        norm_length: the constant ``N`` that upstream divides by: the padded length, never a
            group's own. Softmax does not read it.
        bias: relative position and time bias, or None.
        normalization: "silu" or "softmax".
        impl: "auto" (the fused kernels on CUDA, where they take the dtype and the width, compute
            the normalization and hold on their first use; the loops in C on a CPU, where they
            compute it and can be compiled; else eager) or a name of :func:`available_impls`.

    Returns:
        (L, H, dv) or (Q, H, dv) float, in the order of the queries; zeros where a query's group
        holds no key.

    Raises:
        InputError: shapes or dtypes that do not fit together, an unknown ``normalization``, an
            ``impl`` that is unknown or does not compute it, ``norm_length`` below 1.
        HstuXdError: "triton" or "native" where it fails or disagrees, see ``ops.first_use``.

    Example:
        >>> import torch
        >>> domains, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 3])
        >>> grouping = DomainGrouping.from_jagged(domains, offsets, 2)
        >>> x = torch.ones(3, 1, 4)
        >>> domain_attention(x, x, x, grouping, norm_length=3).shape
        torch.Size([3, 1, 4])

    Source: arXiv 2508.20945 (intra-domain attention, with softmax), arXiv 2402.17152 (SiLU
    attention).
    """
    _check(q, k, v, grouping, norm_length, bias)
    check_impl(impl, normalization)
    insists = impl != "auto"
    if impl == "auto":
        impl = "eager"
        if normalization == "silu" and grouping.rule is None:
            impl = _fastest(q, v, grouping, bias)
    if impl == "native":
        native.check(q, grouping, bias)
    if impl in _FAST:
        use = KernelUse.build("domain_attention", q, v, biased=bias is not None, impl=impl)
        impl = impl if holds(use, _trial, insists=insists) else "eager"
    compute = partial(_IMPLS[normalization][impl], norm_length=norm_length, bias=bias)
    if grouping.asked is None or impl in _TAKES_ASKED:
        return compute(q, k, v, grouping)
    tokens, whole = grouping.asked
    given = zip((grouping, grouping.keys, grouping.keys), (q, k, v))
    return compute(*(_spread(*each, whole.num_tokens) for each in given), whole)[tokens]


def _spread(grouping: DomainGrouping, x: Tensor, number: int) -> Tensor:
    """Put rows of some tokens into those of all, zeros elsewhere: (n, H, d) -> (L, H, d)."""
    if grouping.asked is None:
        return x
    return x.new_zeros(number, *x.shape[1:]).index_copy(0, grouping.asked.tokens, x)


def _fastest(q: Tensor, v: Tensor, grouping: DomainGrouping, bias: RelativeBias | None) -> str:
    if _kernels_suit(q, v):
        return "triton"
    return "native" if native.suits(q, grouping, bias) else "eager"


def _kernels_suit(q: Tensor, v: Tensor) -> bool:
    return q.is_cuda and triton_support.suits(q, v)


def _trial(use: KernelUse, exact: bool) -> dict[str, Tensor]:
    """Attend on a small batch, in the target view: queries and keys have orders of their own."""
    batch = SmallBatch.draw(use.device)
    grouping = batch.grouping.target_view(batch.targets)
    length, norm_length = grouping.num_tokens, grouping.num_tokens
    names, widths = ("q", "k", "v"), (use.dqk, use.dqk, use.dv)
    # Slices of one tensor, as the layers of a model give them.
    numbers = batch.normal(use, length, use.heads, sum(widths)).split(widths, dim=2)
    leaves = dict(zip(names, numbers))
    if use.biased:
        leaves["position_weights"] = batch.normal(use, 2 * norm_length - 1)
        leaves["time_weights"] = batch.normal(use, NUM_TIME_BUCKETS + 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> Tensor:
        bias = None
        if tables:
            times = batch.timestamps, batch.next_timestamps
            bias = RelativeBias(
                tables["position_weights"], tables["time_weights"], grouping.positions, *times
            )
        run = eager_domain_attention if exact else _FAST[use.impl]
        return run(q, k, v, grouping, norm_length=norm_length, bias=bias)

    return outputs(attend, leaves, batch.normal(use, *leaves["v"].shape), exact=exact)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grouping: DomainGrouping,
    norm_length: int,
    bias: RelativeBias | None,
) -> None:
    length = grouping.keys.num_tokens
    tokens = length if grouping.asked is None else grouping.asked.whole.num_tokens
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        size = grouping.num_tokens if name == "q" else length
        if tensor.ndim != 3 or tensor.shape[0] != size:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}; (L, heads, width) with L={size} tokens "
                "of the grouping is needed"
            )
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise InputError(
                f"{name} is {tensor.dtype}; q, k and v need one float dtype ({q.dtype})"
            )
    needed = (length, *q.shape[1:])
    if k.shape != needed:
        raise InputError(f"k has shape {tuple(k.shape)}; the shape of q, {needed}, is needed")
    if v.shape[1] != q.shape[1]:
        raise InputError(f"v has {v.shape[1]} heads; the {q.shape[1]} of q and k are needed")
    if norm_length < 1:
        raise InputError(f"norm_length is {norm_length}; the padded length N >= 1 is needed")
    if bias is not None and bias.positions.numel() != tokens:
        raise InputError(f"bias covers {bias.positions.numel()} tokens; the batch has {tokens}")
