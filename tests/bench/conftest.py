"""No test of a benchmark measures the machine or starts a process unless it says so."""

import pytest

from hstu_xd.bench import passes, request_steps, store_steps, train_step
from hstu_xd.bench.roofline import Ceilings


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (passes, request_steps, store_steps, train_step):
        monkeypatch.setattr(module, "peak_bytes", lambda *_: 4096)
    monkeypatch.setattr(Ceilings, "measure", lambda case: Ceilings(tflops=1.0, gbs=100.0))
