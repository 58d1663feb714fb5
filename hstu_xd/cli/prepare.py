"""``hstu-xd prepare``: interaction logs in, a prepared store out."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Log files (CSV, TSV, Parquet, JSON lines, .inter; also .gz), or NAME=PATH to "
            "give all events of a file one domain.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[  # the option's name is part of the command line's contract
        str, typer.Option(help="auto, csv, amazon-ratings, amazon-reviews or recbole.")
    ] = "auto",
    user_col: Annotated[str | None, typer.Option(help="Column of the user id.")] = None,
    item_col: Annotated[str | None, typer.Option(help="Column of the item id.")] = None,
    domain_col: Annotated[str | None, typer.Option(help="Column of the domain.")] = None,
    time_col: Annotated[str | None, typer.Option(help="Column of the time in seconds.")] = None,
    min_user: Annotated[int, typer.Option(help="Least events of a user in a domain (k-core).")] = 0,
    min_item: Annotated[int, typer.Option(help="Least events of an item (k-core).")] = 0,
    min_user_total: Annotated[
        int, typer.Option(help="Least events of a user over all domains (k-core).")
    ] = 0,
    write_upstream: Annotated[
        bool,
        typer.Option(
            "--write-upstream",
            help="Also write sasrec_format.csv and item_domains.csv, which generative-recommenders "
            "reads.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing store.")] = False,
) -> None:
    """Read interaction logs and write a prepared store: histories, catalogue, manifest."""
    from hstu_xd.data.filters import Filters
    from hstu_xd.data.prepare import prepare_logs
    from hstu_xd.data.sources.columns import ColumnOptions
    from hstu_xd.data.summary import print_summary

    manifest = prepare_logs(
        inputs,
        out,
        file_format=format,
        columns=ColumnOptions(user=user_col, item=item_col, domain=domain_col, time=time_col),
        filters=Filters(min_user=min_user, min_item=min_item, min_user_total=min_user_total),
        write_upstream=write_upstream,
        force=force,
    )
    print_summary(out, manifest)
