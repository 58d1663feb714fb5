"""``hstu-xd compare``: is a difference between runs more than luck with the users?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hstu_xd.cli.report import Runs


def compare(
    runs: Runs,
    split: Annotated[str, typer.Option("--split", help="valid or test.")] = "test",
    data: Annotated[
        Path | None, typer.Option("--data", help="The prepared folder, if it has moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Differences between variants on the same users, with their standard errors over users."""
    from hstu_xd.training.paired_runs import pair_runs, paired_table

    found = pair_runs(
        runs, split=split, data=data, announce=lambda line: typer.echo(line, err=True)
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        typer.echo(paired_table(found), nl=False)
