"""``hstu-xd report``: run folders in, one self-contained HTML page and PNGs out."""

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="Folders written by train, or folders of such folders (as ablate writes them). "
        "The first variant is what the others are compared with.",
    ),
]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    allow_mixed_data: Annotated[
        bool,
        typer.Option("--allow-mixed-data", help="Accept runs on different data, a section each."),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="The prepared folder, if it has moved since training.")
    ] = None,
) -> None:
    """Compare runs: curves, test metrics, domains, switch targets, and the data behind them."""
    from hstu_xd.report.build import write_report

    page = write_report(runs, out, force=force, allow_mixed_data=allow_mixed_data, data=data)
    typer.echo(f"wrote {page} and {len(list(out.glob('*.png')))} figures beside it")
