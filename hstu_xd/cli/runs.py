"""Commands of one run: train, evaluate and export; and the settings of one."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer

from hstu_xd.cli.ranking import evaluate_ranking
from hstu_xd.cli.run_options import (
    AllowImports,
    Candidates,
    ExcludeSeen,
    Ks,
    SkipTest,
    Ties,
    TrackerNames,
    Verify,
    is_ranking,
    protocol_changes,
    retrieval_options,
    say_next,
)
from hstu_xd.errors import InputError


def train(
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Prepared store; needed but for --refit. [default: that of the run which is "
            "refit]",
        ),
    ] = None,
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gin_config_file",
            help="File of settings; repeat to layer files. [default: plain HSTU]",
        ),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option(
            "--gin_bindings", help='Setting, "xd_encoder.ddsr = True"; repeat for several.'
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run in tables.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that stopped, with its own settings.")
    ] = False,
    continue_from: Annotated[
        Path | None,
        typer.Option(
            "--continue-from",
            metavar="RUN",
            help="Begin with a run of an older store, with its settings unless others are given, "
            "and train on what is new.",
        ),
    ] = None,
    refit: Annotated[
        Path | None,
        typer.Option(
            "--refit",
            metavar="RUN",
            help="Train a run's model again from its beginning, with its settings and for as many "
            "epochs as its best one took, on validation targets, too.",
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="valid|test",
            help="What --refit trains on: all but the test targets, or everything, to be served "
            "and measured no more. [default: valid]",
        ),
    ] = None,
    verify: Verify = False,
    skip_test: SkipTest = False,
    allow_imports: AllowImports = False,
    tracker: TrackerNames = None,
) -> None:
    """Train a model on a prepared store.

    Start it with torchrun to use several processes, with --nnodes on several machines: each reads
    its own copy of the store, the first one alone writes the run. Ctrl-C or SIGTERM saves and stops
    it (exit code 130 or 143), and --resume goes on there; a second Ctrl-C stops it at once.
    """
    from hstu_xd.data.batches import Split
    from hstu_xd.training.distributed import is_first_process
    from hstu_xd.training.refit import Refit
    from hstu_xd.training.run import train as run_training
    from hstu_xd.training.settings import load_settings
    from hstu_xd.training.stored_settings import stored_settings

    files, bindings, settings = gin_config_file or [], gin_bindings or [], None
    begins = {"--continue-from": continue_from, "--refit": refit, "--resume": resume or None}
    _check_beginning(begins, [*files, *bindings], until)
    again = None if refit is None else Refit.of(refit)
    if continue_from is not None:
        settings = stored_settings(
            continue_from, allow_imports=allow_imports, files=files, bindings=bindings
        )
    elif again is not None:
        settings = again.settings(Split(until or Split.VALID), allow_imports=allow_imports)
    elif files or bindings:
        settings = load_settings(files, bindings)
    if data is None:
        if again is None:
            raise InputError("--data is needed, a prepared store; --refit alone knows one")
        data = again.data
    summary = run_training(
        data,
        settings,
        out,
        name=name,
        resume=resume,
        read_test=not skip_test,
        verify=verify,
        allow_imports=allow_imports,
        # Each line at once, also where the output is a file that somebody follows.
        announce=lambda line: print(line, flush=True),
        continue_from=continue_from,
        refit=again,
        trackers=tracker or (),
    )
    if is_first_process():
        _say_trained(out, summary)


def _check_beginning(begins: Mapping[str, Any], recipe: Sequence[Any], until: str | None) -> None:
    """Refuse two ways to begin a training at once, and options that have no meaning for one.

    Args:
        begins: options that say where a training begins, each with what was given for it.
        recipe: gin files and bindings that were given.
        until: what was given for ``--until``.
    """
    given = [name for name, value in begins.items() if value is not None]
    if len(given) > 1:
        rest = f"{given[1]} another one"
        if given[1] == "--resume":
            rest = "--resume goes on with one, which knows what it began with"
        raise InputError(f"{given[0]} begins a new run and {rest}; give one of them")
    if begins["--refit"] is None:
        if until is not None:
            raise InputError(
                f"--until {until} has no meaning without --refit; a training that is no refit has "
                f"the binding \"xd_train.train_until = '{until}'\""
            )
        return
    if until not in (None, "valid", "test"):
        raise InputError(f"--until {until}; one of valid, test")
    if recipe:
        raise InputError(
            f"--refit trains with the settings of {begins['--refit']}, and {recipe[0]} is given "
            "beside it; leave it out, or train without --refit"
        )


def _say_trained(out: Path, summary: Mapping[str, Any]) -> None:
    """Print how a training went and the commands that go on from it."""
    from hstu_xd.evaluation.protocol import Protocol, count_notes, until_of
    from hstu_xd.training.run_facts import read_run

    facts = read_run(out)
    split = next((name for name in ("test", "valid") if name in summary), "")
    found = summary.get(split, {})
    if "best_epoch" in summary:
        told = f"best epoch {summary['best_epoch']}"
    else:
        epochs = summary["epochs"]
        done = f"trained {epochs} epoch{'' if epochs == 1 else 's'} on" if epochs else "counted"
        told = f"{done} all up to {until_of(facts).value} targets"
    shown = Protocol.from_run(facts).main_metrics if split else ()
    numbers = ", ".join(f"{name} {100 * found[name]:.2f} %" for name in shown)
    typer.echo(f"{out}: {told}, {f'{split} {numbers}' if split else 'measured on nothing'}")
    for note in count_notes(found):
        typer.echo(note)
    say_next(
        *([["evaluate", out], ["report", out, "--out", "FOLDER"]] if split else []),
        ["recommend", out, "--all-users", "--out", "FILE.parquet"],
    )


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Prepared store; of a ranking run requests. [default: the run's own]"
        ),
    ] = None,
    exclude_seen: ExcludeSeen = None,
    candidates: Candidates = None,
    ties: Ties = None,
    ks: Ks = None,
    ranks: Annotated[
        Path | None,
        typer.Option(
            "--ranks",
            metavar="FILE.parquet",
            help="Write the test split's ranks, user by user: the best items as far as the largest "
            "k, the target and its rank among all candidates; for ranx, RecTools or polars.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --ranks.")] = False,
    verify: Verify = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Rank held-out events, or a ranking run's requests.

    Of a ranking run it gives AUC, GAUC, log loss, calibration, NDCG@10 and MRR: of all candidates,
    by goal, domain and length of the history, and of candidates without a training event.
    """
    if force and ranks is None:
        raise InputError("--force replaces an existing --ranks, which is not given")
    options = retrieval_options(exclude_seen, candidates, ties, ks)
    if is_ranking(run, {**options, "--ranks": ranks, "--allow-imports": allow_imports}):
        evaluate_ranking(run, data, verify=verify, as_json=as_json)
        return
    from contextlib import nullcontext

    from hstu_xd.data.batches import Split
    from hstu_xd.evaluation.protocol import count_notes, until_of
    from hstu_xd.evaluation.rank_file import writing_ranks
    from hstu_xd.evaluation.ranks import evaluate as evaluate_split
    from hstu_xd.training.run import load_trained
    from hstu_xd.training.run_facts import (
        check_measurable,
        data_changes,
        open_data,
        read_run,
    )

    facts = read_run(run)
    check_measurable(run, facts, Split.TEST)
    trained = load_trained(run, allow_imports=allow_imports, one_domain=True)
    protocol = trained.protocol.but(**protocol_changes(exclude_seen, candidates, ties, ks))
    store = open_data(run, data, verify=verify, as_trained=True)
    written = writing_ranks(ranks, store, force=force) if ranks else nullcontext()
    with written as file:
        values = {
            split.value: evaluate_split(
                trained.ranker,
                protocol.sequences(
                    store, split, trained.window, domain=trained.domain, until=until_of(facts)
                ),
                protocol=protocol,
                scorer=trained.scorer,
                metrics=trained.metrics,
                listed=file.write if file and split is Split.TEST else None,
            )
            for split in until_of(facts).measured()
        }
    if as_json:
        told = {"run": str(run), "data": str(store.path), "protocol": protocol.as_json()}
        told["data_changes"] = data_changes(facts, store)
        typer.echo(json.dumps(told | values))
        return
    # Metrics of one's own are shown in hundredths like the others.
    names = [*protocol.metrics, *trained.metrics]
    if "valid" not in values:
        typer.echo("valid is left out: the run was trained on its targets")
    for split, metrics in values.items():
        typer.echo(
            f"{split} (%)".ljust(24) + "".join(f" {m:>9}" for m in names) + "users".rjust(10)
        )
        groups = [key.removeprefix("count") for key in metrics if re.match(r"count($|\[)", key)]
        for group in groups:
            cells = "".join(f" {100 * metrics[m + group]:{max(9, len(m))}.2f}" for m in names)
            typer.echo((group or "all").ljust(24) + cells + f"{metrics['count' + group]:10,}")
        for group in (
            g for g in ("[macro]", "[nontrivial]") if any(m + g in metrics for m in names)
        ):
            shown = (
                (f"{100 * metrics[m + group]:.2f}" if m + group in metrics else "-", m)
                for m in names
            )
            typer.echo(group.ljust(24) + "".join(f" {text:>{max(9, len(m))}}" for text, m in shown))
        for note in count_notes(metrics):
            typer.echo(note)
    for sentence in protocol.sentences(until_of(facts)):
        typer.echo(sentence)
    say_next(
        ["report", run, "--out", "FOLDER"],
        ["recommend", run, "--all-users", "--out", "FILE.parquet"],
    )


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Write a trained run as a torch.export program.

    Weights, item vectors and the catalogue stand beside it. That of a ranking run takes the events
    that a search found; its manifest says how to find them.
    """
    from hstu_xd.export import MANIFEST, write_export

    is_ranking(run, {"--allow-imports": allow_imports})
    manifest = write_export(run, out, force=force, allow_imports=allow_imports)
    for name in (*manifest["hashes"], MANIFEST):
        typer.echo(f"wrote {out / name} ({(out / name).stat().st_size:,} bytes)")


def settings(
    word: Annotated[
        str | None, typer.Argument(help="List only what has a word that begins so.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the settings with type, default and meaning.

    These are the bindings of gin files and the keys of HLLM and PerSRec.
    """
    from hstu_xd.declaration import nearest_setting, rows, settings_of
    from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
    from hstu_xd.plugins.gr.research.settings import UpstreamSettings
    from hstu_xd.plugins.rec.settings import keys
    from hstu_xd.ranking.settings import BLOCKS as RANKING
    from hstu_xd.training.settings import BLOCKS

    hosts = {"xd_upstream": UpstreamSettings, "xd_dlrm": DlrmSettings}
    blocks = {**BLOCKS, **RANKING, **hosts}
    found = [
        row
        for block, declared in blocks.items()
        for row in rows(block, {f"{block}.{k}": each for k, each in settings_of(declared).items()})
    ]
    found += rows("rec", keys())
    if word is not None:
        begins = re.compile(rf"(?<![^\W_]){re.escape(word)}", re.IGNORECASE)
        found = [r for r in found if begins.search(" ".join([r["name"], r["meaning"], *r["also"]]))]
        if not found:
            near = nearest_setting(word.rpartition(".")[2], blocks)
            raise InputError(f"no setting speaks of {word!r}" + (f"; see {near}" if near else ""))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for row in found:
        typer.echo(f"{row['name']} = {row['default']!r}  ({row['type']})")
        typer.echo(fill(row["meaning"], 96, initial_indent="    ", subsequent_indent="    "))
