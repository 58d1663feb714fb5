"""The public operator of DDSR: checks its arguments, chooses an implementation, runs it."""

from collections.abc import Callable

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.ops import triton_support
from hstu_xd.ops.first_use import KernelUse, SmallBatch, holds, outputs
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.state_attention import native
from hstu_xd.ops.state_attention.eager import eager_state_attention
from hstu_xd.ops.state_attention.fused import fused_state_attention
from hstu_xd.ops.state_attention.native import native_state_attention
from hstu_xd.ops.state_attention.reference import reference_state_attention
from hstu_xd.ops.state_attention.state_reads import StateReads

_IMPLS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_state_attention,
    "eager": eager_state_attention,
    "native": native_state_attention,
    "triton": fused_state_attention,
}

# Those whose first use is compared.
_FAST = {"native": native_state_attention, "triton": fused_state_attention}

_STATES_TRIED = 2


def available_state_impls() -> tuple[str, ...]:
    """Return the names that ``state_attention(..., impl=...)`` accepts here, slowest first.

    "native" is among them where a C compiler is; "triton" where triton is installed and there is a
    CUDA device, or where Triton's interpreter stands in for one.
    """
    return tuple(filter(_is_here, _IMPLS))


def _is_here(impl: str) -> bool:
    if impl == "native":
        return native.LIBRARY.problem() is None
    return impl != "triton" or triton_support.installed()


def state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: StateReads,
    *,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Let every token of a jagged batch attend to the latest states of all domains.

    ``out_i = sum_s softmax_s(<q_i, k_s> + bias[age_is]) v_s`` over the states ``s`` that token
    ``i`` of a user reads: of every domain those that the user's latest ``M`` tokens up to ``i``
    wrote, and the domain's initial state where there is none yet. ``age_is`` is the logarithmic
    bucket of the time from the writing of ``s`` to the event after ``i``.

    Args:
        q: (L, H, dqk) float, queries of the tokens in batch order, or (Q, H, dqk) of those that ask
            (``reads.asked``); the caller has scaled them, usually by ``dqk ** -0.5``.
        k: (L + D, H, dqk) float, keys: of the state that each token writes, or those of
            ``reads.asked.states``, then of the initial state of each domain.
        v: (L + D, H, dv) float, values likewise.
        reads: the plan of the batch, built once and shared by all layers.
        bias: (129, H) float by ``age``, its last row for initial states; None for no bias.
        impl: "auto" (the fused kernels on CUDA, where they take the dtype and the width and hold
            on their first use; the loops in C on a CPU, where they can be compiled; else eager) or
            a name of :func:`available_state_impls`.

    Returns:
        (L, H, dv) or (Q, H, dv) float, in the order of the queries. All implementations but
        "native" answer every token, and drop what nobody asked for.

    Raises:
        InputError: shapes or dtypes that do not fit together, or an unknown ``impl``.
        HstuXdError: "triton" or "native" where it fails or disagrees, see ``ops.first_use``.

    Example:
        >>> import torch
        >>> from hstu_xd.ops.grouping import DomainGrouping
        >>> domains, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 3])
        >>> times = torch.tensor([5, 6, 9])
        >>> grouping = DomainGrouping.from_jagged(domains, offsets, 2)
        >>> reads = StateReads(grouping, times, times, states_per_domain=1)
        >>> q, k, v = torch.zeros(3, 1, 4), torch.zeros(5, 1, 4), torch.arange(5.0).view(5, 1, 1)
        >>> state_attention(q, k, v, reads).flatten()  # means of states 0 4, 0 1 and 2 1
        tensor([2.0000, 0.5000, 1.5000])

    Source: arXiv 2508.20945, dynamic domain state representation; several states a domain and the
        bias by age are this project's.
    """
    _check(q, k, v, reads, bias)
    insists = impl != "auto"
    if impl == "auto":
        impl = _fastest(q, v, reads, bias)
    elif impl not in _IMPLS or not _is_here(impl):
        known = ", ".join(available_state_impls())
        raise InputError(
            f"impl {impl!r} is not available here; use auto, {known} for state_attention"
        )
    if impl == "native":
        native.check(q, bias)
    if impl in _FAST:
        use = KernelUse.build("state_attention", q, v, biased=bias is not None, impl=impl)
        impl = impl if holds(use, _trial, insists=insists) else "eager"
    if reads.asked is None or impl == "native":
        return _IMPLS[impl](q, k, v, reads, bias=bias)
    tokens, states, whole = reads.asked
    length, initial = whole.grouping.num_tokens, whole.num_rows - whole.num_states
    q = q.new_zeros(length, *q.shape[1:]).index_copy(0, tokens, q)
    rows = torch.cat([states, length + torch.arange(initial, device=states.device)])
    k, v = (x.new_zeros(length + initial, *x.shape[1:]).index_copy(0, rows, x) for x in (k, v))
    return _IMPLS[impl](q, k, v, whole, bias=bias)[tokens]


def _fastest(q: Tensor, v: Tensor, reads: StateReads, bias: Tensor | None) -> str:
    if _kernels_suit(q, v):
        return "triton"
    return "native" if native.suits(q, reads, bias) else "eager"


def _kernels_suit(q: Tensor, v: Tensor) -> bool:
    return q.is_cuda and triton_support.suits(q, v)


def _trial(use: KernelUse, exact: bool) -> dict[str, Tensor]:
    """Attend to the states of a small batch."""
    batch = SmallBatch.draw(use.device)
    reads = StateReads(batch.grouping, batch.timestamps, batch.next_timestamps, _STATES_TRIED)
    length, rows = batch.grouping.num_tokens, reads.num_rows
    leaves = {
        "q": batch.normal(use, length, use.heads, use.dqk) * use.dqk**-0.5,
        "k": batch.normal(use, rows, use.heads, use.dqk),
        "v": batch.normal(use, rows, use.heads, use.dv),
    }
    if use.biased:
        leaves["bias"] = batch.normal(use, NUM_TIME_BUCKETS + 1, use.heads)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        run = eager_state_attention if exact else _FAST[use.impl]
        return run(q, k, v, reads, bias=bias)

    return outputs(attend, leaves, batch.normal(use, length, use.heads, use.dv), exact=exact)


def _check(q: Tensor, k: Tensor, v: Tensor, reads: StateReads, bias: Tensor | None) -> None:
    # Text with sizes in it is made only to be shown: a compiled graph would be tied to the numbers.
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        size = reads.num_queries if name == "q" else reads.num_rows
        if tensor.ndim != 3 or tensor.shape[0] != size:
            meaning = "tokens of reads"
            if name != "q":
                meaning = "states: of each token, then an initial one of each domain"
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}; ({size}, heads, width) is needed for "
                f"{size} {meaning}"
            )
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise InputError(
                f"{name} is {tensor.dtype}; q, k and v need one float dtype ({q.dtype})"
            )
    heads, width = q.shape[1:]
    if k.shape[1:] != q.shape[1:]:
        raise InputError(
            f"k has shape {tuple(k.shape)}; the {heads} heads of width {width} of q are needed"
        )
    if v.shape[1] != heads:
        raise InputError(f"v has {v.shape[1]} heads; the {heads} of q and k are needed")
    needed = NUM_TIME_BUCKETS + 1, heads
    if bias is not None and (bias.shape != needed or not bias.is_floating_point()):
        raise InputError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; float of shape {needed} is "
            "needed: a row for each bucket of time, the last one for initial states"
        )
