"""The names that upstream's production trainer looks up and we rebind, and what replaces them."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.datasets.dataset import Samples

from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import Session
from hstu_xd.plugins.dlrm_v3.checkpoints import with_fused_state_loaded, with_fused_state_saved
from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU
from hstu_xd.plugins.dlrm_v3.request_metrics import evaluate
from hstu_xd.plugins.dlrm_v3.settings import STORE_PREFIX, DlrmSettings, bound_value, cross_domain
from hstu_xd.plugins.dlrm_v3.store_dataset import StoreDataset, configure, open_requests, tables
from hstu_xd.plugins.rebinding import Rebinding

_logger = logging.getLogger(__name__)

RANKER = "generative_recommenders.dlrm_v3.train.train_ranker"
UTILS = "generative_recommenders.dlrm_v3.train.utils"
SESSION = Session()
_LOADERS = "make_train_test_dataloaders"


def store_folder(dataset: str) -> Path | None:
    """Return the folder that ``xd:<folder>`` names; None for upstream's own data sets."""
    is_store = dataset.startswith(STORE_PREFIX)
    return Path(dataset.removeprefix(STORE_PREFIX)) if is_store else None


def with_sizes(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``get_hstu_configs`` take sizes of ``xd_dlrm.*`` and features of a store; and seed."""

    def xd_get_hstu_configs(dataset: str = "debug") -> Any:
        settings = DlrmSettings()
        # The first thing that every worker calls: the model and the order of samples come after.
        torch.manual_seed(settings.seed)
        folder = store_folder(dataset)
        requests = open_requests(folder, settings) if folder else None
        SESSION.open(requests.store.catalog if requests else None)
        # Features are what upstream's data sets differ in; those of a store take their place.
        config = upstream("debug" if requests else dataset)
        if requests is None:
            return dataclasses.replace(config, **settings.sizes)
        goals, most = len(requests.goal_names), requests.max_candidates
        return configure(config, settings, num_goals=goals, max_candidates=most)

    return xd_get_hstu_configs


def with_tables(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``get_embedding_table_config`` give the tables of a store, or upstream's in our sizes."""

    def xd_get_embedding_table_config(dataset: str = "debug") -> dict[str, Any]:
        settings = DlrmSettings()
        configs = upstream("debug" if store_folder(dataset) else dataset)
        width = settings.hstu_embedding_table_dim or next(iter(configs.values())).embedding_dim
        folder = store_folder(dataset)
        if folder:
            requests = open_requests(folder, settings)
            goals = len(requests.goal_names)
            return tables(requests.store, settings, width, num_goals=goals)
        for config in configs.values():
            rows = min(config.num_embeddings, settings.table_rows or config.num_embeddings)
            if (rows, width) != (config.num_embeddings, config.embedding_dim):
                changed = {"num_embeddings": rows, "embedding_dim": width, "init_fn": None}
                configs[config.name] = dataclasses.replace(config, **changed)
        return configs

    return xd_get_embedding_table_config


def with_domains(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``DlrmHSTU`` be the cross-domain model where anything is on that needs it."""

    def xd_dlrm_hstu(hstu_configs: Any, embedding_tables: Any, is_inference: bool) -> Any:
        settings = DlrmSettings()
        on_gpu = torch.cuda.is_available()
        known = SESSION.catalog.num_domains if SESSION.catalog else 0
        extension = cross_domain(settings, known, hstu_configs)
        arguments = {
            "hstu_configs": hstu_configs,
            "embedding_tables": embedding_tables,
            "is_inference": is_inference,
            "bf16_training": settings.bf16 and on_gpu,
        }
        if extension.is_stock:
            model = upstream(**arguments)
        else:
            model = CrossDomainDlrmHSTU(**arguments, cross_domain=extension)
        if settings.kernel == "pytorch" or (settings.kernel == "auto" and not on_gpu):
            model.set_hammer_kernel(HammerKernel.PYTORCH)
        return model

    return xd_dlrm_hstu


def with_stores(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``get_dataset`` open ``xd:<prepared folder>``, too."""

    def xd_get_dataset(*arguments: Any, **others: Any) -> Any:
        name = others.get("name", arguments[0] if arguments else "")
        folder = store_folder(name)
        if folder is None:
            return upstream(*arguments, **others)
        settings = DlrmSettings()
        return StoreDataset, {"requests": open_requests(folder, settings), "settings": settings}

    return xd_get_dataset


def with_own_split(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``make_train_test_dataloaders`` part the requests of a store where its split says."""

    def xd_make_train_test_dataloaders(**arguments: Any) -> Any:
        name = arguments.get("dataset_type") or bound_value(f"{_LOADERS}.dataset_type")
        folder = store_folder(name)
        if folder is None:
            return upstream(**arguments)
        requests = open_requests(folder, DlrmSettings())
        share = requests.num_train / len(requests)
        train, held_out = upstream(**arguments | {"train_split_percentage": share, "num_blocks": 1})
        if not len(train) or not len(held_out):
            raise InputError(
                f"{_LOADERS}.batch_size = {train.batch_size}, but a process has "
                f"{len(train.sampler)} requests of training and {len(held_out.sampler)} of "
                "evaluation, and only whole batches are read; take a smaller one"
            )
        _logger.info(
            "%s: %d requests of training, %d of evaluation; whole batches of %d are read",
            *(folder, requests.num_train, len(requests) - requests.num_train, train.batch_size),
        )
        return train, held_out

    return xd_make_train_test_dataloaders


def with_request_metrics(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loop that evaluates tell of a store's domains and switches, too, when it has ended."""

    def xd_loop(*, rank: int, model: Any, device: Any, **others: Any) -> None:
        upstream(rank=rank, model=model, device=device, **others)
        loader = others["dataloader" if "dataloader" in others else "eval_dataloader"]
        dataset = loader.dataset.dataset.dataset
        if not isinstance(dataset, StoreDataset):
            return
        settings = DlrmSettings()
        # Every process computes all of it: tables are sharded, and calls are made together.
        values = evaluate(model, dataset, settings, loader.batch_size, device)
        for name, value in values.items() if rank == 0 else ():
            print(f"xd/{settings.split}/{name}: {value:.5f}")

    return xd_loop


def in_whole_batches(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``HammerToTorchDataset`` read the batches of a store whole."""

    def getitems(self: Any, indices: list[int]) -> Any:
        if isinstance(self.dataset, StoreDataset):
            return self.dataset.get_samples(indices)
        return upstream(self, indices)

    return getitems


def unless_whole(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``collate_fn`` pass on what is a batch already."""

    def collate(samples: Any) -> Any:
        return samples if isinstance(samples, Samples) else upstream(samples)

    return collate


# Names as the trainer's functions look them up, each time they run.
REBINDINGS = (
    (
        Rebinding(UTILS, "get_hstu_configs", with_sizes, ("dataset",)),
        Rebinding(UTILS, "get_embedding_table_config", with_tables, ("dataset",)),
        Rebinding(
            UTILS,
            "DlrmHSTU",
            with_domains,
            ("hstu_configs", "embedding_tables", "is_inference", "bf16_training"),
        ),
        Rebinding(UTILS, "get_dataset", with_stores, ("name",)),
        Rebinding(UTILS, "HammerToTorchDataset.__getitems__", in_whole_batches, ("indices",)),
        Rebinding(UTILS, "collate_fn", unless_whole, ("samples",)),
        Rebinding(
            RANKER,
            _LOADERS,
            with_own_split,
            ("dataset_type", "train_split_percentage", "num_blocks"),
        ),
        Rebinding(
            RANKER, "eval_loop", with_request_metrics, ("rank", "model", "device", "dataloader")
        ),
        Rebinding(
            RANKER,
            "train_eval_loop",
            with_request_metrics,
            ("rank", "model", "device", "eval_dataloader"),
        ),
        Rebinding(
            UTILS,
            "save_dmp_checkpoint",
            with_fused_state_saved,
            ("model", "optimizer", "metric_logger", "rank", "batch_idx", "path"),
        ),
        Rebinding(
            RANKER,
            "load_dmp_checkpoint",
            with_fused_state_loaded,
            ("model", "optimizer", "metric_logger", "device", "path"),
        ),
    ),
)
