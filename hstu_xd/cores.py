"""How many cores this process may use, which is not how many the machine has."""

import math
import os
from pathlib import Path

# Of the process's own control group, as a container sees it: version 2, and the two files of 1.
_GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the cores that the affinity of this process and the quota of its container leave.

    Where a container may use the time of 1.5 cores, they count as two. Threads beyond these wait
    for one another, and the more of them there are the more time is lost.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS and Windows
        cores = os.cpu_count() or 1
    quota = _quota()
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota)))


def _quota() -> float:
    """Return the cores' worth of time that the control group grants; infinity for no limit."""
    try:
        if (_GROUPS / "cpu.max").exists():
            granted, period = (_GROUPS / "cpu.max").read_text().split()
        else:
            granted = (_GROUPS / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (_GROUPS / "cpu" / "cpu.cfs_period_us").read_text()
        return math.inf if granted.strip() in ("max", "-1") else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf  # no control groups here, or none that is told in this way
