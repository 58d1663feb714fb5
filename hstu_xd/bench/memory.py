"""Peak memory of one pass: the growth of a process on a CPU, the allocator's own count on CUDA."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hstu_xd.bench.rows import RESETS_PEAK
from hstu_xd.errors import HstuXdError


def growth_elsewhere(module: str, what: str, job: Mapping[str, Any]) -> int:
    """Return the growth that a module prints when it is run with a job, in a process of its own.

    Args:
        module: name of the module; its last line of output is the growth in bytes.
        what: what is measured, for the message of an error.
        job: what the module needs to know, which JSON can hold.

    Raises:
        HstuXdError: the process failed; with the last line it wrote.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise HstuXdError(f"measuring the memory of {what} failed: {reason}")
    return int(done.stdout.splitlines()[-1])


def growth(run: Callable[[], object]) -> int:
    """Return the bytes by which the resident set of this process grows at most while it runs."""
    baseline = _resident(reset=True)
    run()
    return max(0, _resident(reset=False) - baseline)


def allocated(run: Callable[[], object]) -> int:
    """Return the bytes that CUDA's allocator adds at most while it runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - baseline


def _resident(*, reset: bool) -> int:
    """Return the resident set now, and start its peak anew (``reset``), or its peak since then."""
    if RESETS_PEAK.exists():
        if reset:
            RESETS_PEAK.write_text("5")
        field = "VmRSS:" if reset else "VmHWM:"
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
