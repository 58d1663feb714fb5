"""Train variants over seeds, each run in a process of its own, and tabulate them.

A variant is a list of gin bindings on top of the recipe that all share.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.experiments.kinds import Kind, Settings, runs_on
from hstu_xd.experiments.report.shared_data import alone_notes, measured_by, until_notes
from hstu_xd.experiments.report.tables import markdown_table
from hstu_xd.experiments.run_folders import (
    ABLATION_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    aggregate,
    read_run,
)
from hstu_xd.experiments.trainings import (
    recipe_options,
    tracker_options,
    training_command,
    trainings,
)
from hstu_xd.experiments.variants import SINGLE, recipe_of, variant_file
from hstu_xd.files import locked_folder
from hstu_xd.training.interruption import signal_name
from hstu_xd.training.trackers import check_trackers

TABLE_FILE = "ablation.md"
# Domains with a column of their own; the report shows more.
_TABLE_DOMAINS = 12


@dataclass(frozen=True)
class AblationRun:
    """One cell of an ablation: a variant under a seed, in a run folder of its own.

    Attributes:
        source: the variant as it was asked for: a name, or a user's gin file.
        seed: random seed.
        out: folder of all runs.
        domain: number and name of the only domain that it trains on; None: all.
    """

    source: str
    seed: int
    out: Path
    domain: tuple[int, str] | None = None

    @property
    def variant(self) -> str:
        """What tables call the variant: its name, or that of its file."""
        file = variant_file(self.source)
        return self.source if file is None else file.stem

    @property
    def folder(self) -> Path:
        """The run folder."""
        part = "" if self.domain is None else f"-domain{self.domain[0]}"
        return self.out / f"{self.variant}{part}-seed{self.seed}"

    @property
    def name(self) -> str:
        """What progress calls the run."""
        part = "" if self.domain is None else f" {self.domain[1]!r}"
        return f"{self.variant}{part} seed {self.seed}"

    @property
    def own(self) -> dict[str, Any]:
        """What sets it apart from other runs of its variant: settings of the trainer by name."""
        alone = {} if self.domain is None else {"domain": self.domain[1]}
        return {"random_seed": self.seed, **alone}

    @property
    def begun(self) -> bool:
        """Whether there is a run to continue or to keep."""
        return (self.folder / RUN_FILE).is_file()

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / SUMMARY_FILE).is_file()

    def check(self, kind: Kind, settings: Settings) -> None:
        """Refuse a run that is there already and does not belong beside the others.

        Args:
            kind: of all runs, with what they are trained on.
            settings: of the variant, under any seed.

        Raises:
            InputError: it was trained on other data or with other settings.
        """
        if self.begun and (apart := kind.apart(self.folder, settings, self.own)):
            raise InputError(
                f"{self.folder}: was trained {apart}, so one table cannot hold both; remove it, or "
                "give another --out"
            )

    def command(
        self,
        kind: Kind,
        files: Sequence[Path],
        bindings: Sequence[str],
        trackers: Sequence[str],
    ) -> list[str]:
        """Write the command that trains it, or continues it where it stopped."""
        files, bindings = recipe_of(self.source, files, bindings)
        bindings = [*bindings, *(f"{kind.block}.{k} = {v!r}" for k, v in self.own.items())]
        line = training_command(
            kind.command,
            kind.data,
            self.folder,
            self.variant,
            files,
            bindings,
            resume=self.begun,
        )
        return line + tracker_options(trackers)


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
    trackers: Sequence[str] = (),
) -> str:
    """Train every variant under every seed; finished runs in ``out`` are kept, stopped ones go on.

    Args:
        data: a prepared store, or requests to rank for.
        variants: names out of :data:`hstu_xd.experiments.variants.VARIANTS`, and gin files of your
            own, which are named after the file and may import parts of your own; requests are
            ranked by gin files alone. None of them: what is compared of the kind of runs.
        seeds: random seeds.
        out: folder of the run folders, ``ablation.json`` and ``ablation.md``.
        files: gin files of the recipe that all variants share.
        bindings: gin bindings on top of the recipe.
        jobs: runs at a time; they share the processor's cores.
        verify: compare the hash of every file of the store with its manifest first.
        announce: called with a line at the beginning, after every epoch and every run.
        trackers: names out of :data:`hstu_xd.training.trackers.TRACKERS`; none: TensorBoard.

    Returns:
        The Markdown table.

    Raises:
        InputError: unknown variant or setting, a recipe that sets one of the switches that
            variants are named after, neither store nor requests, runs in ``out`` that are not
            comparable, or another ablation in ``out``; or a tracker is not installed.
        HstuXdError: a run failed; the others' rows are kept.
        Interrupted: Ctrl-C or a signal asked to stop; the trainings have saved and ended, and the
            message says how to go on.
    """
    check_trackers(trackers)
    kind, failed = runs_on(data, verify=verify), []
    runs = [
        AblationRun(v, s, out, domain)
        for s in seeds
        for v in variants or kind.compared
        for domain in (enumerate(kind.store.domain_names) if v == SINGLE else [None])
    ]

    def note_end(run: AblationRun, error: str) -> None:
        if error:
            failed.append(f"{run.name}: {error}")
        announce(f"{run.name}: {error or 'done'}")
        _write(out, runs, kind.store)

    with locked_folder(out, "runs an ablation in"):
        _check_runs(runs, kind, files, bindings)
        commands = {
            run: run.command(kind, files, bindings, trackers) for run in runs if not run.done
        }
        announce(f"{len(commands)} of {len(runs)} runs to train, {jobs} at a time, into {out}")
        with trainings(jobs) as running:

            def train(run: AblationRun) -> str:
                return running.run(
                    commands[run], announce=lambda line: announce(f"{run.name}: {line}")
                )

            for run, error in running.each(train, commands):
                note_end(run, error)
        stopped_by = running.stopped_by
        table = _write(out, runs, kind.store)
    if stopped_by:
        words = ["ablate", "--data", str(data)]
        words += ["--variants", ",".join(variants)] if variants else []
        words += ["--seeds", str(max(seeds)), "--out", str(out)]
        words += recipe_options(files, bindings) + tracker_options(trackers)
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
    kind: Kind,
    files: Sequence[Path],
    bindings: Sequence[str],
) -> None:
    """Refuse what does not belong into one table, before anything is trained."""
    variants = dict.fromkeys(run.source for run in runs)
    for variant in variants:
        kind.check_source(variant)
    settings = {v: kind.load(*recipe_of(v, files, bindings)) for v in variants}
    kind.check_variants(settings)
    _refuse_namesakes(runs)
    for run in runs:
        run.check(kind, settings[run.source])


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
    protocol = done[0].protocol if done else Protocol.from_run({})
    results = aggregate(rows)
    table = markdown_table(
        results,
        metrics=protocol.columns({name for result in results for name in result.metrics}),
        synthetic=bool(store.manifest.get("synthetic")),
    )
    if any(row.get("domain") for row in rows):
        names = store.domain_names[:_TABLE_DOMAINS]
        by_domain = [f"{protocol.headlines[-2]}[{name}]" for name in names]
        table += "\nWhat training domains together gives or takes:\n\n"
        table += markdown_table(results, metrics=by_domain)
    if done:
        notes = [*measured_by(done), *alone_notes(rows), *until_notes(done)]
        table += "\n" + "\n".join(notes) + "\n"
    for name, text in ((ABLATION_FILE, json.dumps(rows, indent=1) + "\n"), (TABLE_FILE, table)):
        partial = out / f"{name}.partial"
        partial.write_text(text)
        partial.replace(out / name)
    return table
