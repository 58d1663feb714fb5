"""Train variants over seeds, each run in a process of its own, and tabulate them.

A variant is a list of gin bindings on top of the recipe that all share.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.evaluation.protocol import Protocol, protocol_notes
from hstu_xd.experiments.report.tables import markdown_table
from hstu_xd.experiments.run_folders import (
    ABLATION_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    aggregate,
    read_run,
)
from hstu_xd.experiments.trainings import recipe_options, training_command, trainings
from hstu_xd.experiments.variants import check_name, recipe_of, variant_file
from hstu_xd.files import locked_folder
from hstu_xd.training.interruption import signal_name
from hstu_xd.training.run_facts import data_changes
from hstu_xd.training.settings import RunSettings, load_settings

TABLE_FILE = "ablation.md"


@dataclass(frozen=True)
class AblationRun:
    """One cell of an ablation: a variant under a seed, in a run folder of its own.

    Attributes:
        source: the variant as it was asked for: a name, or a user's gin file.
        seed: random seed.
        out: folder of all runs.
    """

    source: str
    seed: int
    out: Path

    @property
    def variant(self) -> str:
        """What tables call the variant: its name, or that of its file."""
        file = variant_file(self.source)
        return self.source if file is None else file.stem

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / f"{self.variant}-seed{self.seed}"

    @property
    def begun(self) -> bool:
        """Whether there is a run to continue or to keep."""
        return (self.folder / RUN_FILE).is_file()

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / SUMMARY_FILE).is_file()

    def check(self, store: InteractionStore, settings: RunSettings) -> None:
        """Refuse a run that is there already and does not belong beside the others.

        Args:
            store: what all runs are trained on.
            settings: of the variant, under any seed.

        Raises:
            InputError: it was trained on other data or with other settings.
        """
        if not self.begun:
            return
        recorded = read_run(self.folder).info
        own = replace(settings, train=replace(settings.train, random_seed=self.seed))
        if changes := data_changes(recorded, store):
            apart = f"on other data than {store.path} now holds ({changes})"
        elif unlike := own.unlike(recorded):
            apart = f"with other settings ({unlike[0]})"
        else:
            return
        raise InputError(
            f"{self.folder}: was trained {apart}, so one table cannot hold both; remove it, or "
            "give another --out"
        )

    def command(self, data: Path, files: Sequence[Path], bindings: Sequence[str]) -> list[str]:
        """Write the command that trains it, or continues it where it stopped."""
        files, bindings = recipe_of(self.source, files, bindings)
        bindings = [*bindings, f"xd_train.random_seed = {self.seed}"]
        return training_command(data, self.folder, self.variant, files, bindings, resume=self.begun)


def ablate(
    data: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    files: Sequence[Path] = (),
    bindings: Sequence[str] = (),
    jobs: int = 1,
    verify: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> str:
    """Train every variant under every seed; finished runs in ``out`` are kept, stopped ones go on.

    Args:
        data: a prepared store.
        variants: names out of :data:`hstu_xd.experiments.variants.VARIANTS`, and gin files of your
            own, which are named after the file and may import parts of your own.
        seeds: random seeds.
        out: folder of the run folders, ``ablation.json`` and ``ablation.md``.
        files: gin files of the recipe that all variants share.
        bindings: gin bindings on top of the recipe.
        jobs: runs at a time; they share the processor's cores.
        verify: compare the hash of every file of the store with its manifest first.
        announce: called with a line at the beginning, after every epoch and every run.

    Returns:
        The Markdown table.

    Raises:
        InputError: unknown variant or setting, a recipe that sets one of the switches that
            variants are named after, not a store, runs in ``out`` that are not comparable, or
            another ablation in ``out``.
        HstuXdError: a run failed; the others' rows are kept.
        Interrupted: Ctrl-C or a signal asked to stop; the trainings have saved and ended, and the
            message says how to go on.
    """
    store, failed = InteractionStore.open(data, verify=verify), []
    runs = [AblationRun(v, s, out) for s in seeds for v in variants]

    def note_end(run: AblationRun, error: str) -> None:
        if error:
            failed.append(f"{run.variant} seed {run.seed}: {error}")
        announce(f"{run.variant} seed {run.seed}: {error or 'done'}")
        _write(out, runs, store)

    with locked_folder(out, "runs an ablation in"):
        _check_runs(runs, store, files, bindings)
        commands = {run: run.command(data, files, bindings) for run in runs if not run.done}
        announce(f"{len(commands)} of {len(runs)} runs to train, {jobs} at a time, into {out}")
        with trainings(jobs) as running:

            def train(run: AblationRun) -> str:
                name = f"{run.variant} seed {run.seed}"
                return running.run(commands[run], announce=lambda line: announce(f"{name}: {line}"))

            for run, error in running.each(train, commands):
                note_end(run, error)
        stopped_by = running.stopped_by
        table = _write(out, runs, store)
    if stopped_by:
        words = ["ablate", "--data", str(data), "--variants", ",".join(variants), "--seeds"]
        words += [str(max(seeds)), "--out", str(out), *recipe_options(files, bindings)]
        raise Interrupted(
            f"stopped by {signal_name(stopped_by)}, {sum(run.done for run in runs)} of {len(runs)} "
            f"runs are done; go on with: hstu-xd {shlex.join(words)} --jobs {jobs}",
            stopped_by,
        )
    if failed:
        raise HstuXdError(f"{len(failed)} of {len(runs)} runs failed, first {failed[0]}")
    return table


def _check_runs(
    runs: Sequence[AblationRun],
    store: InteractionStore,
    files: Sequence[Path],
    bindings: Sequence[str],
) -> None:
    """Refuse what does not belong into one table, before anything is trained."""
    variants = dict.fromkeys(run.source for run in runs)
    settings = {v: load_settings(*recipe_of(v, files, bindings)) for v in variants}
    for variant in variants:
        check_name(variant, settings[variant])
    _check_protocols(settings)
    _refuse_namesakes(runs)
    for run in runs:
        run.check(store, settings[run.source])


def _check_protocols(settings: Mapping[str, RunSettings]) -> None:
    """Refuse variants of which one is measured otherwise than the first."""
    (first, base), *others = settings.items()
    for variant, own in others:
        if own.protocol != base.protocol:
            raise InputError(
                f"variant {variant} is evaluated by {own.protocol}, {first} by {base.protocol}: "
                "their numbers do not compare; put xd_evaluate settings into the recipe that all "
                "share"
            )


def _refuse_namesakes(runs: Sequence[AblationRun]) -> None:
    """Refuse two variants that would share a run folder."""
    sources: dict[Path, str] = {}
    for run in runs:
        other = sources.setdefault(run.folder, run.source)
        if other != run.source:
            raise InputError(
                f"variants {other} and {run.source} are both named {run.variant!r}; rename one"
            )


def _write(out: Path, runs: Sequence[AblationRun], store: InteractionStore) -> str:
    done = [read_run(run.folder) for run in sorted(runs, key=lambda r: r.seed) if run.done]
    rows = [run.row() for run in done]
    order = list(dict.fromkeys(run.variant for run in runs))
    rows.sort(key=lambda row: order.index(row["variant"]))
    protocol = Protocol.from_run(done[0].info if done else {})
    table = markdown_table(
        aggregate(rows),
        metrics=protocol.main_columns,
        synthetic=bool(store.manifest.get("synthetic")),
    )
    if done:
        table += "\n" + "\n".join(protocol_notes([run.info for run in done], done[0].test)) + "\n"
    for name, text in ((ABLATION_FILE, json.dumps(rows, indent=1) + "\n"), (TABLE_FILE, table)):
        partial = out / f"{name}.partial"
        partial.write_text(text)
        partial.replace(out / name)
    return table
