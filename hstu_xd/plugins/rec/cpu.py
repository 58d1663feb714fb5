"""REC on a machine without a GPU: what it takes for granted there, rebound."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch

from hstu_xd.errors import InputError
from hstu_xd.plugins.rebinding import Rebinding
from hstu_xd.training.distributed import keep_group

TRAINER = "REC.trainer.trainer"


def rebindings() -> tuple[Rebinding, ...]:
    """To be applied after the plug-in's own, where ``torch.cuda.is_available()`` is False."""
    return (
        Rebinding("torch.distributed", "init_process_group", _gloo),
        Rebinding("torch.cuda", "set_device", _nothing),
        Rebinding("torch.cuda", "device", _no_context),
        Rebinding("torch.cuda", "get_rng_state", _no_state),
        Rebinding("torch.cuda", "set_rng_state", _nothing),
        Rebinding("torch.nn", "Module.to", _module_to_cpu),
        Rebinding("torch.nn", "Module.cuda", _stays),
        Rebinding("REC.data.utils", "DataLoader", _few_workers, ("num_workers", "pin_memory")),
        Rebinding(TRAINER, "DataLoader", _few_workers, ("num_workers", "pin_memory")),
        Rebinding("REC.data.utils", "bulid_dataloader", _device_is_cpu, ("config",)),
        Rebinding("REC.data", "bulid_dataloader", _device_is_cpu, ("config",)),
        Rebinding(*_fabric(), _on_cpu),
    )


def _fabric() -> tuple[str, str]:
    """Where REC's trainer looks Fabric up: a name of its own (PerSRec), or lightning's (HLLM)."""
    own = hasattr(import_module(TRAINER), "Fabric")
    return (TRAINER, "Fabric") if own else ("lightning", "Fabric")


def _gloo(init: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(backend: str | None = None, **others: Any) -> None:
        init(backend="gloo" if backend == "nccl" else backend, **others)
        keep_group()

    return init_process_group


def _nothing(_: Any) -> Callable[..., None]:
    def does_nothing(*arguments: Any, **others: Any) -> None:
        return None

    return does_nothing


def _no_context(_: Any) -> Callable[..., Any]:
    def device(*arguments: Any, **others: Any) -> Any:
        return nullcontext()

    return device


def _no_state(_: Any) -> Callable[..., torch.Tensor]:
    def get_rng_state(*arguments: Any, **others: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    return get_rng_state


def _module_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    def module_to(self: torch.nn.Module, *arguments: Any, **others: Any) -> Any:
        def moved(value: Any) -> Any:
            is_gpu = isinstance(value, torch.device) and value.type == "cuda"
            return torch.device("cpu") if is_gpu else value

        named = {name: moved(value) for name, value in others.items()}
        return to(self, *map(moved, arguments), **named)

    return module_to


def _stays(_: Callable[..., Any]) -> Callable[..., Any]:
    def module_cuda(self: torch.nn.Module, *arguments: Any, **others: Any) -> torch.nn.Module:
        return self

    return module_cuda


def _few_workers(loader: Callable[..., Any]) -> Callable[..., Any]:
    """REC starts 11 worker processes a loader; one a core is plenty where the model needs them."""

    def data_loader(
        *arguments: Any, num_workers: int = 0, pin_memory: bool = False, **others: Any
    ) -> Any:
        workers = min(num_workers, (os.cpu_count() or 1) - 1)
        return loader(*arguments, num_workers=workers, pin_memory=False, **others)

    return data_loader


def _device_is_cpu(bulid_dataloader: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer comes after the data and takes its device from the configuration."""

    def bulid_dataloader_on_cpu(config: Any, data: Any) -> Any:
        if config["strategy"] == "deepspeed":
            raise InputError("strategy: deepspeed needs GPUs, none is visible; leave the key out")
        config["device"] = torch.device("cpu")
        return bulid_dataloader(config, data)

    return bulid_dataloader_on_cpu


def _on_cpu(fabric: Callable[..., Any]) -> Callable[..., Any]:
    def fabric_on_cpu(*, accelerator: str, **others: Any) -> Any:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return fabric(accelerator="cpu", devices=processes, **others)

    return fabric_on_cpu
