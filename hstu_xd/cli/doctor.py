"""``hstu-xd doctor``: the environment, what will run in it, and why."""

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report versions, what loads, which upstream is found, and which attention will run."""
    from hstu_xd.doctor import examine, render

    report = examine()
    typer.echo(json.dumps(report) if as_json else render(report))
