"""Upstream's own ``train_fn``, started by us: on CPU too, and to read a split with a checkpoint."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

import gin
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import gin_folder
from hstu_xd.plugins import bridge
from hstu_xd.plugins.bridge import CheckpointFormat
from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.host import inspect_host
from hstu_xd.plugins.rebinding import Rebinding, apply

TRAINER = "generative_recommenders.research.trainer.train"
PLUGIN = "hstu_xd.plugins.generative_recommenders"
CHECKPOINTS = CheckpointFormat(
    host="generative-recommenders", entry="model_state_dict", kept_in="upstream's ckpts folder"
)


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
    arguments = (
        world,
        port or bridge.free_port(),
        str(gin_config_file),
        tuple(bindings),
        not gpus,
    )
    if world == 1:
        _worker(0, *arguments)
    else:
        mp.start_processes(_worker, arguments, nprocs=world, start_method="forkserver")


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
    status = inspect_host(HOST)
    if not status.importable:
        raise HstuXdError(f"{HOST.package} is not importable ({status.error}); {HOST.where_to_run}")
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
    with apply(cpu_rebindings()):
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
    # Recipes that come with this package can be included from anywhere.
    gin.add_config_file_search_path(str(gin_folder().parent))
    try:
        gin.parse_config_files_and_bindings([str(gin_config_file)], list(bindings))
    except ValueError as error:
        raise InputError(_explain(str(error), gin_config_file)) from error
    if PLUGIN not in sys.modules and "xd:" in str(gin.get_bindings("train_fn")):
        raise InputError(_explain("it names an xd: data set", gin_config_file))


def _explain(text: str, file: Path) -> str:
    hint = "" if PLUGIN in sys.modules else f"; the first line of the file must import {PLUGIN}"
    return f"{file}: {' '.join(text.split())}{hint}"


def cpu_rebindings() -> tuple[Rebinding, ...]:
    """Return what is rebound while train_fn runs on CPU, on top of the plug-in's own."""
    group = ("rank", "world_size", "master_port")
    return (
        Rebinding(TRAINER, "setup", bridge.gloo_setup, group),
        Rebinding(TRAINER, "DDP", bridge.without_device_ids, ("module", "device_ids")),
        Rebinding(TRAINER, "movielens_seq_features_from_row", bridge.device_is_cpu, ("device",)),
        Rebinding(TRAINER, "get_eval_state", bridge.device_is_cpu, ("device",)),
        Rebinding("torch.nn", "Module.to", bridge.module_to_cpu),
    )


@dataclass
class _Parts:
    """What train_fn has built by the time it would start to train."""

    dataset: Any = None
    sampler: Any = None
    model: Any = None


class _BuiltError(Exception):
    """Leaves train_fn once its model stands."""


def upstream_evaluate(
    gin_config_file: Path, checkpoint: Path, bindings: Sequence[str] = (), *, split: str = "test"
) -> dict[str, float]:
    """Read a split once with a checkpoint; upstream itself evaluates during training only.

    Args:
        gin_config_file: the file it was trained with.
        checkpoint: out of upstream's ckpts folder.
        bindings: further bindings, those of the training.
        split: value of ``xd_upstream.split``.

    Returns:
        Mean of every metric over all users of the split, under upstream's names and per group
        ("hr@10", "hr@10/films", "mrr/switch"); groups without a target are absent.

    Raises:
        InputError: no such file, or a checkpoint of another model.
    """
    state = CHECKPOINTS.read(checkpoint)
    prepare(gin_config_file)
    # The checkpoint replaces whatever the training started from.
    ours = [f"xd_upstream.split = {split!r}", "xd_upstream.warm_start = ''"]
    read_gin(gin_config_file, [*bindings, *ours])
    on_cpu = not torch.cuda.device_count()
    with apply(cpu_rebindings() if on_cpu else ()):
        parts = _build()
        own = {name.removeprefix("module."): value for name, value in state.items()}
        try:
            parts.model.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(
                f"{checkpoint}: not a checkpoint of the model that {gin_config_file} describes: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return _evaluate(parts)


def _build() -> _Parts:
    """Let train_fn build its data set, sampler and model, and stop it there."""
    from generative_recommenders.research.trainer import train

    parts = _Parts()

    def keeping(attribute: str) -> Callable[[Any], Any]:
        def wrap(original: Any) -> Any:
            def kept(*arguments: Any, **others: Any) -> Any:
                built = original(*arguments, **others)
                setattr(parts, attribute, built)
                return built

            return kept

        return wrap

    def stop(original: Any) -> Any:
        def stopped(module: Any, **others: Any) -> Any:
            parts.model = module
            raise _BuiltError

        return stopped

    rebindings = [
        Rebinding(TRAINER, "setup", lambda original: lambda *arguments: None),
        Rebinding(TRAINER, "get_reco_dataset", keeping("dataset")),
        Rebinding(TRAINER, "LocalNegativesSampler", keeping("sampler")),
        Rebinding(TRAINER, "InBatchNegativesSampler", keeping("sampler")),
        Rebinding(TRAINER, "DDP", stop),
    ]
    with apply(rebindings):
        try:
            train.train_fn(0, 1, 0)
        except _BuiltError:
            return parts
    raise AssertionError("train_fn did not reach DDP")


@torch.inference_mode()
def _evaluate(parts: _Parts) -> dict[str, float]:
    from generative_recommenders.research.trainer import train

    # Importing the settings makes gin know them, which is the gin file's to ask for.
    from hstu_xd.plugins.gr.research.settings import bound_arguments

    bound = bound_arguments(train.train_fn)
    dtype = torch.bfloat16 if bound["main_module_bf16"] else None
    model = parts.model.eval()
    state = train.get_eval_state(
        model=model,
        all_item_ids=parts.dataset.all_item_ids,
        negatives_sampler=parts.sampler,
        top_k_module_fn=lambda vectors, ids: train.get_top_k_module(
            top_k_method=bound["top_k_method"], model=model, item_embeddings=vectors, item_ids=ids
        ),
        device=0,
        float_dtype=dtype,
    )
    loader = torch.utils.data.DataLoader(
        parts.dataset.eval_dataset, batch_size=bound["eval_batch_size"]
    )
    values: dict[str, list[Tensor]] = {}
    for row in loader:
        features, target_ids, target_ratings = train.movielens_seq_features_from_row(
            row, device=0, max_output_length=bound["gr_output_length"] + 1
        )
        found = train.eval_metrics_v2_from_tensors(
            state,
            model,
            features,
            target_ids=target_ids,
            target_ratings=target_ratings,
            user_max_batch_size=bound["eval_user_max_batch_size"],
            dtype=dtype,
        )
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    whole = {name: torch.cat(parts).double() for name, parts in values.items()}
    return {name: float(value.mean()) for name, value in whole.items() if value.numel()}
