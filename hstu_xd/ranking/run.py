"""Ranking runs: make one by training on requests, continue one, load the ranker of one."""

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.requests import RequestSet, read_manifest
from hstu_xd.data.store import InteractionStore, is_store
from hstu_xd.data.store_files import ITEM_LEVELS
from hstu_xd.errors import InputError, Interrupted, did_you_mean
from hstu_xd.evaluation.protocol import RANKING
from hstu_xd.ranking.histories import Levels
from hstu_xd.ranking.model import RankingModel
from hstu_xd.ranking.settings import RankingSettings, load_ranking_settings, variant_name
from hstu_xd.ranking.task import RankingTask, model_of, training_events
from hstu_xd.ranking.trainer import RankTrainer
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint, load_weights
from hstu_xd.training.distributed import World, world
from hstu_xd.training.run_facts import (
    CONFIG_FILE,
    TRAINED_FILE,
    facts_of_data,
    facts_of_start,
    held_folder,
    open_data,
    read_run_of,
    still_holds,
    write_facts,
)
from hstu_xd.training.trackers import check_trackers, choose_trackers

_logger = logging.getLogger(__name__)


def train(
    data: Path,
    settings: RankingSettings | None,
    out: Path,
    *,
    name: str | None = None,
    resume: bool = False,
    read_test: bool = True,
    announce: Callable[[str], object] = lambda line: None,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train one ranker into a run folder.

    Args:
        data: requests, written by ``hstu-xd requests``.
        settings: of :func:`hstu_xd.ranking.settings.load_ranking_settings`; None: the defaults, or
            those of the run that is resumed.
        out: the run folder; new, unless ``resume``.
        name: what tables call the run; default: its model.
        resume: continue ``out`` with its own settings where it stopped; where ``settings`` are
            given and differ, a warning says so.
        read_test: measure the best epoch on the test split, too.
        announce: called with a line after every epoch.
        trackers: names out of :data:`hstu_xd.training.trackers.TRACKERS`; none: TensorBoard, or
            those that the run has.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        InputError: ``out`` exists (or does not, to resume), belongs to other requests, or another
            process trains into it; or there are no requests of the store they name; or a tracker is
            not installed.
        HstuXdError: the loss became not finite.
        Interrupted: Ctrl-C or a signal asked to stop; the message says how to go on.
    """
    check_trackers(trackers)
    with world() as here:
        if here.size > 1:
            raise InputError(
                f"rank trains in one process, and {here.size} were started; start it without "
                "torchrun"
            )
        store, requests = _opened(data)
        with held_folder(out, here, RANKING, resume=resume):
            if resume:
                settings = _settings_to_resume(out, data, requests, settings)
            settings = settings or RankingSettings()
            before = requests.manifest["cuts"]["valid_from"]
            trained = training_events(store, before)
            trainer = RankTrainer(RankingTask(store, requests, settings, trained), out, announce)
            if resume:
                trainer.resume()
            else:
                trainer.check_group()
                np.save(out / TRAINED_FILE, trained)
                _lay_out(out, data, trainer, name or variant_name(settings), here)
            if trackers:
                choose_trackers(out, trackers)
            try:
                return trainer.fit(read_test=read_test)
            except Interrupted as stopped:
                words = ["rank", "--data", str(data), "--out", str(out), "--resume"]
                words += [] if read_test else ["--skip-test"]
                message = f"{stopped}; go on with: hstu-xd {shlex.join(words)}"
                raise Interrupted(message, stopped.signal) from None


def _opened(
    data: Path, store: InteractionStore | None = None
) -> tuple[InteractionStore, RequestSet]:
    """Open requests and the store that they were made of."""
    if is_store(data):
        raise InputError(
            f"{data} is a store; make requests of it with hstu-xd requests --data {data} --out DIR "
            "and give DIR"
        )
    store = store or InteractionStore.open(Path(read_manifest(data)["data"]))
    return store, RequestSet.open(data, store)


def _lay_out(out: Path, data: Path, trainer: RankTrainer, name: str, here: World) -> None:
    """Write what a run is; run.json comes last."""
    task = trainer.task
    settings, manifest = task.settings, task.requests.manifest
    (out / CONFIG_FILE).write_text(settings.to_gin())
    facts = {
        "kind": RANKING,
        **facts_of_start(here),
        **facts_of_data(task.store),
        "variant_name": name,
        "seed": settings.rank.random_seed,
        "requests": str(data.resolve()),
        "requests_hash": manifest["hash"],
        "trained_before": manifest["cuts"]["valid_from"],
        "goals": list(task.requests.goal_names),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **settings.facts(),
    }
    write_facts(out, facts)


def _settings_to_resume(
    out: Path, data: Path, requests: RequestSet, given: RankingSettings | None
) -> RankingSettings:
    facts = read_run_of(RANKING, out)
    if facts["requests_hash"] != requests.manifest["hash"]:
        raise InputError(
            f"{out} was trained on other requests than {data} (hashes differ); resume it with "
            f"--data {facts['requests']}, or give a new --out"
        )
    own = load_ranking_settings([out / CONFIG_FILE])
    if given is not None and (unlike := given.unlike(own)):
        _logger.warning("%s goes on with its own settings: %s", out, "; ".join(unlike))
    return own


@dataclass(frozen=True, eq=False)
class TrainedRanker:
    """A ranking run, ready to be measured.

    Attributes:
        task: requests and how they are measured.
        model: the best one, in evaluation mode.
    """

    task: RankingTask
    model: RankingModel


def load_ranker(run: Path, data: Path | None = None, *, verify: bool = False) -> TrainedRanker:
    """Load the best ranker of a run with requests to measure it by.

    Args:
        run: a folder written by ``hstu-xd rank``.
        data: requests for the same goals, of the run's store or of one with the same items; None:
            the run's own.
        verify: compare the hash of every file of the store with its manifest first.

    Raises:
        InputError: not a ranking run, its requests or their store are not what they were, or those
            that are given do not fit.
    """
    facts, settings = read_run_of(RANKING, run), load_ranking_settings([run / CONFIG_FILE])
    folder = data or Path(facts["requests"])
    place = Path(read_manifest(folder)["data"]) if data else None
    store = open_store(run, place, verify=verify, as_trained=True)
    store, requests = _opened(folder, store)
    if list(requests.goal_names) != facts["goals"]:
        raise InputError(
            f"{folder} has the goals {', '.join(requests.goal_names)}, {run} was trained for "
            f"{', '.join(facts['goals'])}; make the requests with the --goal of the run"
        )
    if requests.manifest["hash"] != facts["requests_hash"]:
        if data is None:
            raise InputError(
                f"{folder} was made again since {run} was trained on it; make the old requests "
                f"again, or add --data {folder} to take them as they are now"
            )
        _logger.warning("%s has other requests than those that %s was trained on", folder, run)
    task = RankingTask(store, requests, settings, trained_items(run, store))
    return TrainedRanker(task, with_weights(task.new_model(), run))


@dataclass(frozen=True, eq=False)
class ServedRanker:
    """The best ranker of a run with all that a request is translated and read by.

    Attributes:
        model: in evaluation mode.
        settings: of the run.
        levels: at which events match candidates.
        catalog: names of items.
        goals: names, in the model's order.
    """

    model: RankingModel
    settings: RankingSettings
    levels: Levels
    catalog: DomainCatalog
    goals: tuple[str, ...]

    @classmethod
    def of(cls, run: Path, store: InteractionStore) -> "ServedRanker":
        """Load that of a run.

        Args:
            run: a folder written by ``hstu-xd rank``.
            store: see :func:`open_store`.

        Raises:
            InputError: not a ranking run, or its weights are not of these items.
        """
        facts, settings = read_run_of(RANKING, run), load_ranking_settings([run / CONFIG_FILE])
        levels, goals = Levels.of(store), tuple(facts["goals"])
        model = model_of(levels, trained_items(run, store), len(goals), settings)
        return cls(with_weights(model, run), settings, levels, store.catalog, goals)

    def goal(self, name: str | None) -> int:
        """Return the number of a goal; None names the only one.

        Raises:
            InputError: an unknown goal, or none is named where there are several.
        """
        if name is None and len(self.goals) == 1:
            return 0
        if name not in self.goals:
            told = "no goal is named" if name is None else f"unknown goal {name!r}"
            hint = "" if name is None else did_you_mean(name, self.goals)
            raise InputError(f"{told}; the model has {', '.join(self.goals)}{hint}")
        return self.goals.index(name)


def trained_items(run: Path, store: InteractionStore) -> NDArray[np.int64]:
    """Return how many training events every item id has: (I + 1,) int64.

    They are of the log that the run was trained on, whatever the histories are that it reads now:
    what has a vector of its own follows from them.

    Args:
        run: the run folder.
        store: with the items of the run; it is counted where an older run does not say so and the
            run's own log is no more.

    Raises:
        InputError: the file that says so is damaged.
    """
    facts, file = read_run_of(RANKING, run), run / TRAINED_FILE
    if file.is_file():
        try:
            trained = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: cannot be read as an array; restore the file") from error
        if trained.shape == (store.num_items + 1,) and trained.dtype == np.int64:
            return trained
        raise InputError(
            f"{file}: {trained.dtype} of shape {trained.shape}; int64 of shape "
            f"({store.num_items + 1},) belongs there; restore the file"
        )
    own = Path(facts["data"])
    if still_holds(own, facts):
        store = InteractionStore.open(own)
    else:
        _logger.warning(
            "%s does not say which items it was trained on, and %s no longer holds its log: they "
            "are counted in %s; where those are others, chances are wrong",
            *(run, own, store.path),
        )
    return training_events(store, facts["trained_before"])


def open_store(
    run: Path, data: Path | None = None, *, verify: bool = False, as_trained: bool = False
) -> InteractionStore:
    """Open the store of a ranking run, or another one with the same items and levels.

    Args:
        run: the run folder.
        data, verify, as_trained: as :func:`hstu_xd.training.run_facts.open_data` takes them.

    Raises:
        InputError: as there, or its items have other levels.
    """
    facts = read_run_of(RANKING, run)
    store = open_data(run, data, verify=verify, as_trained=as_trained)
    if store.manifest["hashes"].get(ITEM_LEVELS) != facts["data_hashes"].get(ITEM_LEVELS):
        raise InputError(
            f"{store.path}: its items have other levels than those that {run} was trained with; "
            "prepare it with the same --item-features and --levels"
        )
    return store


def with_weights(model: RankingModel, run: Path) -> RankingModel:
    """Give a new model the best weights of a run, in evaluation mode.

    Raises:
        InputError: the weights are not of this model.
    """
    weights, _ = load_checkpoint(run / MODEL_FILE)
    load_weights(model, weights, run / MODEL_FILE)
    return model.eval()
