"""Passes of a stack of layers: this package's encoder and upstream's dense research code.

Upstream's layers call two jagged operators of fbgemm, which is large and tied to one release of
PyTorch. They spend next to nothing in them, so that they can be measured with the same operators in
plain PyTorch where fbgemm is not installed; every row says whose operators were used.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from hstu_xd.bench.cases import Draw
from hstu_xd.bench.timing import Builder, Computation, Pass, phased
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.views import Events


def own(impl: str) -> Builder:
    """Return a builder of passes through this package's encoder, its attention by ``impl``."""

    def build(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
        encoder = _stack(draw, dtype, computes, impl)

        def plan() -> Events:
            return Events(
                domains=draw.domains,
                target_domains=draw.domains,
                timestamps=draw.timestamps,
                next_timestamps=draw.next_timestamps,
                offsets=draw.offsets,
            )

        x, grad_out = _input_and_gradient(draw, dtype)
        return phased(
            draw.case, plan, lambda ready: encoder(x, ready), _leaves(encoder, x), grad_out
        )

    return build


def upstream(draw: Draw, dtype: torch.dtype, computes: Computation) -> Pass:
    """Build the pass of the dense layers of generative-recommenders, with the same parameters."""
    stack, forward = upstream_stack(draw, dtype, computes)
    case, (x, grad_out) = draw.case, _input_and_gradient(draw, dtype)

    def plan() -> Tensor:
        return torch.ones(case.seq_len, case.seq_len, dtype=dtype, device=case.device).tril()

    return phased(case, plan, lambda causal: forward(x, causal), _leaves(stack, x), grad_out)


def upstream_stack(
    draw: Draw, dtype: torch.dtype, computes: Computation
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return upstream's layers, and their forward of inputs (L, K) and a causal mask (N, N)."""
    provide_jagged_operators()
    hstu = import_module("generative_recommenders.research.modeling.sequential.hstu")
    case = draw.case
    layers = [
        hstu.SequentialTransductionUnitJagged(
            embedding_dim=case.width,
            linear_hidden_dim=case.dv,
            attention_dim=case.dqk,
            dropout_ratio=0.0,
            attn_dropout_ratio=0.0,
            num_heads=case.heads,
            linear_activation="silu",
            relative_attention_bias_module=hstu.RelativeBucketedTimeAndPositionBasedBias(
                max_seq_len=case.seq_len,
                num_buckets=128,
                bucketization_fn=lambda x: (torch.log(x.abs().clamp(min=1)) / 0.301).long(),
            ),
        )
        for _ in range(case.layers)
    ]
    stack = hstu.HSTUJagged(modules=layers, autocast_dtype=None).to(case.device, dtype)
    stack.load_state_dict(_stack(draw, dtype, computes, "reference").state_dict())
    times = draw.timestamps.view(case.batch_size, case.seq_len)

    def forward(x: Tensor, causal: Tensor) -> Tensor:
        out, _ = stack.jagged_forward(
            x=x, x_offsets=draw.offsets, all_timestamps=times, invalid_attn_mask=causal
        )
        return out

    return stack, forward


def _stack(draw: Draw, dtype: torch.dtype, computes: Computation, impl: str) -> CrossDomainEncoder:
    """Build an encoder of always the same parameters, which the case's own dtype holds exactly."""
    case = draw.case
    settings = case.encoder_settings(
        domain_mask=computes.masked and case.num_domains > 1,
        normalization=computes.normalization,
        enable_relative_attention_bias=computes.biased,
        impl=impl,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CrossDomainEncoder(settings).to(case.device, case.torch_dtype).to(dtype)


def _input_and_gradient(draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = draw.num_tokens, draw.case.width
    x = draw.normal(*shape, dtype=dtype, seed=1).requires_grad_()
    return x, draw.normal(*shape, dtype=dtype, seed=2)


def _leaves(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **dict(module.named_parameters())}


# Operators live as long as the library that registered them.
_libraries: list[torch.library.Library] = []


def source_of_jagged_operators() -> str:
    """Return whose operators :func:`provide_jagged_operators` provides here."""
    return "fbgemm" if find_spec("fbgemm_gpu") else "plain PyTorch"


@cache
def provide_jagged_operators() -> None:
    """Make ``torch.ops.fbgemm`` know the two operators."""
    if source_of_jagged_operators() == "fbgemm":
        import_module("fbgemm_gpu")
    else:
        register_jagged_operators("fbgemm")


def register_jagged_operators(namespace: str) -> None:
    """Register the operators in plain PyTorch under fbgemm's names and signatures."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    library.define(
        "jagged_to_padded_dense(Tensor values, Tensor[] offsets, SymInt[] max_lengths, "
        "float padding_value=0) -> Tensor"
    )
    library.define(
        "dense_to_jagged(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) "
        "-> (Tensor, Tensor[])"
    )
    for function in (jagged_to_padded_dense, dense_to_jagged):
        library.impl(function.__name__, function, "CompositeImplicitAutograd")


def jagged_to_padded_dense(
    values: Tensor, offsets: Sequence[Tensor], max_lengths: Sequence[int], padding_value: float = 0
) -> Tensor:
    """Pad or cut each sequence to ``max_lengths[0]``: (L, K) -> (B, N, K)."""
    (starts,), (columns,) = offsets, max_lengths
    column = torch.arange(columns, device=values.device)
    inside = column < starts.diff().unsqueeze(1)
    row = (starts[:-1].unsqueeze(1) + column).masked_fill(~inside, 0)
    return values[row].masked_fill(~inside.unsqueeze(2), padding_value)


def dense_to_jagged(
    dense: Tensor, x_offsets: Sequence[Tensor], total_L: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Take the leading rows of each sequence, and return the offsets too: (B, N, K) -> (L, K)."""
    (starts,) = x_offsets
    inside = torch.arange(dense.shape[1], device=dense.device) < starts.diff().unsqueeze(1)
    return dense[inside], list(x_offsets)
