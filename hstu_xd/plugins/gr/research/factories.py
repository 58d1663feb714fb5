"""What upstream's trainer calls to make its data set and its model, extended by ours."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from generative_recommenders.research.data.reco_dataset import RecoDataset
from generative_recommenders.research.modeling.sequential.encoder_utils import hstu_encoder
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.model.warm_start import load_hstu
from hstu_xd.plugins.gr.research.dataset import hold_out, split_datasets
from hstu_xd.plugins.gr.research.encoder import HSTU_XD
from hstu_xd.plugins.gr.research.item_domains import read_item_domains
from hstu_xd.plugins.gr.research.session import SESSION
from hstu_xd.plugins.gr.research.settings import UpstreamSettings, bound_arguments, encoder_settings

_logger = logging.getLogger(__name__)

STORE_PREFIX = "xd:"
_MODULES = ("SASRec", "HSTU", "HSTU_XD")


def with_stores(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``get_reco_dataset`` that opens ``xd:<prepared folder>`` too, knows the domains and seeds."""

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
    """``get_sequential_encoder`` that also builds ``main_module = "HSTU_XD"``."""

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
            ours = load_hstu(model, read_upstream_checkpoint(Path(checkpoint)))
            _logger.info("warm start from %s; new parameters: %s", checkpoint, ours)
        return model

    return xd_get_sequential_encoder


def read_upstream_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The model's state dict out of a checkpoint that upstream's trainer wrote.

    Raises:
        InputError: no such file, or not one of upstream's.
    """
    if not path.is_file():
        raise InputError(
            f"checkpoint {path}: no such file; give one out of upstream's ckpts folder"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint["model_state_dict"]
    except Exception as error:  # torch.load fails in as many ways as there are formats
        raise InputError(
            f"{path}: not a checkpoint of generative-recommenders ({error}); give a file out of "
            "its ckpts folder"
        ) from error


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
    num_items = embedding_module._item_emb.num_embeddings
    return HSTU_XD(
        catalog=SESSION.new_catalog() if known else DomainCatalog(torch.zeros(num_items), ["all"]),
        settings=settings,
        attn_dropout_rate=bound_arguments(hstu_encoder)["attn_dropout_rate"],
        embedding_module=embedding_module,
        max_sequence_len=max_sequence_len,
        max_output_len=max_output_len,
        **modules,
    )
