"""``hstu-xd events``: the log of a service as Parquet, to move it to another database."""

from pathlib import Path
from typing import Annotated

import typer

events = typer.Typer(
    help="Move a service's log of events between databases.\n\n"
    "As Parquet: order, keys of repeated writes and removed users come along."
)
Log = Annotated[
    str, typer.Argument(help="Log: a file, or postgresql://HOST:PORT/DATABASE.", metavar="LOG")
]


@events.command("export", rich_help_panel="Commands")
def export_events(
    log: Log,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a log as a folder of Parquet files.

    A log in PostgreSQL may be in use: what is written is its state at one time.
    """
    from hstu_xd.serving.events.transfer import export_log

    _say(f"{out}:", export_log(log, out, force=force))


@events.command("import", rich_help_panel="Commands")
def import_events(
    folder: Annotated[Path, typer.Argument(help="What export wrote.", metavar="FOLDER")],
    log: Log,
) -> None:
    """Write an exported log into an empty one, all or nothing."""
    from hstu_xd.serving.events.transfer import import_log

    _say("imported", import_log(folder, log))


def _say(what: str, rows: dict[str, int]) -> None:
    typer.echo(f"{what} {', '.join(f'{count:,} {table}' for table, count in rows.items())}")
