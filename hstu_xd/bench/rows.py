"""What a row of the model benchmarks says, whoever was measured.

Under which conditions rows were measured: what a stored row needs to be read later.
"""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hstu_xd.bench import jagged_operators, memory
from hstu_xd.bench.cases import Case
from hstu_xd.bench.roofline import Ceilings, Work
from hstu_xd.bench.timing import Times
from hstu_xd.version import __version__


def conditions(device: str) -> dict[str, object]:
    """Columns of every row of a run.

    Args:
        device: "cpu" or "cuda".

    Returns:
        ``device_name``, versions of torch, triton (None where it is not installed), python and
        hstu_xd, whose ``jagged_operators`` upstream's dense layers find, ``load_average``
        (processes that wanted a core in the last minute) and the command.
    """
    return {
        "device_name": _device_name(device),
        "torch": version("torch"),
        "triton": _version_or_none("triton"),
        "python": platform.python_version(),
        "hstu_xd": __version__,
        "jagged_operators": jagged_operators.source(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "command": shlex.join(["hstu-xd", *sys.argv[1:]]),
    }


@cache
def _device_name(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Row = dict[str, Any]


def empty_row(provider: str, case: Case, *, threads: int, repeats: int) -> Row:
    """The row of a provider before anything is known of it.

    Args:
        provider: its name.
        case: what is measured.
        threads: of PyTorch.
        repeats: timed passes.
    """
    return {
        "provider": provider,
        "seq_len": case.seq_len,
        "num_domains": case.num_domains,
        "skew": case.skew,
        "dtype": case.dtype,
        "device": case.device,
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "peak_bytes": None,
        "correct": None,
        "what": case.what,
        "batch_size": case.batch_size,
        "heads": case.heads,
        "dqk": case.dqk,
        "dv": case.dv,
        "width": case.width,
        "layers": case.layers,
        "interleaving": case.interleaving,
        "plan": case.plan,
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "repeats": repeats,
        "peak_bytes_method": memory.method(case.device),
        **conditions(case.device),
    }


def time_columns(times: Times) -> Row:
    """Median, 20th and 80th percentile of whole passes, and the median of everything else."""
    low, median, high = (float(x) for x in np.percentile(times["total"], [20, 50, 80]))
    others = {f"ms_{name}": float(np.median(x)) for name, x in times.items() if name != "total"}
    return {"ms_median": median, "ms_p20": low, "ms_p80": high, **others}


def times_faster(times: Mapping[str, Times], provider: str, rival: str) -> Row:
    """How often a provider runs in the time of its rival: the median over turns, if both ran."""
    if rival not in times:
        return {}
    ratios = np.divide(times[rival]["total"], times[provider]["total"])
    return {f"times_faster_than_{rival}": float(np.median(ratios))}


def speed_columns(work: Work, row: Row, ceilings: Ceilings) -> Row:
    """Achieved arithmetic and traffic of both phases, beside what the machine reached.

    ``roofline_*`` is the share of the attainable: the time that the work takes at the ceilings
    over the time it took.

    Args:
        work: of the case, as the provider computes it.
        row: with the times of the phases.
        ceilings: measured in this run.
    """
    columns: Row = {"ceiling_tflops": ceilings.tflops, "ceiling_gbs": ceilings.gbs}
    for phase, flops, moved in (
        ("forward", work.forward_flops, work.forward_bytes),
        ("backward", work.backward_flops, work.backward_bytes),
    ):
        seconds = row[f"ms_{phase}"] / 1e3
        columns |= {
            f"tflops_{phase}": flops / seconds / 1e12,
            f"gbs_{phase}": moved / seconds / 1e9,
            f"roofline_{phase}": ceilings.seconds(flops, moved) / seconds,
        }
    return columns
