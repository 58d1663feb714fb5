"""Replacements for what a host takes for granted on GPUs, to be rebound where none is visible.

Each goes from the original to what takes its place, as :class:`hstu_xd.plugins.rebinding.Rebinding`
wants it.
"""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from hstu_xd.training.distributed import keep_group


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def gloo_setup(_: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a trainer's ``setup`` by one that joins a gloo group."""

    def setup(rank: int, world_size: int, master_port: int) -> None:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(master_port))
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        keep_group()

    return setup


def gloo_for_nccl(init: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.distributed.init_process_group`` by one that takes gloo for nccl."""

    def init_process_group(backend: str | None = None, **others: Any) -> None:
        init(backend="gloo" if backend == "nccl" else backend, **others)
        keep_group()

    return init_process_group


def without_device_ids(ddp: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``DistributedDataParallel`` by a call of it without ``device_ids``."""

    def ddp_on_cpu(module: torch.nn.Module, device_ids: object = None, **others: Any) -> Any:
        return ddp(module, **others)

    return ddp_on_cpu


def device_is_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a function by one whose keyword ``device`` is the CPU whatever is given."""

    def on_cpu(*arguments: Any, device: object, **others: Any) -> Any:
        return function(*arguments, device=torch.device("cpu"), **others)

    return on_cpu


def module_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.nn.Module.to`` by one that takes the CPU for every GPU.

    A GPU may also be named by its number alone, a process's rank.
    """

    def module_to(self: torch.nn.Module, *arguments: Any, **others: Any) -> Any:
        named = {name: _cpu_for_gpu(value) for name, value in others.items()}
        return to(self, *map(_cpu_for_gpu, arguments), **named)

    return module_to


def _cpu_for_gpu(value: Any) -> Any:
    is_gpu = type(value) is int or (isinstance(value, torch.device) and value.type == "cuda")
    return torch.device("cpu") if is_gpu else value


def returns_module(_: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.nn.Module.cuda`` by a method that leaves the module where it is."""

    def module_cuda(self: torch.nn.Module, *arguments: Any, **others: Any) -> torch.nn.Module:
        return self

    return module_cuda


def does_nothing(_: Any) -> Callable[..., None]:
    """Replace a function by one that does nothing."""

    def nothing(*arguments: Any, **others: Any) -> None:
        return None

    return nothing


def no_context(_: Any) -> Callable[..., Any]:
    """Replace a context manager, as ``torch.cuda.device``, by one that does nothing."""

    def device(*arguments: Any, **others: Any) -> Any:
        return nullcontext()

    return device


def no_random_state(_: Any) -> Callable[..., torch.Tensor]:
    """Replace ``torch.cuda.get_rng_state`` by a function that returns an empty state."""

    def get_rng_state(*arguments: Any, **others: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    return get_rng_state


def few_workers(loader: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``DataLoader`` by a call of it with at most one process a core, without pinning.

    The model needs the cores too; one of them is left to it.
    """

    def data_loader(
        *arguments: Any, num_workers: int = 0, pin_memory: bool = False, **others: Any
    ) -> Any:
        workers = min(num_workers, (os.cpu_count() or 1) - 1)
        return loader(*arguments, num_workers=workers, pin_memory=False, **others)

    return data_loader
