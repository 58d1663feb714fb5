"""No test of a benchmark measures the machine or starts a process unless it says so."""

import pytest

from hstu_xd.bench import passes
from hstu_xd.bench.roofline import Ceilings


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "peak_bytes", lambda *_: 4096)
    monkeypatch.setattr(Ceilings, "measure", lambda case: Ceilings(tflops=1.0, gbs=100.0))
