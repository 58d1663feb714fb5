"""The training of a ranker. Epochs draw their order from their number, so that a run resumes to the
same numbers as one that was never stopped.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_xd.data.batches import Split
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.metrics import check_group_is_there
from hstu_xd.evaluation.ranking import defined
from hstu_xd.ranking.task import RankingTask
from hstu_xd.training.checkpoint import (
    MODEL_FILE,
    load_checkpoint,
    load_state,
    load_weights,
    save_checkpoint,
    save_state,
)
from hstu_xd.training.epochs import EpochProgress, EpochTraining
from hstu_xd.training.interruption import stop_requests
from hstu_xd.training.metrics_log import MetricsLog
from hstu_xd.training.optimization import AdamW

# Steps after which a run that is killed goes on from there.
_SAVE_EVERY = 500


@dataclass
class RankingProgress(EpochProgress):
    """Where the training of a ranker stands, by requests and candidates."""

    requests_in_epoch: int = 0
    loss_candidates: int = 0
    train_candidates: int = 0


class RankTrainer(EpochTraining[RankingProgress]):
    """Trains and measures one ranker.

    Args:
        task: what it is trained on and measured by, and its settings.
        run: the run folder.
        announce: called with a line after every epoch.

    Attributes:
        task: as given.
        model: as it stands.
        progress: of the training.
    """

    def __init__(
        self,
        task: RankingTask,
        run: Path,
        announce: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.task, self._run, self._announce = task, run, announce
        self._rank = rank = task.settings.rank
        torch.manual_seed(rank.random_seed)
        self.model = task.new_model()
        tables = self.model.tables()
        in_tables = set(map(id, tables))
        rest = [p for p in self.model.parameters() if id(p) not in in_tables]
        self._optimizer = AdamW(
            [
                {"params": tables, "lr": rank.table_learning_rate, "weight_decay": 0.0},
                {"params": rest, "lr": rank.learning_rate, "weight_decay": rank.weight_decay},
            ],
            fused=True,
        )
        log = MetricsLog(run, enabled=True)
        super().__init__(RankingProgress(), log, rank.num_epochs, rank.early_stop_patience)

    def resume(self) -> None:
        """Continue from the run's last checkpoint; without one yet, begin again."""
        if (stored := load_state(self._run, self.model, self._optimizer)) is not None:
            self.progress = RankingProgress(**stored[0])
        self._log.rewind(self.progress.metrics_bytes, self.progress.step)

    def fit(self, *, read_test: bool = True) -> dict[str, Any]:
        """Train, keep the epoch that validation picks, and read the test split once.

        Args:
            read_test: measure the picked epoch on the test split, too.

        Raises:
            Interrupted: a signal asked to stop; :meth:`resume` goes on there.
            HstuXdError: the loss became not finite.
            InputError: the metric that picks the epoch is not defined.
        """
        with stop_requests(self._request), self._log:
            self._train_epochs()
            return self._summarise(read_test=read_test)

    def check_group(self) -> None:
        """Refuse to pick epochs by a group of candidates that validation has none of.

        Raises:
            InputError: it has none.
        """
        name = self._rank.select_metric
        if "[" in name:
            found = list(self.task.measure(self.model, Split.VALID))
            check_group_is_there("xd_rank.select_metric", name, found, "validation candidates")

    def _train_epoch(self) -> None:
        progress = self.progress
        self.model.train()
        for chosen in self.batches(progress.epoch, done=progress.requests_in_epoch):
            if self._request.signal:
                self._stop(self._request.signal)
            self._step(chosen)
            if progress.step % _SAVE_EVERY == 0:
                self._save()

    def batches(self, epoch: int, *, done: int = 0) -> list[NDArray[np.int64]]:
        """Return the numbers of the requests of each batch of an epoch, in the epoch's own order.

        Args:
            epoch: counted from 0.
            done: requests at the beginning of that order, which are left out.
        """
        order = np.random.default_rng([self._rank.random_seed, epoch])
        chosen = order.permutation(self.task.requests.of_split(Split.TRAIN))
        size = self._rank.batch_requests
        return [chosen[i : i + size] for i in range(done, len(chosen), size)]

    def step(self, chosen: NDArray[np.int64], mark: Callable[[str], object]) -> None:
        """Take one optimiser step on a batch.

        Args:
            chosen: numbers of training requests.
            mark: called with the name of each phase that is over, but for the last one.
        """
        self._step(chosen, mark)

    def _step(
        self, chosen: NDArray[np.int64], mark: Callable[[str], object] = lambda phase: None
    ) -> None:
        began, progress = time.perf_counter(), self.progress
        batch = self.task.data.batch(chosen)
        mark("batch")
        # What is dropped follows from the step, as the order does from the epoch.
        torch.manual_seed((self._rank.random_seed + progress.step) % 2**64)
        loss, candidates = self.model.loss(batch), int(batch.mask.sum())
        mark("forward")
        self._optimizer.zero_grad(set_to_none=True)
        (loss / candidates).backward()
        mark("backward")
        self._optimizer.step()
        progress.loss_sum += loss.item()
        progress.loss_candidates += candidates
        progress.train_candidates += candidates
        progress.requests_in_epoch += len(chosen)
        progress.step += 1
        progress.train_seconds += time.perf_counter() - began

    def _finish_epoch(self, began: float) -> None:
        progress, rank = self.progress, self._rank
        self._check_finite()
        loss = progress.loss_sum / max(1, progress.loss_candidates)
        self._log.write(Split.TRAIN, progress.epoch, progress.step, {"loss": loss})
        values = self.task.measure(self.model, Split.VALID)
        self._log.write(Split.VALID, progress.epoch, progress.step, defined(values))
        found = values[rank.select_metric]
        if found is None:
            raise InputError(
                f"xd_rank.select_metric = {rank.select_metric!r} is not defined on the "
                "validation requests: no user there has candidates of both classes; take "
                "another, or make more requests"
            )
        if self._is_best(found):
            epoch = {"epoch": progress.epoch}
            save_checkpoint(self._run / MODEL_FILE, self.model.state_dict(), epoch)
        told = (
            f"epoch {progress.epoch}: loss {loss:.4f}, valid {rank.select_metric} {found:.4f} "
            f"({self._best_told}), {time.perf_counter() - began:,.1f} s"
        )
        progress.epoch, progress.requests_in_epoch = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_candidates = 0.0, 0
        # Only here: rows of an epoch that is not finished come again.
        progress.metrics_bytes = self._log.size()
        self._save()
        self._announce(told)

    def _check_finite(self) -> None:
        rank = self._rank
        if not np.isfinite(self.progress.loss_sum):
            raise HstuXdError(
                f"the loss is not finite in epoch {self.progress.epoch}; lower "
                f"xd_rank.learning_rate ({rank.learning_rate}) and xd_rank.table_learning_rate "
                f"({rank.table_learning_rate}) and train again"
            )

    def _save(self) -> None:
        self._check_finite()
        save_state(self._run, self.model, self._optimizer, asdict(self.progress))

    def _summarise(self, *, read_test: bool) -> dict[str, Any]:
        weights, metadata = load_checkpoint(self._run / MODEL_FILE)
        load_weights(self.model, weights, self._run / MODEL_FILE)
        measured, progress = {"valid": self.task.measure(self.model, Split.VALID)}, self.progress
        if read_test:
            measured["test"] = self.task.measure(self.model, Split.TEST)
            self._log.write(Split.TEST, metadata["epoch"], progress.step, defined(measured["test"]))
        summary = {
            "best_epoch": metadata["epoch"],
            "epochs": progress.epoch,
            **measured,
            "seconds_per_step": progress.train_seconds / max(1, progress.step),
            "candidates_per_second": progress.train_candidates / max(1e-9, progress.train_seconds),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "requests_hash": self.task.requests.manifest["hash"],
            "seed": self._rank.random_seed,
        }
        self._log.finish(summary)
        return summary
