"""What rankers are trained on and measured by: requests of a store, in batches and in groups."""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_xd.data.batches import Split
from hstu_xd.data.requests import SPLITS, RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.ranking import (
    QUARTERS,
    UNSEEN,
    Grouping,
    ScoredRows,
    Values,
    grouped_ranking_metrics,
    history_group,
)
from hstu_xd.ranking.batches import RequestData
from hstu_xd.ranking.histories import HistoryIndex, Levels
from hstu_xd.ranking.model import Ranker, RankingModel
from hstu_xd.ranking.settings import RankingSettings
from hstu_xd.ranking.towers import TowerRanker

_EVAL_REQUESTS = 256


class RankingTask:
    """Requests of a store with all that a ranker needs to be trained on them and measured.

    Args:
        store: the log.
        requests: of it.
        settings: of the ranker.
        trained: (I + 1,) int64 number of every item id's events that train.

    Attributes:
        store, requests, settings: as given.
        data: makes batches of the requests.

    Raises:
        InputError: the settings name a level that the store does not have.
    """

    def __init__(
        self,
        store: InteractionStore,
        requests: RequestSet,
        settings: RankingSettings,
        trained: NDArray[np.int64],
    ) -> None:
        self.store, self.requests, self.settings = store, requests, settings
        self._index = HistoryIndex.of(store)
        self.data = RequestData(self._index, requests, settings)
        self._trained = trained

    def new_model(self) -> RankingModel:
        """Make a ranker of these items, levels and goals, with weights by torch's generator."""
        goals = len(self.requests.goal_names)
        return model_of(self._index.levels, self._trained, goals, self.settings)

    def measure(self, model: RankingModel, split: Split) -> Values:
        """Compute every metric of a split, of all its candidates and of groups of them."""
        return grouped_ranking_metrics(self.scored(model, split), self.groups(split))

    def scored(self, model: RankingModel, split: Split) -> ScoredRows:
        """Return the candidates of a split with the chances that a ranker gives them."""
        chosen = self.requests.of_split(split)
        places = self.requests.rows(chosen)
        counts = np.diff(self.requests.offsets)[chosen]
        return ScoredRows(
            self.scores(model, chosen),
            self.requests.labels[places],
            np.repeat(chosen, counts),
            self.data.asked.users[places],
        )

    @torch.no_grad()
    def scores(self, model: RankingModel, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the chance of every candidate of some requests, in their order."""
        model.eval()
        found = [np.empty(0)]
        for first in range(0, len(chosen), _EVAL_REQUESTS):
            batch = self.data.batch(chosen[first : first + _EVAL_REQUESTS])
            found.append(model(batch)[batch.mask].double().sigmoid().numpy())
        return np.concatenate(found)

    def groups(self, split: Split) -> list[Grouping]:
        """Name the groups of candidates that are measured apart, and place each of a split's.

        These are the goal, the candidate's domain, the quarter of the history's length (quarters of
        the training requests), and items that no training event has.
        """
        places = self.requests.rows(self.requests.of_split(split))
        return [(names, of_row[places]) for names, of_row in self._groups]

    @cached_property
    def _groups(self) -> list[Grouping]:
        requests = self.requests
        counts = np.diff(requests.offsets)
        request = np.repeat(np.arange(len(counts)), counts)
        domains = self.store.catalog.item_domains.numpy(force=True)[requests.candidates]
        lengths = self._index.lengths(self.data.asked)
        training = requests.splits[request] == SPLITS.index(Split.TRAIN)
        cuts = np.quantile(lengths[training], (0.25, 0.5, 0.75))
        unseen = np.where(self._trained[requests.candidates] == 0, 0, -1)
        return [
            (requests.goal_names, requests.goals[request]),
            (tuple(self.store.domain_names), domains.astype(np.int64)),
            (tuple(map(history_group, QUARTERS)), np.searchsorted(cuts, lengths, side="right")),
            ((UNSEEN,), unseen),
        ]


def model_of(
    levels: Levels, trained: NDArray[np.int64], goals: int, settings: RankingSettings
) -> RankingModel:
    """Make a ranker of a store's items and levels, with weights by torch's generator.

    Args:
        levels: of the store's items.
        trained: (I + 1,) number of every item id's events that train.
        goals: number of goals.
        settings: all of the run.
    """
    known = trained >= settings.rank.min_item_count
    if settings.interest.kind == "towers":
        return TowerRanker(levels, known, goals, settings)
    return Ranker(levels, known, goals, settings)


def training_events(store: InteractionStore, before: int) -> NDArray[np.int64]:
    """Count the events of every item id before a second: (I + 1,) int64."""
    chosen = store.item_ids[np.asarray(store.timestamps) < before]
    return np.bincount(chosen, minlength=store.num_items + 1)
