"""``pytest -m gpu``: the kernels as a GPU runs them. HSTU_XD_REHEARSE=1 tries it on a CPU, tiny."""

import os

import pytest
import torch
from triton_marks import needs_triton

from hstu_xd.ops import first_use
from hstu_xd.ops.domain_attention import api
from hstu_xd.ops.domain_attention import fused as fused_attention
from hstu_xd.ops.first_use import KernelUse
from hstu_xd.ops.state_attention import api as state_api

REHEARSAL = os.environ.get("HSTU_XD_REHEARSE") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
WIDTHS = [(8, 8)] if REHEARSAL else [(64, 64), (25, 25), (128, 128), (50, 100)]
REPEATS = 2 if REHEARSAL else 50
TRIALS = {"domain_attention": api._trial, "state_attention": state_api._trial}

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.skipif(
        not (REHEARSAL or torch.cuda.is_available()),
        reason="no GPU (HSTU_XD_REHEARSE=1 interprets): NOT covered: the kernels as compiled",
    ),
]
every_operator = pytest.mark.parametrize("name", TRIALS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSAL:
        monkeypatch.setattr(first_use, "_LENGTHS", (20, 0, 1, 4))


def use(name: str, dtype: torch.dtype, widths: tuple[int, int], *, biased: bool) -> KernelUse:
    return KernelUse(name, DEVICE, dtype, 2, *widths, biased)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_operator
def test_kernels_agree_with_float64(
    name: str, dtype: torch.dtype, biased: bool, widths: tuple[int, int]
) -> None:
    assert first_use._try(use(name, dtype, widths, biased=biased), TRIALS[name]) is None


@every_operator
def test_repeats_are_equal_to_the_bit(name: str) -> None:
    """A race between programs would show."""
    one = use(name, torch.float32 if REHEARSAL else torch.bfloat16, WIDTHS[0], biased=True)
    first = TRIALS[name](one, False)
    for _ in range(REPEATS):
        again = TRIALS[name](one, False)
        assert all(torch.equal(first[x], again[x]) for x in first)


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple] = []
    real = fused_attention.domain_attention
    monkeypatch.setattr(
        fused_attention, "domain_attention", lambda *a: (given.append(a), real(*a))[1]
    )
    monkeypatch.setattr(fused_attention, "traced", lambda q: True)
    api._trial(use("domain_attention", torch.float32, WIDTHS[0], biased=True), False)
    torch.library.opcheck(real, given[0])


def test_a_training_goes_down() -> None:
    """Weights of q, k and v learn to give a fixed output; what is not finite ends it."""
    length, heads, width = (25, 1, 8) if REHEARSAL else (4096, 4, 64)
    from hstu_xd.ops import domain_attention
    from hstu_xd.ops.grouping import DomainGrouping

    generator = torch.Generator().manual_seed(0)
    domains = torch.randint(2, (length,), generator=generator).to(DEVICE)
    offsets = torch.tensor([0, length // 2, length], device=DEVICE)
    grouping = DomainGrouping.from_jagged(domains, offsets, 2)
    q, k, v, wanted = torch.randn(4, length, heads, width, generator=generator).to(DEVICE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    losses = []
    for _ in range(4 if REHEARSAL else 60):
        out = domain_attention(*leaves, grouping, norm_length=8, impl="triton")
        loss = (out - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] * (1.0 if REHEARSAL else 0.8)
