"""Without a GPU the kernels run under Triton's interpreter, which has to be told before it loads.

The switch stays on for the tests that follow in this process: it makes impl="triton" available,
and "auto" never takes it on a CPU.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
