"""The command recommend: for one user and domain on the screen, for all of them into a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hstu_xd.cli.run_options import AllowImports, ExcludeSeen, Verify
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    from hstu_xd.data.store import InteractionStore


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
    k: Annotated[int, typer.Option("--k", min=1, help="Items to recommend of a domain.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File for --all-users: .parquet, .csv or .jsonl."),
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
    stays when the command is stopped, and the same command goes on with it.
    """
    _check_combination(
        all_users,
        {"--user": user, "--domain": domain},
        {"--users": users, "--domains": domains, "--format": format, "--force": force or None},
        out,
    )
    from hstu_xd.serving.recommend_all import open_histories, recommend_to_all

    store = open_histories(run, data=data, log=log, verify=verify)
    if not all_users:
        assert user is not None
        assert domain is not None
        found = _of_one(
            run,
            user,
            domain,
            k,
            store=store,
            at=at,
            exclude_seen=exclude_seen,
            allow_imports=allow_imports,
        )
        _print_one(user, domain, found, as_json=as_json)
        return
    assert out is not None
    summary = recommend_to_all(
        run,
        out,
        k=k,
        users=users,
        domains=None if domains is None else [name.strip() for name in domains.split(",")],
        store=store,
        at=at,
        exclude_seen=exclude_seen,
        file_format=format,
        force=force,
        allow_imports=allow_imports,
        announce=lambda line: typer.echo(line, err=True),
    )
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


def _first_of(unserved: dict[str, str], number: int = 3) -> str:
    """Name a few users and why they get nothing."""
    return ", ".join(f"{user!r} {why}" for user, why in list(unserved.items())[:number])


def _check_combination(
    all_users: bool, of_one: dict[str, object], of_all: dict[str, object], out: Path | None
) -> None:
    """Refuse options of the one use beside those of the other.

    Raises:
        InputError: an option that is missing, or that would do nothing.
    """
    given = of_one if all_users else of_all | {"--out": out}
    idle = next((name for name, value in given.items() if value is not None), None)
    if idle is not None:
        needed = "without --all-users" if all_users else "with --all-users"
        raise InputError(f"{idle} means something only {needed}; leave it out, or change that")
    needs = {"--out": out} if all_users else of_one
    missing = next((name for name, value in needs.items() if value is None), None)
    if missing is not None:
        raise InputError(
            f"{missing} is missing; give --user and --domain, or --all-users and --out FILE"
        )


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
    from hstu_xd.training.run_facts import read_run

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
        window=read_run(run)["max_sequence_length"],
        protocol=trained.protocol.but(exclude_seen=exclude_seen),
        scorer=trained.scorer,
        at=at,
    )
    return [{"item": catalog.token(item), "score": score} for item, score in found]


def _print_one(user: str, domain: str, rows: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"user": user, "domain": domain, "items": rows}))
        return
    for rank, row in enumerate(rows, start=1):
        typer.echo(f"{rank:4d}  {row['item']:32s} {row['score']:.4f}")
