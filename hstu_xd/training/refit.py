"""Train a run's model again on more: from its beginning, with its settings, for as many epochs.

Validation has picked the settings and the epoch, so its targets may train as well now; those of
test, too, where nothing is to be measured any more.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import NO_BASELINE
from hstu_xd.evaluation.protocol import RETRIEVAL, until_of
from hstu_xd.files import sha256_of
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.continuation import Predecessor
from hstu_xd.training.distributed import World
from hstu_xd.training.metrics_log import SUMMARY_FILE
from hstu_xd.training.run_facts import (
    TRAIN_UNTIL,
    data_changes,
    kind_of,
    read_run,
    refitted,
)
from hstu_xd.training.settings import RunSettings
from hstu_xd.training.stored_settings import stored_settings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refit:
    """A run that is trained again on more.

    Attributes:
        run: its folder.
        best_epoch: that validation picked there, counted from 0.
    """

    run: Path
    best_epoch: int

    @property
    def epochs(self) -> int:
        """How many epochs are trained: as many as the run's best one took."""
        return self.best_epoch + 1

    @classmethod
    def of(cls, run: Path) -> "Refit":
        """Take a run folder.

        Raises:
            InputError: not a run folder, or not of a run whose epoch validation has picked.
        """
        facts = read_run(run)
        if (kind := kind_of(facts)) != RETRIEVAL:
            raise InputError(f"{run} is a {kind} run; --refit knows runs of hstu-xd train alone")
        train = facts["train"]
        if (counted := train.get("baseline", NO_BASELINE)) != NO_BASELINE:
            raise InputError(
                f"{run} is the baseline {counted!r}, which counts and has no epochs; count more by "
                f"{TRAIN_UNTIL} = 'valid'"
            )
        until = until_of(facts)
        if until is not Split.TRAIN:
            of = refitted(facts)
            mend = f"the run that it is a refit of, {of}" if of else "one that was trained without"
            raise InputError(
                f"{run} was trained with {TRAIN_UNTIL} = {until.value!r}, so validation has picked "
                f"no epoch of it; refit {mend}"
            )
        if not (run / SUMMARY_FILE).is_file():
            raise InputError(
                f"{run} has no {SUMMARY_FILE} yet, so its best epoch is not known; finish it with "
                f"--out {run} --resume"
            )
        return cls(run, json.loads((run / SUMMARY_FILE).read_text())["best_epoch"])

    @classmethod
    def recorded_in(cls, facts: Mapping[str, Any]) -> "Refit | None":
        """Take what a run's run.json says it is a refit of, if it is one."""
        recorded = facts.get("refits")
        return recorded and cls(Path(recorded["run"]), recorded["best_epoch"])

    @property
    def data(self) -> Path:
        """Where the store of the run is.

        Raises:
            InputError: it is no more.
        """
        folder = Path(read_run(self.run)["data"])
        if not folder.is_dir():
            raise InputError(
                f"{folder}, the store of {self.run}, is not there; say by --data where it has moved"
            )
        return folder

    def check_data(self, store: InteractionStore) -> None:
        """Refuse other data than those on which the epoch was picked.

        Raises:
            InputError: the message says what differs.
        """
        facts = read_run(self.run)
        if not (changes := data_changes(facts, store)):
            return
        mend = f"give that one by --data, it was {facts['data']}"
        if store.path.resolve() == Path(facts["data"]):
            mend = "it was prepared again since: prepare the old log there again"
        raise InputError(
            f"{store.path} is not the store that {self.run} was trained on ({changes}); {mend}, or "
            "train a run on this one first"
        )

    @property
    def earlier(self) -> Predecessor | None:
        """What the run continues, if it does: its refit begins there again.

        Raises:
            InputError: the weights that it began with are no more.
        """
        facts = read_run(self.run)
        if (found := Predecessor.recorded_in(facts)) is None:
            return None
        file = found.run / MODEL_FILE
        if not file.is_file() or sha256_of(file) != facts["continues"]["weights"]:
            raise InputError(
                f"{self.run} continues {found.run}, which no longer holds the weights that it "
                "began with; put them back there, or refit a run that was trained from nothing"
            )
        return found

    def settings(self, until: Split, *, allow_imports: bool) -> RunSettings:
        """Return the run's own settings, with more to train on.

        Args:
            until: the last split whose targets train.
            allow_imports: import the modules that the run names beside this package.
        """
        stored = stored_settings(self.run, allow_imports=allow_imports)
        train = dataclasses.replace(stored.train, train_until=until.value)
        return dataclasses.replace(stored, train=train)

    def facts(self, here: World) -> dict[str, Any]:
        """Return what run.json says of it, and warn where steps cannot be those of the run.

        Args:
            here: the process that trains now.
        """
        before, processes = read_run(self.run).get("processes", 1), here.size
        if before != processes and here.is_main:
            _logger.warning(
                "%s was trained by %d process%s and is trained again by %d: a step takes other "
                "users than there",
                *(self.run, before, "" if before == 1 else "es", processes),
            )
        return {
            "run": str(self.run.resolve()),
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "weights": sha256_of(self.run / MODEL_FILE),
        }

    def name(self, until: Split) -> str:
        """Name it in tables after its run."""
        return until_name(read_run(self.run)["variant_name"], until)


def until_name(name: str, until: Split) -> str:
    """Add to the name of a run what it was trained on beside training targets."""
    return name if until is Split.TRAIN else f"{name} + until {until.value}"
