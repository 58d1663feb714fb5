"""Shared by all tests: one thread, the same draws every time, no deadline for hypothesis."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Without a GPU the fused kernels run under Triton's interpreter, which has to be told before it
# loads, whoever loads it first. It makes impl="triton" available; "auto" never takes it on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
