"""Search settings on validation: the same number of trials for every variant, the test unread.

A trial is a training in a run folder of its own, and a trial of an Optuna study, one study a
variant. Which values a trial takes depends on its number and on the trials before, so a search that
was stopped goes on as if it had not been; the first trial is the recipe itself.
"""

import ast
import json
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.experiments.kinds import Kind, runs_on
from hstu_xd.experiments.report.tables import MISSING, escape, markdown_lines, metric_label
from hstu_xd.experiments.run_folders import METRICS_FILE, RUN_FILE, read_metrics, read_run
from hstu_xd.experiments.trainings import (
    Trainings,
    recipe_options,
    training_command,
    trainings,
)
from hstu_xd.experiments.variants import SINGLE, recipe_of, variant_file
from hstu_xd.files import locked_folder
from hstu_xd.model.settings import SWITCHES
from hstu_xd.training.interruption import signal_name
from hstu_xd.training.run_facts import TRAIN_UNTIL
from hstu_xd.training.search_space import Dimension

JOURNAL_FILE = "journal.log"
TRIALS_FILE = "trials.json"
BEST_FILE = "best.gin"
TABLE_FILE = "tune.md"
# What the recipe is called where no variants are laid on top of it.
RECIPE = "recipe"
# What a study keeps of a trial: its number in the search, and why its training failed.
_NUMBER, _ERROR = "number", "error"
# What a study keeps of itself.
_FACTS = "search"


def tune(
    data: Path,
    variants: Sequence[str],
    trials: int,
    out: Path,
    *,
    files: Sequence[Path] = (),
    bindings: Sequence[str] = (),
    jobs: int = 1,
    announce: Callable[[str], object] = lambda line: None,
) -> str:
    """Try settings for every variant; trials in ``out`` are kept, stopped ones go on.

    Args:
        data: a prepared store, or requests to rank for.
        variants: names out of :data:`hstu_xd.experiments.variants.VARIANTS`, and gin files of your
            own; none: the recipe as it is.
        trials: number of trials of each variant, those that are there already among them.
        out: folder of the runs, of Optuna's journal, of ``trials.json``, ``tune.md`` and of the
            best settings, ``best.gin`` over all and one in the folder of every variant.
        files: gin files of the recipe; ``xd_tune.*`` there say what is tried.
        bindings: gin bindings on top of the recipe.
        jobs: trials at a time; with several, what one learns from depends on which ended before.
        announce: called with a line after every trial.

    Returns:
        The Markdown table.

    Raises:
        InputError: unknown variant or setting, a variant that sets what is searched, neither store
            nor requests, another search in ``out``, or Optuna is not installed.
        HstuXdError: all trials of a variant failed.
        Interrupted: Ctrl-C or a signal asked to stop; the trainings have saved and ended, and the
            message says how to go on.
    """
    kind = runs_on(data)
    load_optuna()
    names = list(variants) or [RECIPE]
    if SINGLE in names:
        raise InputError(
            f"variant {SINGLE!r} is a training a domain, which one search cannot tune; tune each "
            "domain by itself, by the binding xd_train.domain"
        )
    with locked_folder(out, "tunes in"):
        searches = {name: _Search(name, kind, out, files, bindings) for name in names}
        for search in searches.values():
            if search.outside and not search.ended:
                announce(
                    f"the recipe is no trial of {search.variant}: {search.outside[0]} lies outside "
                    "xd_tune.space"
                )
        todo = [(n, s) for n in range(1, trials + 1) for s in searches.values() if n not in s.ended]
        with trainings(jobs) as running:
            ends = running.each(lambda one: one[1].run_trial(one[0], running), todo)
            for (number, search), line in ends:
                announce(f"{search.variant} trial {number}: {line}")
                _write(out, list(searches.values()))
        table = _write(out, list(searches.values()))
    if running.stopped_by:
        done = sum(len([n for n in s.ended if n <= trials]) for s in searches.values())
        words = ["tune", "--data", str(data), "--trials", str(trials), "--out", str(out)]
        words += ["--variants", ",".join(variants)] if variants else []
        words += recipe_options(files, bindings)
        raise Interrupted(
            f"stopped by {signal_name(running.stopped_by)}, {done} of {trials * len(names)} trials "
            f"are done; go on with: hstu-xd {shlex.join(words)} --jobs {jobs}",
            running.stopped_by,
        )
    for search in searches.values():
        if search.best is None:
            errors = [one["error"] for one in search.rows() if one["error"]]
            raise HstuXdError(f"all trials of {search.variant} failed, first: {errors[0]}")
    return table


@cache
def load_optuna() -> ModuleType:
    """Import Optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            'tune needs Optuna, which is not installed: pip install "hstu-xd[tune]"'
        ) from error
    return optuna


class _Search:
    """The trials of one variant.

    Args:
        source: the variant as it was asked for, or :data:`RECIPE`.
        kind: of the runs, with what they are trained on.
        out: folder of the whole search.
        files: gin files of the recipe.
        bindings: gin bindings on top of them.
    """

    def __init__(
        self,
        source: str,
        kind: Kind,
        out: Path,
        files: Sequence[Path],
        bindings: Sequence[str],
    ) -> None:
        self._optuna, self._kind = load_optuna(), kind
        self.variant, self._files, self._bindings = source, list(files), list(bindings)
        if source != RECIPE:
            kind.check_source(source)
            file = variant_file(source)
            self.variant = source if file is None else file.stem
            self._files, self._bindings = recipe_of(source, files, bindings)
        self.settings = kind.load(self._files, self._bindings)
        self._space = self.settings.search_space
        self._check_until()
        self.metric = self.settings.flat[f"{kind.block}.select_metric"]
        self.folder = out / self.variant
        if source != RECIPE:
            kind.check_variants({source: self.settings})
            self._check_space(kind.load(files, bindings).flat)
        self._lock = threading.Lock()
        self._study = self._open(out)

    def _check_until(self) -> None:
        """Refuse to train on what the search picks by."""
        until = self.settings.flat.get(TRAIN_UNTIL, "train")
        if until != "train" or any(TRAIN_UNTIL in each.names for each in self._space):
            raise InputError(
                f"a search picks by validation targets, which {TRAIN_UNTIL} other than 'train' "
                "trains on; leave it there, and refit the run of the best settings: hstu-xd train "
                "--refit RUN"
            )

    def _check_space(self, recipe: Mapping[str, Any]) -> None:
        """Refuse to search what makes the variant what it is."""
        for name in (name for each in self._space for name in each.names):
            if (
                name.removeprefix("xd_encoder.") in SWITCHES
                or self.settings.flat[name] != recipe[name]
            ):
                raise InputError(
                    f"xd_tune.space searches {name}, which makes variant {self.variant} what it "
                    "is; leave it out of the space"
                )

    def _open(self, out: Path) -> Any:
        """Open the variant's study, and take back trials that were killed with their search."""
        optuna, tune = self._optuna, self.settings.tune
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = optuna.storages.journal
        study = optuna.create_study(
            storage=journal.JournalStorage(journal.JournalFileBackend(str(out / JOURNAL_FILE))),
            study_name=self.variant,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(tune.unpruned_trials, tune.unpruned_epochs),
        )
        facts = {
            "data": self._kind.hashes,
            "settings": self.settings.flat | {"xd_tune.space": tune.space},
        }
        facts = json.loads(json.dumps(facts, default=str))
        known = study.user_attrs.get(_FACTS)
        if known is None:
            study.set_user_attr(_FACTS, facts)
        elif known["data"] != facts["data"]:
            raise InputError(
                f"{out}: {self.variant} was tuned on other data than {self._kind.data}; give "
                "another --out"
            )
        for name, own in facts["settings"].items():
            # What an older version did not know has its default.
            theirs = known["settings"].get(name, own) if known else own
            if theirs != own:
                raise InputError(
                    f"{out}: {self.variant} was tuned with other settings (not {name} = {own!r} "
                    f"but {theirs!r}); give another --out"
                )
        states = optuna.trial.TrialState
        for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            study.tell(trial.number, state=states.FAIL)
        for _ in study.get_trials(deepcopy=False, states=(states.WAITING,)):
            study.tell(study.ask(), state=states.FAIL)
        return study

    @property
    def ended(self) -> dict[int, Any]:
        """Optuna's record of every trial that has come to an end of its own, by its number."""
        states = self._optuna.trial.TrialState
        return {
            trial.user_attrs[_NUMBER]: trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state in (states.COMPLETE, states.PRUNED)
            or (trial.state == states.FAIL and _ERROR in trial.user_attrs)
        }

    def run_folder(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return self.folder / f"trial-{number:03d}"

    def run_trial(self, number: int, running: Trainings) -> str:
        """Train a trial to its end; returns what there is to say of it."""
        states = self._optuna.trial.TrialState
        with self._lock:
            trial, values = self._ask(number)
        folder, reported, pruned = self.run_folder(number), 0, False

        def should_stop() -> bool:
            nonlocal reported, pruned
            rows = [
                row for row in read_metrics(folder / METRICS_FILE)[0] if row["split"] == "valid"
            ]
            for row in rows[reported:]:
                trial.report(row[self.metric], row["epoch"])
            pruned = len(rows) > reported and trial.should_prune()
            reported = len(rows)
            return pruned

        command = training_command(
            self._kind.command,
            self._kind.data,
            folder,
            self.variant,
            self._files,
            [*self._bindings, *(f"{name} = {value!r}" for name, value in values.items())],
            resume=(folder / RUN_FILE).is_file(),
        )
        error = running.run([*command, "--skip-test"], should_stop)
        if not error:
            should_stop()
            found = read_run(folder).picked_valid[self.metric]
            self._study.tell(trial, found)
            return f"{self.metric} {100 * found:.2f} % on validation"
        if pruned:
            self._study.tell(trial, state=states.PRUNED)
            return f"pruned after {reported} epochs"
        if not running.stopped_by:
            trial.set_user_attr(_ERROR, error)
        self._study.tell(trial, state=states.FAIL)
        return error

    def _ask(self, number: int) -> tuple[Any, dict[str, Any]]:
        """Begin a trial, with the values it had before where it was interrupted."""
        before = [
            trial.params
            for trial in self._study.get_trials(deepcopy=False)
            if trial.user_attrs.get(_NUMBER) == number and len(trial.params) == len(self._space)
        ]
        if before:
            self._study.enqueue_trial(before[-1])
        elif number == 1 and (start := self._start()):
            self._study.enqueue_trial(start)
        # One sampler a trial: a search that goes on draws nothing that has been drawn before.
        self._study.sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=self.settings.tune.random_trials,
            seed=self.settings.flat[f"{self._kind.block}.random_seed"] % 2**31 + number,
        )
        trial = self._study.ask()
        trial.set_user_attr(_NUMBER, number)
        drawn = [_draw(each, trial) for each in self._space]
        return trial, {
            k: v for each, at in zip(self._space, drawn) for k, v in each.values(at).items()
        }

    @property
    def outside(self) -> list[str]:
        """Names of the dimensions that do not hold the recipe."""
        return [each.label for each in self._space if each.holding(self.settings.flat) is None]

    def _start(self) -> dict[str, Any]:
        """Return where the recipe lies in the space; empty where it lies outside."""
        if self.outside:
            return {}
        places = {each: each.holding(self.settings.flat) for each in self._space}
        return {each.label: repr(at) if each.choices else at for each, at in places.items()}

    def settings_of(self, trial: Any) -> dict[str, Any]:
        """Return the values that a trial had, by setting."""
        found: dict[str, Any] = {}
        for each in self._space:
            at = trial.params[each.label]
            found |= each.values(ast.literal_eval(at) if each.choices else at)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of ``trials.json`` for every trial that has ended."""
        rows = []
        for number, trial in sorted(self.ended.items()):
            folder = self.run_folder(number)
            run = read_run(folder) if (folder / RUN_FILE).is_file() else None
            rows.append(
                {
                    "variant": self.variant,
                    "trial": number,
                    "state": trial.state.name.lower(),
                    "metric": self.metric,
                    "value": trial.value if trial.value is None else float(trial.value),
                    "settings": self.settings_of(trial),
                    "epochs": len(run.valid) if run else 0,
                    "best_epoch": (run.summary or {}).get("best_epoch") if run else None,
                    "valid": run.picked_valid if run else {},
                    "error": trial.user_attrs.get(_ERROR),
                    "run": f"{self.variant}/{folder.name}",
                }
            )
        return rows

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best trial on validation; None before one is complete."""
        complete = [row for row in self.rows() if row["state"] == "complete"]
        return max(complete, key=lambda row: row["value"], default=None)

    def as_gin(self, best: Mapping[str, Any]) -> str:
        """Write all settings of the best trial, given its row, as a gin file."""
        bound = [f"{name} = {value!r}" for name, value in best["settings"].items()]
        settings = self._kind.load(self._files, [*self._bindings, *bound])
        return (
            f"# The best of {len(self.ended)} trials of {self.variant} on validation, trial "
            f"{best['trial']}: {self.metric} {100 * best['value']:.2f} %.\n\n{settings.to_gin()}"
        )


def _draw(dimension: Dimension, trial: Any) -> Any:
    if dimension.choices:
        # Optuna stores words and numbers alone.
        words = [repr(choice) for choice in dimension.choices]
        return ast.literal_eval(trial.suggest_categorical(dimension.label, words))
    suggest = trial.suggest_int if isinstance(dimension.low, int) else trial.suggest_float
    return suggest(dimension.label, dimension.low, dimension.high, log=dimension.log)


def _write(out: Path, searches: Sequence[_Search]) -> str:
    """Write what is known so far; returns the table."""
    rows = [row for search in searches for row in search.rows()]
    found = [(search, best) for search in searches if (best := search.best)]
    table = "\n".join(_table(found)) + "\n"
    texts = {TRIALS_FILE: json.dumps(rows, indent=1) + "\n", TABLE_FILE: table}
    for search, best in found:
        texts[f"{search.variant}/{BEST_FILE}"] = search.as_gin(best)
    if found:
        search, best = max(found, key=lambda each: each[1]["value"])
        texts[BEST_FILE] = search.as_gin(best)
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text)
        partial.replace(out / name)
    return table


def _table(searches: Sequence[tuple[_Search, dict[str, Any]]]) -> list[str]:
    """Tell the best trial of every variant, and what its search was worth over the recipe."""
    if not searches:
        return ["No trial is complete yet."]
    name = metric_label(searches[0][0].metric)
    heads = ["variant", "trials", "pruned", "failed", "best trial", f"{name} valid", "trial 1"]
    heads.append("settings of the best")
    rows = []
    for search, best in searches:
        each = search.rows()
        states = [row["state"] for row in each]
        first = next((row["value"] for row in each if row["trial"] == 1), None)
        cells = [search.variant, len(each), states.count("pruned"), states.count("fail")]
        cells += [best["trial"], f"{100 * best['value']:.2f}"]
        cells.append(MISSING if first is None else f"{100 * first:.2f}")
        rows.append([escape(str(cell)) for cell in [*cells, _written(best["settings"])]])
    note = (
        "In percent, on validation; the test split was not read. Trial 1 is the recipe itself, "
        "where that lies in xd_tune.space."
    )
    return [*markdown_lines(heads, rows), "", note]


def _written(settings: Mapping[str, Any]) -> str:
    """Write settings as a table has room for them."""
    return ", ".join(
        f"{name.partition('.')[2]} {_short(value)}" for name, value in settings.items()
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
