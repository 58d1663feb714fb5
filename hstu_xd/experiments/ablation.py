"""Train variants over seeds, each run in a process of its own, and tabulate them.

A variant is a list of gin bindings on top of the recipe that all share.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import HstuXdError, InputError, Interrupted, did_you_mean
from hstu_xd.evaluation.baselines import BASELINES, NO_BASELINE
from hstu_xd.evaluation.protocol import Protocol, protocol_notes
from hstu_xd.experiments.report.tables import markdown_table
from hstu_xd.experiments.run_folders import (
    ABLATION_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    aggregate,
    read_run,
)
from hstu_xd.files import locked_folder
from hstu_xd.model.settings import SWITCHES, EncoderSettings
from hstu_xd.training.interruption import (
    STOPS_WITH_STDIN,
    StopRequest,
    signal_name,
    stop_requests,
)
from hstu_xd.training.run_facts import data_changes
from hstu_xd.training.settings import RunSettings, load_settings

_MASK = ("xd_encoder.domain_mask = True",)
_VIEW = ("xd_encoder.target_view_heads = 2",)
_TAPE = ("xd_encoder.tape = True",)
_DDSR = ("xd_encoder.ddsr = True",)
_ALL = (*_MASK, *_VIEW, *_TAPE, *_DDSR)


def _segments(length: int, tokens: int, lookback: int) -> tuple[str, ...]:
    return (
        'xd_encoder.segment_by = "count"',
        f"xd_encoder.segment_length = {length}",
        f"xd_encoder.history_tokens = {tokens}",
        f"xd_encoder.segment_lookback = {lookback}",
    )


# What an ablation compares unless told otherwise.
COMPARED: dict[str, tuple[str, ...]] = {
    "hstu-catalogue": ('xd_train.negatives = "catalogue"',),
    "hstu": (),
    "hstu+target": ("xd_encoder.target_domain_embedding = True",),
    "mask": _MASK,
    "mask+tape": (*_MASK, *_TAPE),
    "mask+ddsr": (*_MASK, *_DDSR),
    "mask+view": (*_MASK, *_VIEW),
    "all": _ALL,
}
# Long histories: the latest 33 to 64 events of a run alone; tokens for what went before the open
# segment of at most 64; shorter segments, the latest of them read beside their tokens.
_SHORTENED = {
    "recent": _segments(32, 0, 1),
    **{f"tokens{tokens}": _segments(64, tokens, 0) for tokens in (1, 4, 16)},
    "tokens1+lookback": _segments(16, 1, 1),
}
LONG_HISTORIES: dict[str, tuple[str, ...]] = {
    f"{name}+{shortened}": (*switches, *segments)
    for name, switches in (("hstu", ()), ("all", _ALL))
    for shortened, segments in _SHORTENED.items()
}
# Every position is asked for one other domain, too; full attention that is told the domain and
# full attention that is not are the controls.
_ASKED = ("xd_train.asked_domains = 1",)
ASKED: dict[str, tuple[str, ...]] = {
    f"{name}+asked": (*COMPARED[name], *_ASKED) for name in ("hstu", "hstu+target", "all")
}
# Counted instead of trained.
COUNTED: dict[str, tuple[str, ...]] = {
    name: (f'xd_train.baseline = "{name}"',) for name in BASELINES
}
# Other architectures under the same trainer, loss and negatives.
OTHERS: dict[str, tuple[str, ...]] = {
    "sasrec": (
        'xd_encoder.layer = "sasrec"',
        'xd_encoder.normalization = "softmax"',
        "xd_encoder.enable_relative_attention_bias = False",
    ),
}
VARIANTS = COMPARED | LONG_HISTORIES | ASKED | COUNTED | OTHERS


def variant_file(name: str) -> Path | None:
    """Tell a user's gin file, which is a variant named after it, from the name of one of ours.

    Raises:
        InputError: no such file, or it would be named as another variant is.
    """
    file = Path(name)
    if file.suffix != ".gin":
        return None
    if not file.is_file():
        raise InputError(f"variant {name}: no such file in {Path.cwd()}")
    if file.stem in VARIANTS:
        raise InputError(f"variant {name}: {file.stem!r} is the name of another; rename the file")
    return file


def variant_bindings(name: str) -> tuple[str, ...]:
    """Bindings of a variant; none of a user's gin file, which holds its own.

    Raises:
        InputError: unknown name; the message gives the nearest.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if variant_file(name) is not None:
        return ()
    raise InputError(
        f"unknown variant {name!r}; known: {', '.join(VARIANTS)}{did_you_mean(name, VARIANTS)}"
    )


def parse_variants(text: str | None) -> Sequence[str]:
    """Split "a,b,mine.gin" into names and gin files; the switches for None."""
    names = list(COMPARED) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        variant_bindings(name)
    return list(dict.fromkeys(names))


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
        line = [sys.executable, "-m", "hstu_xd", "train", "--data", str(data)]
        line += ["--out", str(self.folder), "--name", self.variant]
        line += _recipe_options(files, [*bindings, f"xd_train.random_seed = {self.seed}"])
        return line + ["--resume"] * self.begun


def _recipe_options(files: Sequence[Path], bindings: Sequence[str]) -> list[str]:
    """Write a recipe as options of a command."""
    options = [word for file in files for word in ("--gin_config_file", str(file))]
    return options + [word for each in bindings for word in ("--gin_bindings", each)]


def recipe_of(
    variant: str, files: Sequence[Path], bindings: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Lay a variant on top of the recipe that all share: its gin files and bindings, in order.

    Bindings are those of the command line, so they win over a variant's file, too.
    """
    file = variant_file(variant)
    return [*files, *([file] if file else [])], [*bindings, *variant_bindings(variant)]


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
        variants: names out of :data:`hstu_xd.experiments.ablation.VARIANTS`, and gin files of your
            own, which are named after the file and may import parts of your own.
        seeds: random seeds.
        out: folder of the run folders, ``ablation.json`` and ``ablation.md``.
        files: gin files of the recipe that all variants share.
        bindings: gin bindings on top of the recipe.
        jobs: runs at a time; they share the processor's cores.
        verify: compare the hash of every file of the store with its manifest first.
        announce: called with a line after every run.

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
        stopped_by = _train_all(commands, jobs, note_end)
        table = _write(out, runs, store)
    if stopped_by:
        words = ["ablate", "--data", str(data), "--variants", ",".join(variants), "--seeds"]
        words += [str(max(seeds)), "--out", str(out), *_recipe_options(files, bindings)]
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
        _check_name(variant, settings[variant])
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


def _check_name(variant: str, settings: RunSettings) -> None:
    """Refuse a recipe that switches on what the variant's name leaves out.

    A gin file is named after nothing that is in it, so it may set what it likes.
    """
    if variant_file(variant) is not None:
        return
    if settings.train.baseline != NO_BASELINE and variant not in COUNTED:
        raise InputError(
            f"variant {variant!r} would have xd_train.baseline = {settings.train.baseline!r} from "
            "the recipe and its row another model's numbers; name the baseline as a variant"
        )
    named = {binding.partition(" = ")[0] for binding in variant_bindings(variant)}
    for switch in SWITCHES:
        default = getattr(EncoderSettings, switch)
        value = settings.encoder.get(switch, default)
        if value != default and f"xd_encoder.{switch}" not in named:
            raise InputError(
                f"variant {variant!r} would have xd_encoder.{switch} = {value!r} from the recipe "
                "and its row another model's numbers; leave switches out of the recipe"
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


def _train_all(
    commands: Mapping[AblationRun, Sequence[str]],
    jobs: int,
    note_end: Callable[[AblationRun, str], object],
) -> int:
    """Train in processes of their own, which stop when this one is asked to, or ends.

    They read from a pipe whose other end this process alone holds. When that is closed, which the
    system does for a process that is killed, they save and stop.

    Args:
        commands: that train the runs.
        jobs: processes at a time.
        note_end: called with every run that was begun as it ends, and with its error line, which is
            empty when it went well.

    Returns:
        Number of the signal that asked to stop; 0: none did.
    """
    request, threads = StopRequest(), max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), STOPS_WITH_STDIN: "1"}
    theirs, ours = os.pipe()

    def train(command: Sequence[str]) -> str | None:
        if request.signal:
            return None
        done = subprocess.run(
            command, env=environment, stdin=stdin, capture_output=True, text=True, check=False
        )
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1] if done.returncode else ""

    # The pool waits last: whatever ends the block ends the trainings first.
    with (
        ThreadPoolExecutor(jobs) as pool,
        os.fdopen(theirs, "rb") as stdin,
        os.fdopen(ours, "wb") as held,
        stop_requests(request, told=held.close),
    ):
        futures = {pool.submit(train, command): run for run, command in commands.items()}
        for future in as_completed(futures):
            error = future.result()
            if error is not None:
                note_end(futures[future], error)
    return request.signal


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
