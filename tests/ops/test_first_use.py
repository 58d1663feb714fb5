"""The net under the fused kernels, with kernels that are broken on purpose."""

import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from triton_marks import needs_triton, on_a_cpu

from hstu_xd.errors import HstuXdError
from hstu_xd.ops import domain_attention, first_use, state_attention
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.state_reads import StateReads
from hstu_xd.subprocess_checks import kernels_problem

pytestmark = [needs_triton, on_a_cpu]


@pytest.fixture(autouse=True)
def _unverified(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stands for a GPU that nobody has verified; "auto" takes the kernels on it."""
    monkeypatch.setattr(first_use, "in_doubt", lambda device: True)
    for operator in ("domain_attention", "state_attention"):
        api = import_module(f"hstu_xd.ops.{operator}.api")
        monkeypatch.setattr(api, "_kernels_suit", lambda q, v: True)
    # A few programs of the interpreter are enough.
    monkeypatch.setattr(first_use, "_LENGTHS", (20, 0, 1, 4))
    first_use._tried.cache_clear()
    yield
    first_use._tried.cache_clear()


def attend(impl: str = "auto") -> Tensor:
    grouping = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)
    x = torch.arange(12.0).cos().view(3, 1, 4)
    return domain_attention(x, x, x, grouping, norm_length=3, impl=impl)


def read_states(impl: str = "auto") -> Tensor:
    times = torch.tensor([5, 6, 9])
    grouping = DomainGrouping.from_jagged(torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2)
    reads = StateReads(grouping, times, times, states_per_domain=1)
    x = torch.arange(20.0).cos().view(5, 1, 4)
    bias = torch.zeros(129, 1)
    return state_attention(x[:3], x, x, reads, bias=bias, impl=impl)


OPERATORS = {"domain_attention": attend, "state_attention": read_states}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def launches(name: str) -> ModuleType:
    from hstu_xd.ops.domain_attention import triton_launch
    from hstu_xd.ops.state_attention import triton_launch as state_launch

    return {"domain_attention": triton_launch, "state_attention": state_launch}[name]


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("PassManager::run failed\nand more")


def wrong(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """One row of what a launch gives is zero."""

    def broken(*given: Any, **named: Any) -> Any:
        found = function(*given, **named)
        several = list(found) if isinstance(found, tuple) else [found]
        several[place] = several[place].clone()
        several[place][3] = 0
        return tuple(several) if isinstance(found, tuple) else several[0]

    return broken


# Kind -> what is broken of a module of launches, and what is said.
BREAKAGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "raises": ("forward", lambda _: raising, "RuntimeError: PassManager::run failed"),
    "raises backward": ("gradients", lambda _: raising, "RuntimeError: PassManager::run failed"),
    "forward": ("forward", lambda real: wrong(real, 0), "differs from plain PyTorch in out by"),
    "dq": ("gradients", lambda real: wrong(real, 0), "in gradient of q by"),
    "dk": ("gradients", lambda real: wrong(real, 1), "in gradient of k by"),
    "dv": ("gradients", lambda real: wrong(real, 2), "in gradient of v by"),
}


@pytest.fixture(params=BREAKAGES)
def breakage(request: pytest.FixtureRequest) -> tuple[str, Callable[[Any], Any], str]:
    return BREAKAGES[request.param]


@every_operator
def test_broken_kernels_are_said_once_and_eager_takes_over(
    name: str,
    breakage: tuple[str, Callable[[Any], Any], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    function, broken, said = breakage
    monkeypatch.setattr(launches(name), function, broken(getattr(launches(name), function)))
    call = OPERATORS[name]
    expected = call("eager")
    for _ in range(2):
        assert torch.equal(call(), expected)
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert f"{name} in float32 with 1 heads of 4" in record.message
    assert said in record.message
    assert "Plain PyTorch (impl='eager') takes over" in record.message


@every_operator
def test_who_insists_gets_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches(name), "forward", raising)
    for _ in range(2):
        with pytest.raises(HstuXdError, match="cannot be used on cpu: RuntimeError: PassMan") as e:
            OPERATORS[name]("triton")
        assert "use impl='auto' or impl='eager' (xd_encoder.impl)" in str(e.value)
        assert e.value.exit_code == 1


@every_operator
def test_sound_kernels_are_tried_once_and_nothing_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever mode the caller is in, and without touching the random numbers."""
    calls: list[str] = []
    real = launches(name).gradients
    monkeypatch.setattr(
        launches(name), "gradients", lambda *a, **b: (calls.append(name), real(*a, **b))[1]
    )
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = OPERATORS[name]()
    torch.testing.assert_close(found, OPERATORS[name]("eager"), rtol=1e-5, atol=1e-6)
    OPERATORS[name]("triton")
    assert calls == [name]
    assert not caplog.records
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@every_operator
def test_half_precisions_stay_within_their_budget(
    name: str, biased: bool, dtype: torch.dtype
) -> None:
    from hstu_xd.ops.domain_attention import api
    from hstu_xd.ops.state_attention import api as state_api

    module = {"domain_attention": api, "state_attention": state_api}[name]
    use = first_use.KernelUse(name, torch.device("cpu"), dtype, 1, 6, 4, biased)
    assert first_use._tried(use, module._trial) is None


def test_a_verified_gpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gpu = torch.device("cuda")
    assert not first_use.in_doubt(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X1")
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(first_use, "version", {"torch": "2.13.0+cu130", "triton": "3.9.0"}.get)
    first_use._unverified.cache_clear()
    assert first_use.in_doubt(gpu)
    capturing[0] = True
    assert not first_use.in_doubt(gpu)
    capturing[0] = False
    first_use._unverified.cache_clear()
    monkeypatch.setattr(first_use, "VERIFIED", {("X1", "2.13.0", "3.9.0")})
    assert not first_use.in_doubt(gpu)
    first_use._unverified.cache_clear()


@pytest.mark.parametrize("broken", [False, True], ids=["sound", "broken"])
def test_a_compiled_graph_holds_what_was_found(
    broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels are tried while the graph is made; plain PyTorch, which waits, breaks the graph."""
    caplog.set_level(logging.WARNING)
    torch._dynamo.reset()
    if broken:
        monkeypatch.setattr(launches("domain_attention"), "gradients", raising)
    compiled = torch.compile(attend, fullgraph=not broken, backend="eager")
    torch.testing.assert_close(compiled(), attend("eager"), rtol=1e-5, atol=1e-6)
    assert [x.name for x in caplog.records] == ["hstu_xd.ops.first_use"] * broken


def test_what_doctor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_problem(torch.device("cpu")) == ""
    first_use._tried.cache_clear()
    monkeypatch.setattr(launches("state_attention"), "forward", raising)
    assert kernels_problem(torch.device("cpu")).startswith(
        "the fused kernel of state_attention in float32 with 2 heads of 16 cannot be used on cpu"
    )


def test_tf32_has_a_budget_of_its_own() -> None:
    """An error that ten bits of a factor explain is one in float32 and none in TF32."""
    q = torch.zeros(1, 2, 16)
    use = first_use.KernelUse.build("domain_attention", q, q, biased=False, impl="triton")

    def trial(_: first_use.KernelUse, exact: bool) -> dict[str, Tensor]:
        return {"out": torch.full((3, 4), 1.0 if exact else 1.005)}

    assert not first_use.holds(use, trial, insists=False)
    assert first_use.holds(use._replace(tf32=True), trial, insists=False)
