"""What the interpreter accepts the compiler may not: every kernel is compiled for an H200's GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_marks import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]

HERE = Path(__file__).parent


@pytest.mark.skipif(
    sys.platform != "linux", reason="no Linux, no Triton compiler: NOT covered: compiling"
)
def test_every_kernel_compiles_for_compute_capability_9_0(tmp_path: Path) -> None:
    """In bfloat16 with bias, in float32 without, and of ones; with the block sizes of a GPU."""
    from hstu_xd.ops.domain_attention import triton_kernels
    from hstu_xd.ops.state_attention import triton_kernels as triton_state_kernels

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), str(HERE.parent), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [
        name
        for module in (triton_kernels, triton_state_kernels)
        for name in vars(module)
        if name.endswith("_kernel")
    ]
    others = [name for name in kernels if name != "bias_gradient_kernel"]  # only with bias
    assert sorted(done.stdout.split()) == sorted([*kernels, *kernels, *others])
