"""Runs of baselines: counted instead of trained, in folders that read as those of models do."""

import time
from pathlib import Path
from typing import Any

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.baselines import KINDS, Baseline
from hstu_xd.evaluation.ranks import evaluate
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint, save_checkpoint
from hstu_xd.training.distributed import World
from hstu_xd.training.epochs import Progress
from hstu_xd.training.extension import metrics_of
from hstu_xd.training.metrics_log import MetricsLog
from hstu_xd.training.settings import RunSettings


class BaselineTrainer:
    """Stands where :class:`hstu_xd.training.trainer.Trainer` does, and counts.

    Args:
        store: prepared interactions.
        settings: of the run; ``train.baseline`` names the baseline.
        run: the run folder.
        world: this process among the others; the first one does all the work.
    """

    def __init__(
        self, store: InteractionStore, settings: RunSettings, run: Path, world: World
    ) -> None:
        train = settings.train
        self.settings, self.run, self.world, self.progress = train, run, world, Progress()
        self.protocol = settings.protocol
        self._data = {
            split: self.protocol.sequences(
                store, split, train.window, domain=train.domain, until=train.until
            )
            for split in Split
        }
        kind, catalog = KINDS[train.baseline], store.catalog
        counted = kind.count(catalog, self._data[Split.TRAIN], train.recent_share)
        self._log = MetricsLog(run, enabled=world.is_main)
        self.model = kind(catalog, settings.encoder_settings(store.num_domains), counted).eval()

    @property
    def is_trained(self) -> bool:
        """Whether nothing is left to do, as far as a resumed run has to note it: never."""
        return False

    @property
    def users_per_step(self) -> int:
        """How many users are ranked at once."""
        return self.settings.eval_batch_size * self.world.size

    def resume(self, processes: int) -> None:
        """Begin again; what an interrupted run wrote is overwritten."""
        self._log.rewind(0, 0)

    def fit(self, *, read_test: bool = True) -> dict[str, Any]:
        """Evaluate and write the run's model, metrics and summary; returns the summary.

        Args:
            read_test: measure on the test split, too, unless it was counted.
        """
        with self._log:
            return self.world.from_main(lambda: self._write(read_test=read_test))

    def _write(self, *, read_test: bool) -> dict[str, Any]:
        began, metrics, values = time.perf_counter(), metrics_of(self.settings), {}
        for split in self.settings.until.measured(read_test=read_test):
            values[split.value] = evaluate(
                self.model,
                self._data[split],
                protocol=self.protocol,
                scorer=self.model.scorer,
                metrics=metrics,
                batch_size=self.settings.eval_batch_size,
            )
            self._log.write(split, 0, 0, values[split.value])
        save_checkpoint(self.run / MODEL_FILE, self.model.state_dict(), {"epoch": 0})
        summary = {
            **({"best_epoch": 0} if self.settings.until is Split.TRAIN else {}),
            "epochs": 0,
            **values,
            "seconds_per_step": 0.0,
            "events_per_second": 0.0,
            "seconds": time.perf_counter() - began,
            "parameters": 0,
            "seed": self.settings.random_seed,
        }
        self._log.finish(summary)
        return summary


def load_baseline(run: Path, settings: RunSettings, catalog: DomainCatalog) -> Baseline:
    """Load what a baseline's run has counted.

    Raises:
        InputError: no checkpoint there, or not a readable one.
    """
    counted, _ = load_checkpoint(run / MODEL_FILE)
    kind = KINDS[settings.train.baseline]
    return kind(catalog, settings.encoder_settings(catalog.num_domains), counted).eval()
