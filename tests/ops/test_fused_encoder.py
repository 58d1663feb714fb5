"""The whole model on the fused kernels: as eager, without a wait, compiled, checkpointed."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tiny_models import NORM_LENGTH, NUM_DOMAINS, draw_histories, tiny_catalog, to_batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_marks import needs_triton, on_a_cpu, on_a_gpu

from hstu_xd.batch import JaggedBatch
from hstu_xd.model.encoder import HSTULayer
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows

pytestmark = needs_triton

EVERYTHING: dict[str, Any] = {
    "domain_mask": True,
    "target_view_heads": 1,
    "tape": True,
    "ddsr": True,
    "target_domain_embedding": True,
}


def small_model(impl: str, **switches: Any) -> CrossDomainHSTU:
    """One layer with no parameter at zero, as few programs as there can be to interpret."""
    torch.manual_seed(1)
    settings = EncoderSettings(
        num_domains=NUM_DOMAINS,
        norm_length=NORM_LENGTH,
        embedding_dim=8,
        num_blocks=1,
        num_heads=2,
        dqk=5,
        dv=4,
        linear_dropout_rate=0.0,
        states_per_domain=2,
        impl=impl,
        **switches,
    )
    model = CrossDomainHSTU(tiny_catalog(), settings, dropout_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch_of(*lengths: int) -> JaggedBatch:
    return to_batch(draw_histories(lengths, seed=len(lengths)))


def gradients(model: CrossDomainHSTU, out: Tensor) -> dict[str, Tensor]:
    weights = torch.arange(out.numel(), device=out.device).cos().view_as(out)
    names, leaves = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), leaves)))


def check_gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
        error = (gradient - truth[name]).norm() / truth[name].norm()
        assert error <= 2e-5, f"{name}: {error:.1e}"


@on_a_cpu
@pytest.mark.parametrize("switches", [EVERYTHING, {"ddsr": True, "state_age_bias": False}], ids=str)
def test_equals_the_eager_encoder(switches: dict[str, Any]) -> None:
    batch = batch_of(5, 0, 6)
    eager, fused = (small_model(impl, **switches) for impl in ("eager", "triton"))
    expected, found = eager(batch), fused(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    check_gradients(gradients(fused, found), gradients(eager, expected))


def test_no_step_asks_for_contents() -> None:
    """Tensors of the meta device have none: asking for a number raises, where a GPU would wait."""
    batch = batch_of(5, 0, 6).to(torch.device("meta"))
    model = small_model("triton", **EVERYTHING).to("meta")
    found = gradients(model, model(batch))
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in model.named_parameters()
    }
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        small_model("eager", **EVERYTHING).to("meta")(batch)


@pytest.mark.slow
@on_a_cpu
def test_a_compiled_model_is_one_graph_and_serves_other_lengths() -> None:
    """Plans are built inside the graph."""
    torch._dynamo.reset()
    model = small_model("triton", **EVERYTHING)
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compilations)
    # A float of the settings would be traced as one that may change, and then traced again.
    with torch._dynamo.config.patch(error_on_recompile=True, specialize_float=True):
        for lengths in ((5, 0, 6), (4, 2), (3, 6, 1, 5)):
            batch = batch_of(*lengths)
            found, expected = compiled(batch), model(batch)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert compilations.frame_count == 1
    check_gradients(gradients(model, found), gradients(model, expected))


@on_a_cpu
def test_a_graph_may_be_given_a_plan() -> None:
    """What it computes of a plan it does not leave there."""

    def parts(rows: EncoderRows) -> Sequence[Tensor]:
        return rows.positions, rows.target[0].permutation, rows.state_reads.table.replaced

    torch._dynamo.reset()
    model = small_model("triton", **EVERYTHING)
    compiled = torch.compile(parts, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 0, 6), (4, 2)):
            rows = model.rows(batch_of(*lengths))
            for _ in range(2):
                found = compiled(rows)
                expected = parts(model.rows(batch_of(*lengths)))
                assert all(map(torch.equal, found, expected))


@on_a_cpu
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_layers_can_be_checkpointed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed again in the backward pass comes out the same, to the last bit."""
    batch, model = batch_of(5, 0, 6), small_model(impl, **EVERYTHING)
    expected = model(batch)
    truth = gradients(model, expected)
    calls: list[int] = []
    forward = HSTULayer.forward

    def counted(layer: HSTULayer, *args: Any, **named: Any) -> Tensor:
        calls.append(1)
        return forward(layer, *args, **named)

    def checkpointed(layer: HSTULayer, *args: Any, **named: Any) -> Any:
        return checkpoint(counted, layer, *args, use_reentrant=False, **named)

    monkeypatch.setattr(HSTULayer, "forward", checkpointed)
    found = model(batch)
    assert torch.equal(found, expected)
    for name, gradient in gradients(model, found).items():
        assert torch.equal(gradient, truth[name]), name
    assert len(calls) == 2


@on_a_gpu
def test_a_training_step_does_not_wait_on_a_gpu() -> None:
    model, batch = small_model("auto", **EVERYTHING).cuda(), batch_of(5, 0, 6)
    batch = batch.to(torch.device("cuda"))
    gradients(model, model(batch))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, model(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_a_cuda_graph_serves_other_histories_of_the_same_size() -> None:
    """As many users and tokens, other lengths, items and domains: forward and backward."""
    device = torch.device("cuda")
    model = small_model("auto", **EVERYTHING).cuda()
    first, second = (batch_of(*lengths).to(device) for lengths in ((5, 0, 6), (2, 8, 1)))
    fixed = copy.deepcopy(first)

    def step() -> dict[str, Tensor]:
        out = model(fixed)
        return {"out": out, **gradients(model, out)}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for batch in (second, first):
        for name, values in vars(batch).items():
            if isinstance(values, Tensor):
                getattr(fixed, name).copy_(values)
        graph.replay()
        expected = model(batch)
        truth = {"out": expected, **gradients(model, expected)}
        for name, found in captured.items():
            torch.testing.assert_close(found, truth[name], rtol=1e-5, atol=1e-6, msg=name)
