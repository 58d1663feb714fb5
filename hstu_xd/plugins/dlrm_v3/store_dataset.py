"""A prepared store as a data set of upstream's trainer: features, tables, whole batches."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generative_recommenders.dlrm_v3.datasets.dataset import Dataset, Samples
from generative_recommenders.modules.multitask_module import MultitaskTaskType, TaskConfig
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_xd.data.requests import RequestSet, is_requests, read_manifest
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3.given_requests import GivenRequests
from hstu_xd.plugins.dlrm_v3.requests import RequestBatch, StoreRequests
from hstu_xd.plugins.dlrm_v3.settings import GOAL, DlrmSettings, bound_search
from hstu_xd.ranking.settings import SearchSettings

# Upstream compares the first one by identity: every mention has to be this object.
ITEM, CANDIDATE = "item_id", "item_candidate_id"
TIME, QUERY_TIME = "action_time", "item_query_time"
WEIGHT, LABEL = "action_weight", "item_action_weight"
USER = "user_id"
TASK = "next_item"


def open_requests(folder: Path, settings: DlrmSettings) -> StoreRequests | GivenRequests:
    """Open a prepared store, or requests made of one, once in a process.

    Raises:
        InputError: nothing of both there, no request in it, cuts that do not cut the log, or
            settings of the other of both.
    """
    return _opened(folder, settings, bound_search())


@cache
def _opened(
    folder: Path, settings: DlrmSettings, search: SearchSettings
) -> StoreRequests | GivenRequests:
    if is_requests(folder):
        return _opened_given(folder, settings, search)
    if search != SearchSettings():
        raise InputError(
            f"{folder}: a store without requests is read without a search; remove the bindings of "
            "xd_search.*, or name a folder of hstu-xd requests"
        )
    store = InteractionStore.open(folder)
    return StoreRequests(
        store,
        split=settings.split,
        max_history=settings.max_history,
        cut_points=settings.cut_points,
        num_candidates=settings.num_candidates,
        seed=settings.seed,
        cuts=settings.cuts(store),
    )


def _opened_given(folder: Path, settings: DlrmSettings, search: SearchSettings) -> GivenRequests:
    for name in ("valid_from", "ranked_requests"):
        value = getattr(settings, name)
        if value:
            raise InputError(
                f"xd_dlrm.{name} = {value!r}: {folder} holds requests with splits "
                "and candidates of their own; remove the binding"
            )
    store = InteractionStore.open(Path(read_manifest(folder)["data"]))
    return GivenRequests(
        store,
        RequestSet.open(folder, store),
        split=settings.split,
        max_history=settings.max_history,
        search=search,
    )


def configure(
    config: Any, settings: DlrmSettings, *, num_goals: int = 1, max_candidates: int = 0
) -> Any:
    """Return a DlrmHSTUConfig with our sizes, and the features of a store in the place of its own.

    Args:
        config: upstream's.
        settings: of ``xd_dlrm.*``.
        num_goals: that requests are made for.
        max_candidates: of a request; 0: as many as the settings say.
    """
    max_candidates = max_candidates or settings.num_candidates
    history, candidates = _features(settings, has_goals=num_goals > 1)
    context = dict.fromkeys(_context(settings, has_goals=num_goals > 1), 1)
    pairs = [(ITEM, CANDIDATE), (TIME, QUERY_TIME), (WEIGHT, LABEL)]
    embedded = [(ITEM, CANDIDATE)]
    if settings.domain_as_feature:
        of_history, of_candidates = settings.domain_features
        pairs.append((of_history, of_candidates))
        embedded.append((of_history, of_candidates))
    return dataclasses.replace(
        dataclasses.replace(config, **settings.sizes),
        max_seq_len=settings.max_history + max_candidates + len(context),
        max_num_candidates=max_candidates,
        contextual_feature_to_max_length=context,
        contextual_feature_to_min_uih_length={},
        candidates_weight_feature_name=LABEL,
        # No task reads it; upstream looks it up all the same.
        candidates_watchtime_feature_name=LABEL,
        candidates_querytime_feature_name=QUERY_TIME,
        multitask_configs=[TaskConfig(TASK, 1, MultitaskTaskType.BINARY_CLASSIFICATION)],
        user_embedding_feature_names=[*(first for first, _ in embedded), *context],
        item_embedding_feature_names=[second for _, second in embedded],
        uih_post_id_feature_name=ITEM,
        uih_action_time_feature_name=TIME,
        uih_weight_feature_name=WEIGHT,
        hstu_uih_feature_names=history,
        hstu_candidate_feature_names=candidates,
        merge_uih_candidate_feature_mapping=pairs,
        action_weights=[1 << goal for goal in range(num_goals)],
    )


def tables(
    store: InteractionStore, settings: DlrmSettings, width: int, *, num_goals: int = 1
) -> dict[str, Any]:
    """Return the embedding tables: items, and users, goals and domains where they are features."""
    wanted = {ITEM: (store.num_items + 1, [ITEM, CANDIDATE])}
    if settings.user_token:
        wanted[USER] = (store.num_users, [USER])
    if num_goals > 1:
        wanted[GOAL] = (num_goals, [GOAL])
    if settings.domain_as_feature:
        wanted["domain"] = (store.num_domains, list(settings.domain_features))
    return {
        name: EmbeddingConfig(
            num_embeddings=rows, embedding_dim=width, name=name, feature_names=features
        )
        for name, (rows, features) in wanted.items()
    }


def _context(settings: DlrmSettings, *, has_goals: bool) -> list[str]:
    return [*([USER] if settings.user_token else []), *([GOAL] if has_goals else [])]


def _features(settings: DlrmSettings, *, has_goals: bool) -> tuple[list[str], list[str]]:
    of_history, of_candidates = settings.domain_features
    history = [*_context(settings, has_goals=has_goals), ITEM, TIME, WEIGHT, of_history]
    return history, [CANDIDATE, QUERY_TIME, LABEL, of_candidates]


class StoreDataset(Dataset):
    """Requests of a prepared store, as upstream's trainer reads data sets.

    Args:
        hstu_config: of the model.
        requests: what is read; an attribute, too.
        settings: of ``xd_dlrm.*``.
        is_inference, embedding_config: upstream's; not read.
    """

    def __init__(
        self,
        hstu_config: Any,
        requests: StoreRequests | GivenRequests,
        settings: DlrmSettings,
        is_inference: bool = False,
        embedding_config: Any = None,
    ) -> None:
        super().__init__(hstu_config=hstu_config)
        self.requests = requests
        self._settings = settings

    def get_item_count(self) -> int:
        """Return the number of requests, those of evaluation included."""
        return len(self.requests)

    def load_query_samples(self, sample_list: list[int]) -> None:
        """Do nothing: the store is mapped from disk."""

    def unload_query_samples(self, sample_list: list[int]) -> None:
        """Do nothing: the store is mapped from disk."""

    def get_sample(self, id: int) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
        """Return the features of one request's history and candidates."""
        samples = self.get_samples([id])
        return samples.uih_features_kjt, samples.candidates_features_kjt

    def get_samples(self, id_list: list[int]) -> Samples:
        """Return a batch of requests: what upstream's collate makes of them, without its loops."""
        return self.features(self.requests.batch(np.asarray(id_list)))

    def features(self, batch: RequestBatch) -> Samples:
        """Lay a batch out as the model's features."""
        return request_features(batch, self._settings)


def request_features(batch: RequestBatch, settings: DlrmSettings) -> Samples:
    """Lay a batch out as the model's features."""
    goals = batch.goals
    history, candidates = _features(settings, has_goals=goals is not None)
    context = [*([batch.users] if settings.user_token else []), *([] if goals is None else [goals])]
    lengths = [torch.ones_like(batch.users)] * len(context) + [batch.history_lengths] * 4
    values = [*context, batch.items, batch.times, batch.actions, batch.domains]
    of_candidates = [
        batch.candidates,
        batch.request_times,
        batch.labels,
        batch.candidate_domains,
    ]
    return Samples(
        _jagged(history, lengths, values),
        _jagged(candidates, [batch.candidate_lengths] * 4, of_candidates),
    )


def _jagged(keys: list[str], lengths: list[Tensor], values: list[Tensor]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=keys, lengths=torch.cat(lengths), values=torch.cat(values))
