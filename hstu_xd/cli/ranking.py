"""Commands of ranking: make requests, and train a model that ranks their candidates."""

from pathlib import Path
from typing import Annotated

import typer


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
    manifest = write_requests(InteractionStore.open(data), out, options, force=force)
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
) -> None:
    """Train a model that ranks the candidates of requests.

    It searches each user's history, reads what it found in the light of the candidate, and gives
    the chance that the candidate is taken. Validation picks the epoch; test is read once.
    """
    from hstu_xd.evaluation.ranking import METRICS
    from hstu_xd.ranking.run import train as run_training
    from hstu_xd.ranking.settings import load_ranking_settings

    settings = load_ranking_settings(gin_config_file or [], gin_bindings or [])
    summary = run_training(data, settings, out)
    test = summary["test"]
    shown = (f"{m} {'undefined' if test[m] is None else f'{test[m]:.4f}'}" for m in METRICS)
    typer.echo(f"{out}: best epoch {summary['best_epoch']}, test " + ", ".join(shown))
