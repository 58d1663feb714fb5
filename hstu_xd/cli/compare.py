"""``hstu-xd compare``: is a difference between runs more than luck with the users?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders written by train, or folders of such folders (as ablate writes them). "
            "The first variant is what the others are compared with.",
        ),
    ],
    split: Annotated[str, typer.Option("--split", help="valid or test.")] = "test",
    data: Annotated[
        Path | None, typer.Option("--data", help="The prepared folder, if it has moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Differences between variants on the same users, with their standard errors over users."""
    from hstu_xd.training.comparison import compare_runs, comparison_table

    found = compare_runs(
        runs, split=split, data=data, announce=lambda line: typer.echo(line, err=True)
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        typer.echo(comparison_table(found), nl=False)
