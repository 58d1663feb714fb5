"""Passes of a stack of layers: this package's encoder and upstream's dense research code."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn

from hstu_xd.bench import jagged_operators
from hstu_xd.bench.cases import Draw
from hstu_xd.bench.computation import Builder, Computation, phased
from hstu_xd.bench.timing import Pass
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.views import Events


def own(impl: str) -> Builder:
    """This package's encoder with its attention by ``impl``."""

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
    """The dense layers of generative-recommenders' research code, with the same parameters."""
    stack, forward = upstream_stack(draw, dtype, computes)
    case, (x, grad_out) = draw.case, _input_and_gradient(draw, dtype)

    def plan() -> Tensor:
        return torch.ones(case.seq_len, case.seq_len, dtype=dtype, device=case.device).tril()

    return phased(case, plan, lambda causal: forward(x, causal), _leaves(stack, x), grad_out)


def upstream_stack(
    draw: Draw, dtype: torch.dtype, computes: Computation
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Upstream's layers, and their forward pass of inputs (L, K) and a causal mask (N, N)."""
    jagged_operators.provide()
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
    """Always the same parameters, which the case's own dtype holds exactly."""
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
