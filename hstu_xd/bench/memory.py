"""Peak memory of one provider, in a process of its own.

On a CPU it is the growth of the resident set over one pass, from after inputs, parameters and a
tiny warm-up are in memory; on CUDA the allocator's own count.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from hstu_xd.bench.cases import Case
from hstu_xd.errors import HstuXdError

_PROCESS = Path("/proc/self")


def peak_bytes(provider: str, case: Case, threads: int) -> int:
    """Bytes that one forward and backward pass adds.

    Raises:
        HstuXdError: the process failed; with the last line it wrote.
    """
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
    from hstu_xd.bench.providers import build

    torch.set_num_threads(threads)
    build(provider, Draw.of(case.small), torch.float32)()
    run = build(provider, Draw.of(case), torch.float32)
    if case.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - baseline
    baseline = _resident(reset=True)
    run()
    return max(0, _resident(reset=False) - baseline)


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
