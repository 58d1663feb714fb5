"""Upstream's own ``_main_func`` on a machine without a GPU: gloo in nccl's place."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from hstu_xd.plugins import bridge
from hstu_xd.plugins.rebinding import Rebinding, apply

RANKER = "generative_recommenders.dlrm_v3.train.train_ranker"
UTILS = "generative_recommenders.dlrm_v3.train.utils"


def cpu_rebindings() -> tuple[Rebinding, ...]:
    """Return what is rebound while ``_main_func`` runs on CPU, on top of the plug-in's own."""
    group = ("rank", "world_size", "master_port", "device")
    return (
        Rebinding(RANKER, "setup", _gloo_without_device, group),
        Rebinding(RANKER, "torch", _devices_are_cpu),
        Rebinding(UTILS, "Topology", _of_cpus, ("compute_device",)),
    )


def run_worker(rank: int, world_size: int, port: str, gin_file: str, mode: str) -> None:
    """Run one of ``world_size`` processes of upstream's trainer on CPU."""
    # Before the rest: operators that upstream calls when it is imported.
    import fbgemm_gpu  # noqa: F401
    from generative_recommenders.dlrm_v3.train import train_ranker

    with apply(cpu_rebindings()):
        train_ranker._main_func(rank, world_size, port, gin_file, mode)  # noqa: SLF001


def _gloo_without_device(upstream: Callable[..., Any]) -> Callable[..., Any]:
    join = bridge.gloo_setup(upstream)

    def setup(rank: int, world_size: int, master_port: int, device: Any) -> None:
        join(rank, world_size, master_port)

    return setup


def _devices_are_cpu(_: Any) -> Any:
    # All that this module of upstream's takes from torch is the device of its process.
    return SimpleNamespace(device=lambda name: torch.device("cpu"))


def _of_cpus(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def topology(**arguments: Any) -> Any:
        return upstream(**arguments | {"compute_device": "cpu"})

    return topology
