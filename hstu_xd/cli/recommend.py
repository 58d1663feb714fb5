"""The command recommend: for one user on the screen, for all users or given pairs into a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_xd.cli.run_options import AllowImports, ExcludeSeen, Verify
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    from hstu_xd.data.store import InteractionStore
    from hstu_xd.serving.recommend_all import BulkSummary
    from hstu_xd.serving.score_pairs import ScoredPairs


def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    user: Annotated[str | None, typer.Option("--user", help="User id as in the log.")] = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Domain to recommend from, for --user.")
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Recommend to all users, into the file --out.")
    ] = False,
    users: Annotated[
        Path | None,
        typer.Option(
            "--users",
            help="File of user ids, a line each, or Parquet with a column user. [default: all of "
            "the log]",
        ),
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option("--domains", help="Domains for --all-users, a,b. [default: all]"),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            help="Score the pairs of a Parquet or CSV file (user, item and perhaps domain), into "
            "the file --out.",
        ),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option("--goal", help="Goal, for a run of towers. [default: the only one]"),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, help="Items to recommend of a domain. [default: 10]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File for --all-users or --pairs: .parquet, .csv or .jsonl."),
    ] = None,
    format: Annotated[  # the option's name is part of the command line's contract
        str | None,
        typer.Option("--format", help="parquet, csv or jsonl. [default: by the suffix of --out]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared store. [default: the run's own]")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", help="A newer store, whose histories are read; items are told by their ids."
        ),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Time of the request, in seconds as the store's. [default: the last event's]",
        ),
    ] = None,
    exclude_seen: ExcludeSeen = None,
    verify: Verify = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Recommend items to a user, or to all users.

    With --all-users the file gets a row an item: user, domain, rank, item, score. What was computed
    stays when the command is stopped, and the same command goes on with it; torchrun lets several
    processes or machines share it. With --pairs it gets a row a pair: user, item, domain, score.

    Of a ranking run of towers it gives the best items for --goal with the chances that score gives
    them: for --user, of --domain or of all, or for --all-users.
    """
    options = {
        "--user": user,
        "--domain": domain,
        "--all-users": all_users or None,
        "--users": users,
        "--domains": domains,
        "--pairs": pairs,
        "--k": k,
        "--out": out,
        "--format": format,
        "--force": force or None,
        "--exclude-seen": exclude_seen,
    }
    if _is_ranking(run):
        others = {"--log": log, "--allow-imports": allow_imports or None}
        asked = (run, options | others, goal, at)
        _of_towers(*asked, data=data, verify=verify, as_json=as_json)
        return
    if goal is not None:
        raise InputError(f"--goal {goal}: {run} is a retrieval run and has no goals; leave it out")
    use = _use_of(options)
    from hstu_xd.serving.recommend_all import open_histories, recommend_to_all
    from hstu_xd.serving.score_pairs import score_pairs
    from hstu_xd.training.distributed import is_first_process, num_processes

    store = open_histories(run, data=data, log=log, verify=verify)
    asking: dict[str, Any] = {"store": store, "at": at, "allow_imports": allow_imports}
    writing: dict[str, Any] = {
        "file_format": format,
        "force": force,
        "announce": lambda line: typer.echo(line, err=True),
    }
    if use == "--user":
        assert user is not None
        assert domain is not None
        found = _of_one(run, user, domain, k or _K, exclude_seen=exclude_seen, **asking)
        _print_one({"user": user, "domain": domain}, found, as_json=as_json)
        return
    assert out is not None
    if use == "--pairs":
        assert pairs is not None
        if (number := num_processes()) > 1:
            raise InputError(
                f"--pairs scores in one process, and {number} were started; start it without "
                "torchrun"
            )
        _print_pairs(score_pairs(run, pairs, out, **asking, **writing), as_json=as_json)
        return
    summary = recommend_to_all(
        run,
        out,
        k=k or _K,
        users=users,
        domains=_names(domains),
        exclude_seen=exclude_seen,
        **asking,
        **writing,
    )
    if is_first_process():
        _print_all(summary, as_json=as_json)


def _print_all(summary: "BulkSummary", *, as_json: bool) -> None:
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "out": str(summary.out),
                    "rows": summary.rows,
                    "users": summary.users,
                    "domains": list(summary.domains),
                    "unserved": summary.unserved,
                }
            )
        )
        return
    typer.echo(
        f"wrote {summary.out}: {summary.rows:,} rows for {summary.users:,} users in "
        f"{len(summary.domains)} domains"
    )
    if summary.unserved:
        typer.echo(
            f"{len(summary.unserved):,} users get nothing: {_first_of(summary.unserved)}; all of "
            f"them are listed in {summary.unserved_file}"
        )


def _print_pairs(scored: "ScoredPairs", *, as_json: bool) -> None:
    if as_json:
        told = {"out": str(scored.out), "rows": scored.rows, "users": scored.users}
        typer.echo(json.dumps({**told, "unserved": scored.unserved}))
        return
    typer.echo(f"wrote {scored.out}: {scored.rows:,} scores of {scored.users:,} users")
    if scored.unserved:
        typer.echo(
            f"{scored.unserved:,} pairs get no score; they are listed in {scored.unserved_file}"
        )


def _first_of(unserved: dict[str, str], number: int = 3) -> str:
    """Name a few users and why they get nothing."""
    return ", ".join(f"{user!r} {why}" for user, why in list(unserved.items())[:number])


# What the command is used for, by the option that says so: what that needs, and what it may have.
_USES = {
    "--pairs": (("--out",), ("--format", "--force")),
    "--all-users": (
        ("--out",),
        ("--users", "--domains", "--k", "--format", "--force", "--exclude-seen"),
    ),
    "--user": (("--domain",), ("--k", "--exclude-seen")),
}
_K = 10


def _use_of(options: Mapping[str, object]) -> str:
    """Tell which of the uses is meant.

    Args:
        options: values by name, None where an option was not given.

    Raises:
        InputError: an option is missing, or does nothing in this use.
    """
    given = [name for name, value in options.items() if value is not None]
    use = next((use for use in _USES if use in given), None)
    if use is None:
        raise InputError(
            "--user is missing; give --user and --domain, --all-users and --out FILE, or --pairs "
            "FILE and --out FILE"
        )
    needed, allowed = _USES[use]
    idle = next((name for name in given if name not in (use, *needed, *allowed)), None)
    if idle is not None:
        others = [other for other, known in _USES.items() if idle in (*known[0], *known[1])]
        only = f", only with {' or '.join(others)}" if others else ""
        raise InputError(f"{idle} does not go with {use}{only}; leave one of them out")
    missing = next((name for name in needed if name not in given), None)
    if missing is not None:
        raise InputError(f"{missing} is missing, which {use} needs; give it")
    return use


def _of_one(
    run: Path,
    user: str,
    domain: str,
    k: int,
    *,
    store: "InteractionStore",
    at: int | None,
    exclude_seen: bool | None,
    allow_imports: bool,
) -> list[dict[str, object]]:
    """Return items and scores for one user, best first."""
    import numpy as np

    from hstu_xd.evaluation.ranks import recommend_items
    from hstu_xd.serving.bulk import HistoryReader
    from hstu_xd.serving.recommend_all import NO_KNOWN_ITEM
    from hstu_xd.training.run import load_trained

    user_index = store.user_index(user)
    trained = load_trained(run, allow_imports=allow_imports)
    catalog = trained.ranker.catalog
    domain_id = catalog.domain_index(domain)
    history = HistoryReader(store, catalog).read(np.array([user_index]))
    if not history.item_ids.numel():
        raise InputError(f"user {user!r} {NO_KNOWN_ITEM}; train on {store.path}")
    found = recommend_items(
        trained.ranker,
        history.item_ids.numpy(),
        history.timestamps.numpy(),
        domain_id,
        k,
        window=trained.window,
        protocol=trained.protocol.but(exclude_seen=exclude_seen),
        scorer=trained.scorer,
        at=at,
    )
    return [{"item": catalog.token(item), "score": score} for item, score in found]


def _is_ranking(run: Path) -> bool:
    from hstu_xd.evaluation.protocol import RANKING
    from hstu_xd.training.run_facts import RUN_FILE, kind_of, read_run

    # What is no run at all is told by what opens it.
    return (run / RUN_FILE).is_file() and kind_of(read_run(run)) == RANKING


# Beside --goal, --at and --data.
_TOWERS_TAKE = {
    "--all-users": ("--out", "--users", "--domains", "--k", "--format", "--force"),
    "--user": ("--domain", "--k"),
}


def _of_towers(
    run: Path,
    options: Mapping[str, Any],
    goal: str | None,
    at: int | None,
    *,
    data: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Print the best items for one user and a goal, or write those of all users, by towers."""
    from hstu_xd.ranking.run import ServedRanker, open_store
    from hstu_xd.serving.ranking_session import RankingSession, history_of
    from hstu_xd.serving.tower_search import BestRequest, TowerSearch

    use = "--all-users" if options["--all-users"] else "--user"
    taken = (use, "--exclude-seen", *_TOWERS_TAKE[use])
    given = (name for name, value in options.items() if value is not None)
    if idle := next((name for name in given if name not in taken), None):
        raise InputError(
            f"{run} is a ranking run, of which recommend {use} takes --goal, --at, --data, "
            f"{', '.join(taken[1:])}; leave {idle} out, or take a run of hstu-xd train"
        )
    store = open_store(run, data, verify=verify)
    if use == "--all-users":
        _to_all_by_towers(run, options, goal, at, store, as_json=as_json)
        return
    if (user := options["--user"]) is None:
        raise InputError(
            "--user is missing; give --user or --all-users, and --goal where the run has several"
        )
    ranker = ServedRanker.of(run, store)
    search, session = TowerSearch(ranker), RankingSession(ranker, history_of(store))
    if session.latest_time(user) is None:
        typer.echo(f"WARNING: {user!r} has no events; found without a history", err=True)
    domain, k = options["--domain"], options["--k"] or _K
    seen = bool(options["--exclude-seen"])
    found = search.best(session, BestRequest(user, goal, domain, k, at, seen))
    rows = [{"item": item, "score": chance} for item, chance in found]
    told = {"user": user, "domain": domain, "goal": goal or session.goals[0]}
    _print_one(told, rows, as_json=as_json)


def _to_all_by_towers(
    run: Path,
    options: Mapping[str, Any],
    goal: str | None,
    at: int | None,
    store: "InteractionStore",
    *,
    as_json: bool,
) -> None:
    from hstu_xd.serving.recommend_all import recommend_by_towers
    from hstu_xd.training.distributed import is_first_process

    if options["--out"] is None:
        raise InputError("--out is missing, which --all-users needs; give it")
    summary = recommend_by_towers(
        run,
        options["--out"],
        store=store,
        goal=goal,
        k=options["--k"] or _K,
        users=options["--users"],
        domains=_names(options["--domains"]),
        at=at,
        exclude_seen=bool(options["--exclude-seen"]),
        file_format=options["--format"],
        force=bool(options["--force"]),
        announce=lambda line: typer.echo(line, err=True),
    )
    if is_first_process():
        _print_all(summary, as_json=as_json)


def _names(given: str | None) -> list[str] | None:
    """Split names that were given with commas between them."""
    return None if given is None else [name.strip() for name in given.split(",")]


def _print_one(
    told: Mapping[str, object], rows: Sequence[Mapping[str, object]], *, as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps({**told, "items": rows}))
        return
    for rank, row in enumerate(rows, start=1):
        typer.echo(f"{rank:4d}  {row['item']:32s} {row['score']:.4f}")
