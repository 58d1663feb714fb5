"""Peak memory of one pass: the growth of a process on a CPU, the allocator's own count on CUDA.

And what a process and those that it has started take together.
"""

import json
import math
import os
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


def seconds_of_family(pid: int) -> float:
    """Return the time on a core of a process and of those that it has started; NaN: not known."""
    ticks = 0
    for folder in _family(pid):
        # After the name, which may have spaces.
        columns = (folder / "stat").read_text().rpartition(")")[2].split()
        ticks += int(columns[11]) + int(columns[12])
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else math.nan


def peak_of_family(pid: int) -> int | None:
    """Return the peaks of a process and of those that it has started, added; None: not known."""
    peaks = [
        int(line.split()[1]) * 1024
        for folder in _family(pid)
        for line in (folder / "status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return sum(peaks) if peaks else None


def _family(pid: int) -> list[Path]:
    """Return the folders in /proc of a process and of those that it has started, if any."""
    folder = Path(f"/proc/{pid}")
    if not folder.exists():
        return []
    children = (folder / "task" / str(pid) / "children").read_text().split()
    return [folder, *(Path("/proc") / child for child in children)]


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
