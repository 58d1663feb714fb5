"""Commands of ranking: make requests, and train a model that ranks their candidates."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_xd.cli.run_options import SkipTest, TrackerNames, Verify, say_next


def requests(
    data: Annotated[Path, typer.Option("--data", help="Prepared store.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    goal: Annotated[
        str | None,
        typer.Option(
            help="Field of the events (prepare --event-cols) whose values are goals. "
            "[default: one goal]"
        ),
    ] = None,
    positives: Annotated[int, typer.Option(help="Items of a basket in a request.")] = 3,
    negatives: Annotated[
        int, typer.Option(help="Items that others took, for each item of the basket.")
    ] = 4,
    min_history: Annotated[
        int, typer.Option(help="Fewest events of the user before a request.")
    ] = 60,
    per_user: Annotated[
        int, typer.Option(help="Most requests of a user in a split; 0 for all.")
    ] = 10,
    period_days: Annotated[
        int, typer.Option(help="Days within which others took what stands against an item.")
    ] = 7,
    valid_from: Annotated[
        int | None,
        typer.Option(help="First second that validates. [default: after 80 % of the events]"),
    ] = None,
    test_from: Annotated[
        int | None,
        typer.Option(help="First second that tests. [default: after 90 % of the events]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal requests.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace existing requests.")] = False,
) -> None:
    """Make requests to rank for from a store's purchases.

    A request is a user, a time, a goal and candidates: items of one basket, and items that others
    took in the same days for the same goal. The log is cut in time for all users alike.
    """
    from hstu_xd.data.requests import RequestOptions, write_requests
    from hstu_xd.data.store import InteractionStore

    options = RequestOptions(
        goal=goal,
        positives=positives,
        negatives=negatives,
        min_history=min_history,
        per_user=per_user,
        period_days=period_days,
        valid_from=valid_from,
        test_from=test_from,
        seed=seed,
    )
    _tell_of_requests(out, write_requests(InteractionStore.open(data), out, options, force=force))


def labelled_requests(
    impressions: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Parquet or CSV file, a row for each candidate shown: user, item, time, label.",
        ),
    ],
    data: Annotated[Path, typer.Option("--data", help="Prepared store, of the same ids.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    label_col: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    positive: Annotated[
        str, typer.Option(help="Value of the label where the candidate was taken.")
    ] = "1",
    goal_col: Annotated[
        str | None, typer.Option(help="Column whose values are goals. [default: one goal]")
    ] = None,
    user_col: Annotated[str | None, typer.Option(help="Column of the user id.")] = None,
    item_col: Annotated[str | None, typer.Option(help="Column of the item id.")] = None,
    time_col: Annotated[str | None, typer.Option(help="Column of the time.")] = None,
    time_unit: Annotated[
        str, typer.Option(help="What times are, one of the units that prepare knows.")
    ] = "auto",
    valid_from: Annotated[
        int | None,
        typer.Option(help="First second that validates. [default: after 80 % of the requests]"),
    ] = None,
    test_from: Annotated[
        int | None,
        typer.Option(help="First second that tests. [default: after 90 % of the requests]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing requests.")] = False,
) -> None:
    """Read requests from impressions with labels.

    Rows of one user, time and goal are the candidates of a request. Of the store a request may read
    what its user did before its time. Rows of users or items that are not in the store are left out
    and counted.
    """
    from hstu_xd.data.labelled_requests import LabelOptions, write_labelled_requests
    from hstu_xd.data.sources.columns import ColumnOptions
    from hstu_xd.data.store import InteractionStore

    options = LabelOptions(
        label=label_col,
        positive=positive,
        goal=goal_col,
        columns=ColumnOptions(user=user_col, item=item_col, time=time_col),
        time_unit=time_unit,
        valid_from=valid_from,
        test_from=test_from,
    )
    store = InteractionStore.open(data)
    manifest = write_labelled_requests(store, impressions, out, options, force=force)
    _tell_of_requests(out, manifest)
    left = manifest["left_out"]
    if left["rows"]:
        typer.echo(
            f"left out {left['rows']:,} rows whose user or item is not in {data}, such as user "
            f"{left['user']!r} with item {left['item']!r}",
            err=True,
        )


def _tell_of_requests(out: Path, manifest: dict[str, Any]) -> None:
    typer.echo(f"wrote {out}, hash {manifest['hash'][:12]}")
    for split, counts in manifest["splits"].items():
        goals = ", ".join(f"{name} {n:,}" for name, n in counts["requests_by_goal"].items())
        typer.echo(
            f"  {split:<5} {counts['requests']:>9,} requests of {counts['users']:,} users, "
            f"{counts['candidates']:,} candidates ({goals})"
        )


def rank(
    data: Annotated[Path, typer.Option("--data", help="Requests, of hstu-xd requests.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")],
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gin_config_file",
            help="File of settings; repeat to layer files. [default: TIN on the latest 50 events]",
        ),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help='Setting, "xd_search.k = 50"; repeat for several.'),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run in tables.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that stopped, with its own settings.")
    ] = False,
    skip_test: SkipTest = False,
    tracker: TrackerNames = None,
) -> None:
    """Train a model that ranks the candidates of requests.

    It searches each user's history, reads what it found in the light of the candidate, and gives
    the chance that the candidate is taken. Validation picks the epoch; test is read once. Ctrl-C or
    SIGTERM saves and stops it (exit code 130 or 143), and --resume goes on there.
    """
    from hstu_xd.evaluation.ranking import METRICS
    from hstu_xd.ranking.run import train as run_training
    from hstu_xd.ranking.settings import load_ranking_settings

    settings, files, bindings = None, gin_config_file or [], gin_bindings or []
    if files or bindings or not resume:
        settings = load_ranking_settings(files, bindings)
    summary = run_training(
        data,
        settings,
        out,
        name=name,
        resume=resume,
        read_test=not skip_test,
        # Each line at once, also where the output is a file that somebody follows.
        announce=lambda line: print(line, flush=True),
        trackers=tracker or (),
    )
    split = "test" if "test" in summary else "valid"
    found = summary[split]
    shown = (f"{m} {'undefined' if found[m] is None else f'{found[m]:.4f}'}" for m in METRICS)
    typer.echo(f"{out}: best epoch {summary['best_epoch']}, {split} " + ", ".join(shown))
    say_next(["evaluate", out], ["report", out, "--out", "FOLDER"])


def score(
    run: Annotated[Path, typer.Argument(help="Folder of a ranking run.")],
    user: Annotated[str, typer.Option("--user", help="User id as in the log.")],
    items: Annotated[
        str, typer.Option("--items", metavar="A,B,...", help="Candidates, by their ids in the log.")
    ],
    goal: Annotated[
        str | None, typer.Option("--goal", help="Goal of the request. [default: the only one]")
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            help="Time of the request, in seconds as the store's. [default: right after the user's "
            "last event]",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Store of the same items with newer events. [default: the run's own]"
        ),
    ] = None,
    verify: Verify = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank candidates for a user by a ranking run.

    Prints the chance that each is taken, the highest first. The history is read strictly before the
    time of the request.
    """
    from hstu_xd.serving.ranking_session import RankingSession, RankRequest

    names = [name.strip() for name in items.split(",")]
    session = RankingSession.open(run, data, verify=verify)
    if session.latest_time(user) is None:
        typer.echo(f"WARNING: {user!r} has no events; scored without a history", err=True)
    (chances,) = session.rank([RankRequest(user, names, goal, at)])
    found = sorted(zip(names, chances, strict=True), key=lambda pair: -pair[1])
    if as_json:
        rows = [{"item": name, "score": chance} for name, chance in found]
        typer.echo(json.dumps({"user": user, "goal": goal or session.goals[0], "items": rows}))
        return
    for place, (name, chance) in enumerate(found, start=1):
        typer.echo(f"{place:4d}  {name:32s} {chance:.4f}")


def evaluate_ranking(run: Path, data: Path | None, *, verify: bool, as_json: bool) -> None:
    """Measure a ranking run on its requests, or on others, and print what was found.

    Args:
        run: the run folder.
        data: the other requests.
        verify: compare the hash of every file of the store with its manifest first.
        as_json: print one JSON object instead of tables.
    """
    from hstu_xd.data.batches import Split
    from hstu_xd.evaluation.ranking import RankingProtocol, undefined_notes
    from hstu_xd.ranking.run import load_ranker
    from hstu_xd.training.run_facts import data_changes, read_run

    trained = load_ranker(run, data, verify=verify)
    task, protocol = trained.task, RankingProtocol()
    values = {s.value: task.measure(trained.model, s) for s in (Split.VALID, Split.TEST)}
    if as_json:
        told = {"run": str(run), "data": str(task.store.path)}
        told["requests_hash"] = task.requests.manifest["hash"]
        told["data_changes"] = data_changes(read_run(run), task.store)
        typer.echo(json.dumps(told | values))
        return
    groups = [f"[{name}]" for names, _ in task.groups(Split.TEST) for name in names]
    for split, found in values.items():
        heads = [*protocol.metrics, "candidates", "users"]
        typer.echo(split.ljust(24) + "".join(f" {name:>11}" for name in heads))
        for group in ["", *groups]:
            cells = [found[name + group] for name in protocol.metrics]
            shown = ["-" if cell is None else f"{cell:.4f}" for cell in cells]
            shown += [f"{found[name + group]:,}" for name in ("rows", "users")]
            typer.echo((group or "all").ljust(24) + "".join(f" {cell:>11}" for cell in shown))
    for sentence in (*protocol.sentences(), *undefined_notes(values["test"])):
        typer.echo(sentence)
    say_next(["report", run, "--out", "FOLDER"], ["compare", run, "OTHER_RUN"])
