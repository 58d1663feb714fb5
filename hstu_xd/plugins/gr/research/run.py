"""Upstream's own ``train_fn``: as main.py starts it on GPUs, and with gloo where there is none."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gin
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.gr.research.verified import RESEARCH, inspect_upstream
from hstu_xd.plugins.rebinding import Rebinding, apply
from hstu_xd.training.distributed import keep_group

TRAINER = f"{RESEARCH}.trainer.train"
PLUGIN = "hstu_xd.plugins.generative_recommenders"


def upstream_train(
    gin_config_file: Path, bindings: Sequence[str] = (), *, processes: int = 1, port: int = 0
) -> None:
    """Run ``train_fn`` with a gin file: one process a GPU, or ``processes`` on CPU.

    Args:
        gin_config_file: as for upstream's main.py.
        bindings: further bindings, after the file's.
        processes: on CPU only; they share one gloo group.
        port: of the process group; 0: any free one.

    Raises:
        InputError: no such file, or a file that asks for hstu-xd without importing the plug-in.
        HstuXdError: generative_recommenders or fbgemm_gpu is not importable.
    """
    prepare(gin_config_file)
    gpus = torch.cuda.device_count()
    world = gpus or processes
    arguments = (world, port or _free_port(), str(gin_config_file), tuple(bindings), not gpus)
    if world == 1:
        _worker(0, *arguments)
    else:
        mp.start_processes(_worker, arguments, nprocs=world, start_method="forkserver")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def prepare(gin_config_file: Path) -> None:
    """Check that the file and upstream are there, before anything is started.

    Raises:
        InputError: no such file.
        HstuXdError: generative_recommenders or fbgemm_gpu is not importable.
    """
    if not gin_config_file.is_file():
        raise InputError(f"--gin_config_file {gin_config_file}: no such file")
    if "" not in sys.path:  # as for `python main.py` in a checkout
        sys.path.insert(0, "")
    status = inspect_upstream()
    if not status.importable:
        raise HstuXdError(
            f"generative_recommenders is not importable ({status.error}); run from inside its "
            "checkout or put the checkout on PYTHONPATH"
        )
    try:
        import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)
    except Exception as error:  # a wheel for another torch fails in many ways
        raise HstuXdError(
            f"fbgemm_gpu does not load: {error}; hstu-xd doctor names the version that fits"
        ) from error


def _worker(
    rank: int, world: int, port: int, gin_config_file: str, bindings: tuple[str, ...], on_cpu: bool
) -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
    import fbgemm_gpu  # noqa: F401
    from generative_recommenders.research.trainer.train import train_fn

    read_gin(Path(gin_config_file), bindings)
    if not on_cpu:
        train_fn(rank, world, port)
        return
    with apply(CPU_REBINDINGS):
        train_fn(rank, world, port)


def read_gin(gin_config_file: Path, bindings: Sequence[str]) -> None:
    """Parse a gin file of upstream's trainer, then bindings.

    Raises:
        InputError: gin refuses it, or it names an ``xd:`` data set without importing the plug-in.
    """
    # Included files are named from the checkout's root, "gin/...", wherever the command runs.
    for folder in gin_config_file.resolve().parents:
        if folder.name == "gin":
            gin.add_config_file_search_path(str(folder.parent))
    try:
        gin.parse_config_files_and_bindings([str(gin_config_file)], list(bindings))
    except ValueError as error:
        raise InputError(_explain(str(error), gin_config_file)) from error
    if PLUGIN not in sys.modules and "xd:" in str(gin.get_bindings("train_fn")):
        raise InputError(_explain("it names an xd: data set", gin_config_file))


def _explain(text: str, file: Path) -> str:
    hint = "" if PLUGIN in sys.modules else f"; the first line of the file must import {PLUGIN}"
    return f"{file}: {' '.join(text.split())}{hint}"


def _gloo_setup(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def setup(rank: int, world_size: int, master_port: int) -> None:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(master_port))
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        keep_group()

    return setup


def _without_device_ids(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def ddp(module: torch.nn.Module, device_ids: object = None, **others: Any) -> Any:
        return upstream(module, **others)

    return ddp


def _device_is_cpu(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream names a device by the rank's number, which PyTorch reads as a GPU."""

    def on_cpu(*arguments: Any, device: object, **others: Any) -> Any:
        return upstream(*arguments, device=torch.device("cpu"), **others)

    return on_cpu


def _module_to_cpu(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: torch.nn.Module, *arguments: Any, **others: Any) -> Any:
        return upstream(self, *("cpu" if type(a) is int else a for a in arguments), **others)

    return to


# In force while train_fn runs on CPU, on top of the plug-in's own.
CPU_REBINDINGS = (
    Rebinding(TRAINER, "setup", _gloo_setup, ("rank", "world_size", "master_port")),
    Rebinding(TRAINER, "DDP", _without_device_ids, ("module", "device_ids")),
    Rebinding(TRAINER, "movielens_seq_features_from_row", _device_is_cpu, ("device",)),
    Rebinding(TRAINER, "get_eval_state", _device_is_cpu, ("device",)),
    Rebinding("torch.nn", "Module.to", _module_to_cpu),
)
