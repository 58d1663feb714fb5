"""Train a ranker on requests into a run folder, and measure it on candidates that all share."""

import json
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet, read_manifest
from hstu_xd.data.store import InteractionStore, is_store
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.ranking import (
    ScoredRows,
    Values,
    defined,
    grouped_auc,
    grouped_ranking_metrics,
)
from hstu_xd.files import locked_folder
from hstu_xd.ranking.batches import RequestBatch, RequestData
from hstu_xd.ranking.histories import HistoryIndex
from hstu_xd.ranking.model import Ranker
from hstu_xd.ranking.settings import RankingSettings
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint, load_weights, save_checkpoint
from hstu_xd.training.metrics_log import MetricsLog
from hstu_xd.version import __version__

CONFIG_FILE, RUN_FILE, SUMMARY_FILE = "config.gin", "rank.json", "summary.json"
USERS_FILE = "test_users.json"
_QUARTERS = tuple(f"history {name}" for name in ("shortest", "short", "long", "longest"))
_EVAL_REQUESTS = 256


def train(data: Path, settings: RankingSettings, out: Path) -> dict[str, Any]:
    """Train one ranker into a run folder.

    Args:
        data: requests, written by ``hstu-xd requests``.
        settings: of :func:`hstu_xd.ranking.settings.load_ranking_settings`.
        out: the run folder; new.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        InputError: ``out`` exists, or there are no requests of the store they name.
        HstuXdError: the loss became not finite.
    """
    if is_store(data):
        raise InputError(
            f"{data} is a store; make requests of it with hstu-xd requests --data {data} --out DIR "
            "and give DIR"
        )
    store = InteractionStore.open(Path(read_manifest(data)["data"]))
    requests = RequestSet.open(data, store)
    if out.exists():
        raise InputError(f"{out} exists; give another --out")
    with locked_folder(out, "trains into"):
        trainer = RankTrainer(store, requests, settings, out)
        facts = {
            "version": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "requests": str(data.resolve()),
            "requests_hash": requests.manifest["hash"],
            "goals": list(requests.goal_names),
            "parameters": trainer.parameters,
            **{name: asdict(getattr(settings, name)) for name in ("search", "interest", "rank")},
        }
        (out / CONFIG_FILE).write_text(settings.to_gin())
        (out / RUN_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        return trainer.fit()


class RankTrainer:
    """Trains and measures one ranker.

    Args:
        store: the log.
        requests: of it.
        settings: all of the run.
        out: the run folder.
    """

    def __init__(
        self, store: InteractionStore, requests: RequestSet, settings: RankingSettings, out: Path
    ) -> None:
        self._settings, self._out, self._requests = settings, out, requests
        rank = settings.rank
        index = HistoryIndex(store)
        self._data = RequestData(index, requests, settings)
        torch.manual_seed(rank.random_seed)
        before_cut = np.asarray(store.timestamps) < requests.manifest["cuts"]["valid_from"]
        trained = np.bincount(store.item_ids[before_cut], minlength=store.num_items + 1)
        self._model = Ranker(
            index.paths,
            index.level_names,
            trained >= rank.min_item_count,
            len(requests.goal_names),
            self._data.counts_width,
            settings,
        )
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._groupings = _groupings(store, requests, index, self._data, trained)
        tables = self._model.tables()
        in_tables = set(map(id, tables))
        rest = [p for p in self._model.parameters() if id(p) not in in_tables]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": tables, "lr": rank.table_learning_rate, "weight_decay": 0.0},
                {"params": rest, "lr": rank.learning_rate, "weight_decay": rank.weight_decay},
            ],
            fused=True,
        )

    def fit(self) -> dict[str, Any]:
        """Train, keep the epoch that validation picks, and read the test split once."""
        rank, log = self._settings.rank, MetricsLog(self._out, enabled=True)
        best, best_epoch, seconds, steps, rows, epoch = None, -1, 0.0, 0, 0, 0
        for epoch in range(rank.num_epochs):
            began = time.perf_counter()
            loss, taken, read = self._train_epoch(epoch)
            seconds, steps, rows = seconds + time.perf_counter() - began, steps + taken, rows + read
            log.write(Split.TRAIN, epoch, steps, {"loss": loss})
            values = self.evaluate(Split.VALID)
            log.write(Split.VALID, epoch, steps, defined(values))
            found = values[rank.select_metric]
            if found is None:
                raise InputError(
                    f"xd_rank.select_metric = {rank.select_metric!r} is not defined on the "
                    "validation requests: no user there has candidates of both classes; take "
                    "another, or make more requests"
                )
            if best is None or found > best:
                best, best_epoch = found, epoch
                save_checkpoint(self._out / MODEL_FILE, self._model.state_dict(), {"epoch": epoch})
            elif epoch - best_epoch >= rank.early_stop_patience:
                break
        weights, _ = load_checkpoint(self._out / MODEL_FILE)
        load_weights(self._model, weights, self._out / MODEL_FILE)
        valid, test = self.evaluate(Split.VALID), self.evaluate(Split.TEST, keep=True)
        log.write(Split.TEST, best_epoch, steps, defined(test))
        log.close()
        summary = {
            "best_epoch": best_epoch,
            "epochs": epoch + 1,
            "valid": valid,
            "test": test,
            "seconds_per_step": seconds / max(1, steps),
            "candidates_per_second": rows / max(1e-9, seconds),
            "parameters": self.parameters,
            "requests_hash": self._requests.manifest["hash"],
            "seed": rank.random_seed,
        }
        _write_whole(self._out / SUMMARY_FILE, summary)
        return summary

    def _train_epoch(self, epoch: int) -> tuple[float, int, int]:
        """Pass over the training requests; return the mean loss, the steps and the rows."""
        rank, total, rows, steps = self._settings.rank, 0.0, 0, 0
        self._model.train()
        order = np.random.default_rng([rank.random_seed, epoch])
        chosen = order.permutation(self._requests.of_split(Split.TRAIN))
        for first in range(0, len(chosen), rank.batch_requests):
            batch = self._data.batch(chosen[first : first + rank.batch_requests])
            loss = binary_loss(self._model(batch), batch)
            self._optimizer.zero_grad(set_to_none=True)
            (loss / batch.mask.sum()).backward()
            self._optimizer.step()
            total, rows, steps = total + loss.item(), rows + int(batch.mask.sum()), steps + 1
        if not np.isfinite(total):
            raise HstuXdError(
                f"the loss is not finite in epoch {epoch}; lower xd_rank.learning_rate "
                f"({rank.learning_rate}) and xd_rank.table_learning_rate "
                f"({rank.table_learning_rate}) and train again"
            )
        return total / max(1, rows), steps, rows

    def evaluate(self, split: Split, *, keep: bool = False) -> Values:
        """Measure a split.

        Args:
            split: which requests.
            keep: write the users' own AUC, for paired comparisons of runs.
        """
        chosen = self._requests.of_split(split)
        places = self._requests.rows(chosen)
        counts = np.diff(self._requests.offsets)[chosen]
        scored = ScoredRows(
            self.scores(chosen),
            self._requests.labels[places],
            np.repeat(chosen, counts),
            self._data.asked.users[places],
        )
        if keep:
            users, aucs, rows = grouped_auc(scored.scores, scored.labels, scored.users)
            each = {"users": users.tolist(), "auc": aucs.tolist(), "rows": rows.tolist()}
            _write_whole(self._out / USERS_FILE, each)
        groups = [(names, of_row[places]) for names, of_row in self._groupings]
        return grouped_ranking_metrics(scored, groups)

    @torch.no_grad()
    def scores(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the chance of every candidate of some requests, in their order."""
        self._model.eval()
        found = []
        for first in range(0, len(chosen), _EVAL_REQUESTS):
            batch = self._data.batch(chosen[first : first + _EVAL_REQUESTS])
            found.append(self._model(batch)[batch.mask].double().sigmoid().numpy())
        return np.concatenate(found)


def binary_loss(logits: Tensor, batch: RequestBatch) -> Tensor:
    """Sum the binary cross-entropy of all candidates, each for the goal of its request."""
    return nn.functional.binary_cross_entropy_with_logits(
        logits[batch.mask], batch.labels[batch.mask], reduction="sum"
    )


def _groupings(
    store: InteractionStore,
    requests: RequestSet,
    index: HistoryIndex,
    data: RequestData,
    trained: NDArray[np.int64],
) -> list[tuple[tuple[str, ...], NDArray[np.int64]]]:
    """Name the groups of candidates that are measured apart, with the group of each candidate.

    These are the goal, the candidate's domain, the quarter of the history's length (quarters of the
    training requests), and items that no training event has.
    """
    counts = np.diff(requests.offsets)
    request = np.repeat(np.arange(len(counts)), counts)
    domains = store.catalog.item_domains.numpy(force=True)[requests.candidates]
    lengths = index.lengths(data.asked)
    training = requests.splits[request] == 0
    cuts = np.quantile(lengths[training], (0.25, 0.5, 0.75))
    unseen = np.where(trained[requests.candidates] == 0, 0, -1)
    return [
        (requests.goal_names, requests.goals[request]),
        (tuple(store.domain_names), domains.astype(np.int64)),
        (_QUARTERS, np.searchsorted(cuts, lengths, side="right")),
        (("unseen",), unseen),
    ]


def _write_whole(file: Path, values: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(file)
