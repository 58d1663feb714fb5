"""The names that REC looks up and the plug-in rebinds, and what takes their place."""

import ast
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from hstu_xd.errors import InputError
from hstu_xd.plugins import bridge
from hstu_xd.plugins.rebinding import Rebinding, apply
from hstu_xd.plugins.rec import PERSREC
from hstu_xd.plugins.rec.packed_attention import provide_packed_attention, warn_if_texts_mix
from hstu_xd.plugins.rec.rec_metrics import domain_scoped, with_groups
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import MODELS, RecSettings, as_theirs

DATASETS = "REC.data.dataset"
TRAINER = "REC.trainer.trainer"


def with_domains(bulid_dataloader: Callable[..., Any]) -> Callable[..., Any]:
    """Let REC's ``bulid_dataloader`` (sic) know our models and every item's domain."""

    def xd_bulid_dataloader(config: Any, data: Any) -> Any:
        SESSION.configure(RecSettings.read(config.final_config_dict))
        warn_if_texts_mix(config)
        with as_theirs(config), apply(_datasets()) if SESSION.extends_model else nullcontext():
            loaders = bulid_dataloader(config, data)
        assert SESSION.settings is not None
        if SESSION.settings.item_domain_path:
            SESSION.open_log(data.id2token["item_id"], _Occurring(data))
            _check_top(config, data.item_num)
        if SESSION.settings.is_around_llm and SESSION.settings.scopes_negatives:
            loaders[0].dataset.xd_catalog = SESSION.catalog
        return loaders

    return xd_bulid_dataloader


def _datasets() -> tuple[Rebinding, ...]:
    from hstu_xd.plugins.rec import rec_datasets

    assert SESSION.settings is not None
    ours: dict[str, Any] = {"SeqEvalDataset": rec_datasets.TimedEvalDataset}
    if SESSION.settings.is_around_llm:
        ours["TextSEQTrainDataset"] = rec_datasets.ScopedTextDataset
    elif SESSION.settings.reads_time:
        ours["SEQTrainDataset"] = rec_datasets.TimedTrainDataset
    return tuple(
        Rebinding(DATASETS, name, lambda _, dataset=dataset: dataset)
        for name, dataset in ours.items()
    )


class _Occurring:
    """Item numbers that the log holds, gathered when first asked."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._items: set[int] | None = None

    def __contains__(self, item: int) -> bool:
        if self._items is None:
            sequences = self._data.user_seq
            if isinstance(sequences, dict):
                sequences = sequences.values()
            self._items = {int(number) for items in sequences for number in items}
        return int(item) in self._items


def _check_top(config: Any, item_num: int) -> None:
    places = config["topk"]
    if not isinstance(places, list):
        raise InputError(f"topk: {places!r}; a list is needed, topk: [{places}] in a yaml file")
    top = max(places)
    if top > item_num:
        raise InputError(
            f"topk: {top} places cannot be filled from {item_num} items; give smaller ones, in "
            f"topk and in valid_metric ({config['valid_metric']})"
        )


def with_hstu_xd(get_model: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let REC's ``get_model`` know our models, and name the nearest of an unknown one."""

    def xd_get_model(model_name: str) -> Any:
        check_model(model_name)
        if model_name in MODELS:
            name = MODELS[model_name].lower().replace("personalized", "personalized_")
            model = getattr(import_module(f"hstu_xd.plugins.rec.{name}"), model_name)
        else:
            model = get_model(model_name)
        provide_packed_attention()
        return model

    return xd_get_model


def check_model(model_name: str) -> None:
    """Refuse a model that is neither REC's nor this package's.

    Raises:
        InputError: the message names the nearest, or the model that this codebase lacks.
    """
    known = known_models()
    if model_name in known:
        return
    if model_name in MODELS:
        raise InputError(
            f"model: {model_name!r} extends {MODELS[model_name]}, which this codebase does not "
            f"have; {PERSREC.repository} does"
        )
    near = get_close_matches(model_name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"model: {model_name!r} is unknown; known: {', '.join(known)}{hint}")


def known_models() -> list[str]:
    """Return REC's model classes, which say what input they take, and ours that extend them."""
    import REC.utils

    folder = Path(REC.utils.__file__).parent.parent / "model"
    names = []
    for file in (*folder.glob("IDNet/*.py"), *folder.glob("HLLM/hllm.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and _says_input_type(node):
                names.append(node.name)
    return [*(ours for ours, theirs in MODELS.items() if theirs in names), *sorted(names)]


def _says_input_type(node: ast.ClassDef) -> bool:
    assigned = [
        target for part in node.body if isinstance(part, ast.Assign) for target in part.targets
    ]
    return any(isinstance(target, ast.Name) and target.id == "input_type" for target in assigned)


def _unrestricted_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load as before torch 2.6, for REC's checkpoints hold its configuration object."""

    def load_rec(*arguments: Any, weights_only: bool | None = None, **others: Any) -> Any:
        return load(*arguments, weights_only=bool(weights_only), **others)

    return load_rec


def _with_effect(init_logger: Callable[..., Any]) -> Callable[..., Any]:
    """Let HLLM's ``init_logger`` have an effect where a library has logged to the root before."""

    def xd_init_logger(config: Any) -> None:
        for handler in list(logging.root.handlers):
            if type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)
        init_logger(config)

    return xd_init_logger


# REC's other modules import get_model by name: it is rebound before they are imported.
MODEL_REBINDINGS = tuple(
    Rebinding(module, "get_model", with_hstu_xd, ("model_name",))
    for module in ("REC.utils.utils", "REC.utils")
)
REBINDINGS = (
    MODEL_REBINDINGS,
    (
        Rebinding("REC.data.utils", "bulid_dataloader", with_domains, ("config",)),
        Rebinding("REC.data", "bulid_dataloader", with_domains, ("config",)),
        Rebinding(TRAINER, "Trainer._full_sort_batch_eval", domain_scoped, ("batched_data",)),
        Rebinding("REC.evaluator.evaluator", "Evaluator.evaluate", with_groups, ("dataobject",)),
        Rebinding("REC.utils", "init_logger", _with_effect, ("config",)),
        Rebinding("torch", "load", _unrestricted_load),
    ),
)


def cpu_rebindings() -> tuple[Rebinding, ...]:
    """Return what is rebound on CPU on top of :data:`REBINDINGS`, which must be in force."""
    workers = ("num_workers", "pin_memory")
    return (
        Rebinding("torch.distributed", "init_process_group", bridge.gloo_for_nccl),
        Rebinding("torch.cuda", "set_device", bridge.does_nothing),
        Rebinding("torch.cuda", "device", bridge.no_context),
        Rebinding("torch.cuda", "get_rng_state", bridge.no_random_state),
        Rebinding("torch.cuda", "set_rng_state", bridge.does_nothing),
        Rebinding("torch.nn", "Module.to", bridge.module_to_cpu),
        Rebinding("torch.nn", "Module.cuda", bridge.returns_module),
        Rebinding("REC.data.utils", "DataLoader", bridge.few_workers, workers),
        Rebinding(TRAINER, "DataLoader", bridge.few_workers, workers),
        Rebinding("REC.data.utils", "bulid_dataloader", _device_is_cpu, ("config",)),
        Rebinding("REC.data", "bulid_dataloader", _device_is_cpu, ("config",)),
        Rebinding(*_fabric(), _fabric_on_cpu),
    )


def _fabric() -> tuple[str, str]:
    """Tell where REC's trainer looks Fabric up: in its own module (PerSRec) or lightning (HLLM)."""
    own = hasattr(import_module(TRAINER), "Fabric")
    return (TRAINER, "Fabric") if own else ("lightning", "Fabric")


def _device_is_cpu(bulid_dataloader: Callable[..., Any]) -> Callable[..., Any]:
    """Put the CPU into the configuration, where the trainer, which comes later, looks it up."""

    def bulid_dataloader_on_cpu(config: Any, data: Any) -> Any:
        if config["strategy"] == "deepspeed":
            raise InputError("strategy: deepspeed needs GPUs, none is visible; leave the key out")
        config["device"] = torch.device("cpu")
        return bulid_dataloader(config, data)

    return bulid_dataloader_on_cpu


def _fabric_on_cpu(fabric: Callable[..., Any]) -> Callable[..., Any]:
    def fabric_on_cpu(*, accelerator: str, **others: Any) -> Any:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return fabric(accelerator="cpu", devices=processes, **others)

    return fabric_on_cpu
