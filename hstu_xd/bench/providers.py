"""Those who compete: each turns a drawn case into a forward and backward pass.

"reference" is the dense masked definition, the named rival; "eager" is the regrouped
implementation; "upstream" is the dense layer stack of generative-recommenders, which knows no
domains and so computes full attention whatever their number.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hstu_xd.bench.cases import Draw
from hstu_xd.grouping import DomainGrouping
from hstu_xd.modules.encoder import CrossDomainEncoder
from hstu_xd.modules.plan import EncoderPlan
from hstu_xd.ops import RelativeBias, domain_attention

# One pass from the raw batch (plans included): the output, and all gradients by name.
Pass = Callable[[], dict[str, Tensor]]

PROVIDERS = {
    "encoder": ("eager", "reference", "upstream"),
    "attention": ("eager", "reference"),
}


def missing(provider: str) -> str | None:
    """Why a provider cannot run here; None where it can."""
    if provider != "upstream":
        return None
    absent = [name for name in ("generative_recommenders", "fbgemm_gpu") if not find_spec(name)]
    return f"{' and '.join(absent)} not importable" if absent else None


def knows_domains(provider: str) -> bool:
    """Whether a provider computes attention inside domains; else it attends to everything."""
    return provider != "upstream"


def build(provider: str, draw: Draw, dtype: torch.dtype, *, masked: bool = True) -> Pass:
    """The forward and backward pass of a provider on a drawn case.

    Args:
        provider: a name of :data:`PROVIDERS`.
        draw: the batch.
        dtype: of all numbers.
        masked: attend inside domains only, where there are several.
    """
    if draw.case.what == "attention":
        return _attention(provider, draw, dtype)
    if provider == "upstream":
        return _upstream_encoder(draw, dtype)
    return _encoder(provider, draw, dtype, masked=masked)


def _attention(impl: str, draw: Draw, dtype: torch.dtype) -> Pass:
    case = draw.case
    leaves = {
        name: draw.normal(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, (name, shape) in enumerate(
            {
                "q": (draw.num_tokens, case.heads, case.dqk),
                "k": (draw.num_tokens, case.heads, case.dqk),
                "v": (draw.num_tokens, case.heads, case.dv),
                "position_weights": (2 * case.seq_len - 1,),
                "time_weights": (129,),
            }.items()
        )
    }
    grad_out = draw.normal(draw.num_tokens, case.heads, case.dv, dtype=dtype, seed=9)

    def run() -> dict[str, Tensor]:
        grouping = DomainGrouping.from_jagged(draw.domains, draw.offsets, case.num_domains)
        bias = RelativeBias(
            leaves["position_weights"],
            leaves["time_weights"],
            grouping.positions,
            draw.timestamps,
            draw.next_timestamps,
        )
        out = domain_attention(
            leaves["q"], leaves["k"], leaves["v"], grouping,
            norm_length=case.seq_len, bias=bias, impl=impl,
        )  # fmt: skip
        return _backward(out, leaves, grad_out)

    return run


def _stack(draw: Draw, impl: str, masked: bool) -> CrossDomainEncoder:
    case = draw.case
    settings = case.encoder_settings(domain_mask=masked and case.num_domains > 1, impl=impl)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CrossDomainEncoder(settings).to(case.device)


def _encoder(impl: str, draw: Draw, dtype: torch.dtype, *, masked: bool) -> Pass:
    encoder = _stack(draw, impl, masked).to(dtype)
    x, grad_out = _input_and_gradient(draw, dtype)

    def run() -> dict[str, Tensor]:
        plan = EncoderPlan(
            domains=draw.domains,
            target_domains=draw.domains,
            timestamps=draw.timestamps,
            next_timestamps=draw.next_timestamps,
            offsets=draw.offsets,
            num_domains=draw.case.num_domains,
        )
        return _backward(encoder(x, plan), _leaves(encoder, x), grad_out)

    return run


def _upstream_encoder(draw: Draw, dtype: torch.dtype) -> Pass:
    # fbgemm registers the jagged operators that upstream's layers call by name.
    import_module("fbgemm_gpu")
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
    stack.load_state_dict(_stack(draw, "reference", masked=False).to(dtype).state_dict())
    x, grad_out = _input_and_gradient(draw, dtype)
    times = draw.timestamps.view(case.batch_size, case.seq_len)
    causal = torch.ones(case.seq_len, case.seq_len, dtype=dtype, device=case.device).tril()

    def run() -> dict[str, Tensor]:
        out, _ = stack.jagged_forward(
            x=x, x_offsets=draw.offsets, all_timestamps=times, invalid_attn_mask=causal
        )
        return _backward(out, _leaves(stack, x), grad_out)

    return run


def _input_and_gradient(draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = draw.num_tokens, draw.case.width
    x = draw.normal(*shape, dtype=dtype, seed=1).requires_grad_()
    return x, draw.normal(*shape, dtype=dtype, seed=2)


def _leaves(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **dict(module.named_parameters())}


def _backward(out: Tensor, leaves: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients))}
