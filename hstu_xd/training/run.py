"""Run folders: make one by training, continue one, load the model of one."""

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window
from hstu_xd.declaration import labels
from hstu_xd.errors import InputError, Interrupted
from hstu_xd.evaluation.baselines import NO_BASELINE, Baseline
from hstu_xd.evaluation.metrics import Metrics
from hstu_xd.evaluation.protocol import RETRIEVAL, Protocol
from hstu_xd.model.featured_items import FeatureTable
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Objective, Scorer
from hstu_xd.ops.domain_attention.api import check_impl
from hstu_xd.training.baseline_runs import BaselineTrainer, load_baseline
from hstu_xd.training.checkpoint import MODEL_FILE, STATE_FILE, load_checkpoint, load_weights
from hstu_xd.training.continuation import (
    Continuation,
    Predecessor,
    check_continuable,
    continuation_of,
)
from hstu_xd.training.distributed import World, world
from hstu_xd.training.extension import metrics_of, objective_of
from hstu_xd.training.refit import Refit, until_name
from hstu_xd.training.run_facts import (
    RESUMED_FILES,
    TRAIN_UNTIL,
    check_same_data,
    check_same_store,
    held_folder,
    lay_out,
    note_resumption,
    read_run,
)
from hstu_xd.training.run_features import features_of, load_features
from hstu_xd.training.settings import RunSettings, TrainSettings, load_settings
from hstu_xd.training.stored_settings import stored_settings
from hstu_xd.training.trackers import check_trackers, choose_trackers
from hstu_xd.training.trainer import Trainer

_logger = logging.getLogger(__name__)


def train(
    data: Path,
    settings: RunSettings | None,
    out: Path,
    *,
    name: str | None = None,
    resume: bool = False,
    verify: bool = False,
    read_test: bool = True,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
    continue_from: Path | None = None,
    refit: Refit | None = None,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train one model into a run folder.

    Several processes, on one machine or on several, each read a store of the same content; the
    first one alone writes and reads ``out``, and gives the others what they need of it.

    Args:
        data: a prepared store.
        settings: of :func:`hstu_xd.training.settings.load_settings`; None: the defaults, or those
            of the run that is continued.
        out: the run folder; new, unless ``resume``.
        name: what tables call the run; default: its switches.
        resume: continue ``out`` with its own settings where it stopped; where ``settings`` are
            given and differ, a warning says so.
        verify: compare the hash of every file of the store with its manifest first.
        read_test: measure the picked epoch on the test split, too, unless it was trained on; a
            search on validation does not.
        allow_imports: to resume, import what the run names beside this package; what ``settings``
            have imported needs no permission.
        announce: called with a line after every epoch, in the first process.
        continue_from: a run of an older store, whose weights this one begins with and of which it
            trains on what is new in the store.
        refit: a run of the same store that this one is a refit of, with ``settings`` as it gives
            them.
        trackers: names out of :data:`hstu_xd.training.trackers.TRACKERS`; none: TensorBoard, or
            those that the run has.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        InputError: ``out`` exists (or does not, to resume), belongs to other data, or another
            process trains into it; or the settings are not those of the weights to continue from;
            or a tracker is not installed; or the stores of two processes differ.
        HstuXdError: the loss became not finite; the last good checkpoint stays.
        Interrupted: Ctrl-C or a signal asked to stop; the run can be resumed from the step that was
            finished then, and the message says how.
    """
    check_trackers(trackers)
    store = InteractionStore.open(data, verify=verify)
    with (
        world() as here,
        held_folder(out, here, RETRIEVAL, resume=resume),
        here.files_of_main(out, RESUMED_FILES) as known,
    ):
        check_same_store(store, here)
        given = settings
        if resume:
            settings = _settings_to_resume(known, store, given, allow_imports=allow_imports)
            earlier = Predecessor.recorded_in(read_run(known))
            refit = Refit.recorded_in(read_run(known))
        else:
            earlier = Predecessor.of(continue_from) if continue_from else None
            if refit is not None:
                refit.check_data(store)
                earlier = refit.earlier
            settings = _settings_to_begin(given, continue_from, allow_imports=allow_imports)
        # A run keeps the times that its log is cut at, whatever the log becomes.
        settings, given = settings.on(store), given.on(store) if given else None
        if here.is_main:
            goes_on_with = given if resume else None
            _warn_inert(settings, store, out, goes_on_with, earlier or refit)
        torch.manual_seed(settings.train.random_seed)
        encoder = settings.encoder_settings(store.num_domains)
        check_impl(encoder.impl, encoder.normalization)
        # A run that is resumed keeps the features that it began with.
        features = load_features(known, settings) if resume else features_of(store, settings)
        trainer = _new_trainer(store, settings, out, here, earlier, refit, features, announce)
        continues = None
        if earlier is not None and not here.from_main((out / STATE_FILE).exists):
            continues = _take_over(trainer, earlier, store, settings)
        if resume:
            facts = read_run(known)
            # Checkpoints that count steps are older than "starts": those of the first job.
            trainer.resume(facts.get("starts", [facts])[0].get("processes", 1))
            here.in_main(lambda: _note_resumption(out, trainer))
        else:
            if isinstance(trainer, Trainer):
                trainer.check_group()
            name = name or (refit.name(settings.train.until) if refit else variant_name(settings))
            told = {"continues": continues.facts} if continues else {}
            told |= {"refits": refit.facts(here)} if refit else {}
            here.in_main(lambda: lay_out(out, store, settings, trainer.model, name, here, told))
            if continues and here.is_main:
                announce(str(continues))
        if trackers:
            here.in_main(lambda: choose_trackers(out, trackers))
        try:
            return trainer.fit(read_test=read_test)
        except Interrupted as stopped:
            command = _resume_command(data, out, settings, here)
            message = f"{stopped}; go on with: {command}" if here.is_main else ""
            raise Interrupted(message, stopped.signal) from None


def _settings_to_begin(
    given: RunSettings | None, continue_from: Path | None, *, allow_imports: bool
) -> RunSettings:
    """Return a new run's settings: those given, or those of the run that it continues."""
    if continue_from is None:
        return given or load_settings([])
    trusted = given.foreign.modules if given is not None else ()
    stored = stored_settings(continue_from, allow_imports=allow_imports, trusted=trusted)
    settings = given or stored
    check_continuable(continue_from, settings, stored)
    return settings


def _new_trainer(
    store: InteractionStore,
    settings: RunSettings,
    out: Path,
    here: World,
    earlier: Predecessor | None,
    refit: Refit | None,
    features: FeatureTable | None,
    announce: Callable[[str], object],
) -> Trainer | BaselineTrainer:
    if settings.train.baseline != NO_BASELINE:
        return BaselineTrainer(store, settings, out, here)
    if earlier is not None:
        earlier.check_news(store, settings)
    return Trainer(
        new_model(store.catalog, settings, features).to(here.device),
        store,
        settings.train,
        out,
        here,
        protocol=settings.protocol,
        announce=announce,
        until=earlier.until if earlier else None,
        num_epochs=refit.epochs if refit else None,
    )


def _take_over(
    trainer: Trainer | BaselineTrainer,
    earlier: Predecessor,
    store: InteractionStore,
    settings: RunSettings,
) -> Continuation:
    """Let a trainer begin with what an earlier run has learnt."""
    assert isinstance(trainer, Trainer)
    # What follows from the number of domains is then what has a row for each of them.
    alike = replace(settings, train=replace(settings.train, older_per_domain=0))
    found = continuation_of(
        earlier,
        store,
        trainer.model,
        settings,
        lambda catalog: new_model(catalog, alike),
        trainer.users_per_epoch,
    )
    trainer.begin_with(found.weights, found.optimizer, earlier.run)
    return found


def new_model(
    catalog: DomainCatalog, settings: RunSettings, features: FeatureTable | None = None
) -> CrossDomainHSTU:
    """Make the model that settings describe, with weights by torch's generator.

    Args:
        catalog: its items.
        settings: of the run.
        features: what a store holds of those that the settings name; None: nothing.
    """
    train = settings.train
    return CrossDomainHSTU(
        catalog,
        settings.encoder_settings(catalog.num_domains),
        dropout_rate=train.dropout_rate,
        window=train.window.size(catalog.num_domains),
        features=features,
        row_dropout=settings.item.row_dropout,
    )


def _resume_command(data: Path, out: Path, settings: RunSettings, here: World) -> str:
    """Write the command that goes on with a run, started as it was this time."""
    words = ["train", "--data", str(data), "--out", str(out), "--resume"]
    words += ["--allow-imports"] * bool(settings.foreign.modules)
    command = shlex.join(words)
    if here.size == 1:
        return f"hstu-xd {command}"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(here.size):
        return f"torchrun --nproc_per_node {here.size} -m hstu_xd {command}"
    return f"{here.size} processes of hstu-xd {command}"


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run, ready to be asked.

    Attributes:
        ranker: the best model, in evaluation mode on CPU, or a baseline.
        objective: what it was trained for.
        metrics: functions of ranks that it is measured by beside the usual ones.
        protocol: what it was evaluated by in training.
        domain: the only one that it was trained on; "": all.
        window: which events of a history it reads.
    """

    ranker: CrossDomainHSTU | Baseline
    objective: Objective
    metrics: Metrics
    protocol: Protocol
    domain: str
    window: Window

    @property
    def model(self) -> CrossDomainHSTU:
        """The model; an InputError where the run is a baseline."""
        if isinstance(self.ranker, Baseline):
            raise InputError("the run is a baseline; give the run of a trained model")
        return self.ranker

    @property
    def scorer(self) -> Scorer:
        """What ranks items for the user vectors."""
        if isinstance(self.ranker, Baseline):
            return self.ranker.scorer
        return self.objective.scorer(self.ranker)


def load(run: Path | str, *, allow_imports: bool = False) -> CrossDomainHSTU:
    """Load the best model of a trained run, in evaluation mode on CPU.

    Args:
        run: a folder written by ``hstu-xd train``.
        allow_imports: import the modules that the run names beside this package, which executes
            their code; the environment variable HSTU_XD_ALLOW_IMPORTS=1 says the same.

    Raises:
        InputError: not a run folder, its files do not belong together, or it names modules and
            nothing allows their import.
    """
    return load_trained(run, allow_imports=allow_imports).model


def load_trained(
    run: Path | str, *, allow_imports: bool = False, one_domain: bool = False
) -> TrainedRun:
    """Load a run with its objective, see :func:`load`.

    Args:
        run: a folder written by ``hstu-xd train``.
        allow_imports: as there.
        one_domain: take a run that was trained on one domain alone, too; it has to be asked what
            it was trained for.

    Raises:
        InputError: as there, or such a run where it is not taken.
    """
    run = Path(run)
    settings = stored_settings(run, allow_imports=allow_imports)
    domain = settings.train.domain
    if domain and not one_domain:
        raise InputError(
            f"{run} was trained on the domain {domain!r} alone (xd_train.domain), a control that "
            "evaluate, compare and report take; give a run of all domains, or prepare a log of "
            "that domain and train on it"
        )
    catalog = DomainCatalog.load(run)
    if settings.train.baseline != NO_BASELINE:
        ranker = load_baseline(run, settings, catalog)
    else:
        ranker = new_model(catalog, settings, load_features(run, settings))
        weights, _ = load_checkpoint(run / MODEL_FILE)
        load_weights(ranker, weights, run / MODEL_FILE)
    return TrainedRun(
        ranker.eval(),
        objective_of(settings.train),
        metrics_of(settings.train),
        settings.protocol,
        domain,
        settings.train.window,
    )


def variant_name(settings: RunSettings) -> str:
    """Name a run after what its model is trained as: "HSTU", "HSTU + mask + TAPE", ...

    Of the training, only up to which split it goes, where negatives are drawn, how many other
    domains are asked for and what is read beside the latest events is told;
    :meth:`RunSettings.unlike` tells all.
    """
    if settings.train.baseline != NO_BASELINE:
        return until_name(settings.train.baseline, settings.train.until)
    parts = ["HSTU"]
    foreign = settings.parts
    if settings.train.negatives != TrainSettings.negatives and "negatives" not in foreign:
        parts.append(f"{settings.train.negatives} negatives")
    parts += labels(settings.encoder_settings(num_domains=1))
    if settings.item.features:
        parts.append(f"item features {', '.join(settings.item.features)}")
    if settings.train.older_per_domain:
        parts.append(f"{settings.train.older_per_domain} older events of each domain")
    if settings.train.domain:
        parts.append(f"{settings.train.domain} alone")
    asked = settings.train.asked_domains
    if asked and "objective" not in foreign:
        parts.append(f"{asked} other domain{'s' if asked > 1 else ''} asked")
    # The layer has its label; a metric of one's own makes no other model.
    parts += [f"{what} {foreign[what]}" for what in ("objective", "negatives") if what in foreign]
    return until_name(" + ".join(parts), settings.train.until)


def _note_resumption(out: Path, trainer: Trainer | BaselineTrainer) -> None:
    if not trainer.is_trained:
        users = trainer.users_per_step // trainer.world.size
        note_resumption(out, trainer.world, step=trainer.progress.step, batch_size=users)


def _settings_to_resume(
    out: Path, store: InteractionStore, given: RunSettings | None, *, allow_imports: bool
) -> RunSettings:
    check_same_data(out, store)
    trusted = given.foreign.modules if given is not None else ()
    return stored_settings(out, allow_imports=allow_imports, trusted=trusted)


def _warn_inert(
    settings: RunSettings,
    store: InteractionStore,
    out: Path,
    given: RunSettings | None,
    begun: Predecessor | Refit | None,
) -> None:
    """Say which settings do nothing with these data, or are not those that a run goes on with."""
    if given is not None and (unlike := given.unlike(read_run(out))):
        _logger.warning("%s goes on with its own settings: %s", out, "; ".join(unlike))
    idle = {}
    if begun is None:
        idle |= dict.fromkeys(("new_items", "news_context", "replay_share"), "--continue-from")
        if settings.train.until is not Split.TRAIN:
            told = f"{TRAIN_UNTIL} = 'train'"
            idle |= dict.fromkeys(("early_stop_patience", "select_metric"), told)
    for name, needed in idle.items():
        if (value := getattr(settings.train, name)) != getattr(TrainSettings, name):
            _logger.warning("xd_train.%s = %r does nothing without %s", name, value, needed)
    if settings.train.asked_domains and store.num_domains == 1:
        _logger.warning(
            "xd_train.asked_domains = %r does nothing: the data have one domain",
            settings.train.asked_domains,
        )
