"""Under which conditions rows were measured: what a stored row needs to be read later."""

import os
import platform
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hstu_xd import __version__
from hstu_xd.bench import jagged_operators


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
