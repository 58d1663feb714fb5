"""Peak memory of one pass.

On a CPU it is the growth of the resident set over one pass in a process of its own, from after
inputs, parameters and a tiny warm-up are in memory; on CUDA the allocator's own count.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from hstu_xd.bench.cases import Case
from hstu_xd.bench.timing import Pass, unmarked
from hstu_xd.errors import HstuXdError

_PROCESS = Path("/proc/self")


def peak_bytes(provider: str, case: Case, threads: int, run: Pass) -> int:
    """Bytes that one forward and backward pass adds.

    Args:
        provider: its name.
        case: what is measured.
        threads: of PyTorch.
        run: the provider's pass, warmed up; asked on CUDA, where no process of its own is needed.

    Raises:
        HstuXdError: the process failed; with the last line it wrote.
    """
    if case.device != "cpu":
        return _allocated(run)
    job = json.dumps({"provider": provider, "case": asdict(case), "threads": threads})
    command = [sys.executable, "-m", "hstu_xd.bench.memory", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise HstuXdError(f"measuring the memory of {provider} failed: {reason}")
    return int(done.stdout.splitlines()[-1])


def method(device: str) -> str:
    """How the bytes of a row were counted."""
    if device != "cpu":
        return "allocator peak less baseline"
    exact = (_PROCESS / "clear_refs").exists()
    return "resident peak less baseline" if exact else "resident peak less earlier peak"


def _measure(provider: str, case: Case, threads: int) -> int:
    import torch

    from hstu_xd.bench.cases import Draw
    from hstu_xd.bench.providers import PROVIDERS

    torch.set_num_threads(threads)
    one = PROVIDERS[case.what][provider]
    computes = one.computation(case)
    one.build(Draw.of(case.small), case.torch_dtype, computes)(unmarked)
    run = one.build(Draw.of(case), case.torch_dtype, computes)
    baseline = _resident(reset=True)
    run(unmarked)
    return max(0, _resident(reset=False) - baseline)


def _allocated(run: Pass) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    run(unmarked)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - baseline


def _resident(*, reset: bool) -> int:
    """The resident set now (``reset``: the peak starts again from here), or its peak since."""
    if (_PROCESS / "clear_refs").exists():
        if reset:
            (_PROCESS / "clear_refs").write_text("5")
        field = "VmRSS:" if reset else "VmHWM:"
        status = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(_measure(job["provider"], Case(**job["case"]), job["threads"]))
