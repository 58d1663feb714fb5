"""What a row of the model benchmarks says, whoever was measured."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu_xd.bench import memory
from hstu_xd.bench.cases import Case

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
        "dtype": "float32",
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
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "repeats": repeats,
        "peak_bytes_method": memory.method(case.device),
    }


def time_columns(milliseconds: Sequence[float]) -> Row:
    """Median, 20th and 80th percentile."""
    low, median, high = np.percentile(milliseconds, [20, 50, 80])
    return {"ms_median": median, "ms_p20": low, "ms_p80": high}


def times_faster(times: dict[str, list[float]], provider: str, rival: str) -> Row:
    """How often a provider runs in the time of its rival: the median over turns, if both ran."""
    if rival not in times:
        return {}
    ratios = np.divide(times[rival], times[provider])
    return {f"times_faster_than_{rival}": float(np.median(ratios))}
