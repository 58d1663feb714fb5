"""No test of a benchmark measures the machine or starts a process unless it says so.

Without a GPU the fused kernels run under Triton's interpreter, which has to be told before it
loads.
"""

import os

import pytest
import torch

from hstu_xd.bench import memory
from hstu_xd.bench.ceilings import Ceilings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: 4096)
    monkeypatch.setattr(Ceilings, "of", lambda case: Ceilings(tflops=1.0, gbs=100.0))
