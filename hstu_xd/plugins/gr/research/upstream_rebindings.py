"""The names that upstream's trainer looks up and we rebind, and what takes their place."""

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from generative_recommenders.research.data.reco_dataset import RecoDataset
from generative_recommenders.research.modeling.sequential.encoder_utils import hstu_encoder

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.gr.research.dataset import hold_out, read_item_domains, split_datasets
from hstu_xd.plugins.gr.research.domain_batches import (
    SESSION,
    in_batch_sampler,
    local_sampler,
    with_domains,
)
from hstu_xd.plugins.gr.research.encoder import HSTU_XD
from hstu_xd.plugins.gr.research.settings import UpstreamSettings, bound_arguments, encoder_settings
from hstu_xd.plugins.gr.research.upstream_metrics import domain_scoped
from hstu_xd.plugins.gr.research.upstream_trainer import CHECKPOINTS, TRAINER
from hstu_xd.plugins.rebinding import Rebinding

STORE_PREFIX = "xd:"
# Private to upstream's embedding modules.
_ITEM_TABLE = "_item_emb"
_MODULES = ("SASRec", "HSTU", "HSTU_XD")


def with_stores(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``get_reco_dataset`` open ``xd:<prepared folder>`` too, know the domains and seed."""

    def xd_get_reco_dataset(
        dataset_name: str,
        max_sequence_length: int,
        chronological: bool,
        positional_sampling_ratio: float = 1.0,
    ) -> Any:
        settings = UpstreamSettings()
        # The first thing that every worker calls: model, order of samples and negatives come after.
        if settings.seed is not None:
            rank = dist.get_rank() if dist.is_initialized() else 0
            torch.manual_seed(settings.seed + rank)
        if not dataset_name.startswith(STORE_PREFIX):
            opened = upstream(
                dataset_name=dataset_name,
                max_sequence_length=max_sequence_length,
                chronological=chronological,
                positional_sampling_ratio=positional_sampling_ratio,
            )
            path = settings.item_domain_path
            SESSION.open(
                read_item_domains(Path(path), opened.all_item_ids, opened.max_item_id)
                if path
                else None
            )
            train, held_out = hold_out(
                opened.train_dataset, opened.eval_dataset, split=settings.split
            )
            return replace(opened, train_dataset=train, eval_dataset=held_out)
        store = InteractionStore.open(Path(dataset_name.removeprefix(STORE_PREFIX)))
        SESSION.open(store.catalog)
        train, held_out = split_datasets(
            store,
            max_sequence_length,
            sample_ratio=positional_sampling_ratio,
            split=settings.split,
        )
        return RecoDataset(
            max_sequence_length=max_sequence_length,
            num_unique_items=store.num_items,
            max_item_id=store.num_items,
            all_item_ids=list(range(1, store.num_items + 1)),
            train_dataset=train,
            eval_dataset=held_out,
        )

    return xd_get_reco_dataset


def with_hstu_xd(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``get_sequential_encoder`` also build ``main_module = "HSTU_XD"``."""

    def xd_get_sequential_encoder(
        module_type: str,
        max_sequence_length: int,
        max_output_length: int,
        embedding_module: Any,
        interaction_module: Any,
        input_preproc_module: Any,
        output_postproc_module: Any,
        verbose: bool,
        **others: Any,
    ) -> Any:
        build = partial(
            upstream,
            module_type=module_type,
            max_sequence_length=max_sequence_length,
            max_output_length=max_output_length,
            embedding_module=embedding_module,
            interaction_module=interaction_module,
            input_preproc_module=input_preproc_module,
            output_postproc_module=output_postproc_module,
            verbose=verbose,
            **others,
        )
        if module_type == "HSTU_XD":
            build = partial(
                _hstu_xd,
                max_sequence_len=max_sequence_length,
                max_output_len=max_output_length,
                embedding_module=embedding_module,
                similarity_module=interaction_module,
                input_features_preproc_module=input_preproc_module,
                output_postproc_module=output_postproc_module,
                verbose=verbose,
            )
        elif module_type not in _MODULES:
            near = get_close_matches(module_type, _MODULES, n=1, cutoff=0.4)
            raise InputError(
                f"train_fn.main_module = {module_type!r}; known: {', '.join(_MODULES)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        model = build()
        checkpoint = UpstreamSettings().warm_start
        if checkpoint:
            CHECKPOINTS.load_into(model, Path(checkpoint))
        return model

    return xd_get_sequential_encoder


def _hstu_xd(*, embedding_module: Any, max_sequence_len: int, max_output_len: int, **modules: Any):
    known = SESSION.catalog is not None
    settings = encoder_settings(
        hstu_encoder,
        num_domains=SESSION.new_catalog().num_domains if known else 1,
        norm_length=max_sequence_len + max_output_len,
        embedding_dim=embedding_module.item_embedding_dim,
    )
    if settings.is_cross_domain and not known:
        raise InputError(
            "HSTU_XD has switches on but knows no domains; open a prepared store with "
            'train_fn.dataset_name = "xd:<folder>", or name an item -> domain file with '
            "xd_upstream.item_domain_path"
        )
    num_items = getattr(embedding_module, _ITEM_TABLE).num_embeddings
    return HSTU_XD(
        catalog=SESSION.new_catalog() if known else DomainCatalog(torch.zeros(num_items), ["all"]),
        settings=settings,
        attn_dropout_rate=bound_arguments(hstu_encoder)["attn_dropout_rate"],
        embedding_module=embedding_module,
        max_sequence_len=max_sequence_len,
        max_output_len=max_output_len,
        **modules,
    )


# Names as train_fn looks them up: in its own module, each time it runs.
REBINDINGS = (
    (
        Rebinding(
            TRAINER,
            "get_reco_dataset",
            with_stores,
            ("dataset_name", "max_sequence_length", "chronological", "positional_sampling_ratio"),
        ),
        Rebinding(
            TRAINER,
            "get_sequential_encoder",
            with_hstu_xd,
            ("module_type", "embedding_module", "interaction_module", "input_preproc_module"),
        ),
        Rebinding(
            TRAINER,
            "movielens_seq_features_from_row",
            with_domains,
            ("row", "device", "max_output_length"),
        ),
        Rebinding(TRAINER, "LocalNegativesSampler", local_sampler, ("item_emb", "all_item_ids")),
        Rebinding(TRAINER, "InBatchNegativesSampler", in_batch_sampler, ("dedup_embeddings",)),
        Rebinding(
            TRAINER,
            "eval_metrics_v2_from_tensors",
            domain_scoped,
            ("eval_state", "model", "seq_features", "target_ids", "target_ratings", "dtype"),
        ),
    ),
)
