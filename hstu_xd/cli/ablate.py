"""``hstu-xd ablate``: variants over seeds, one table."""

import os
from pathlib import Path
from typing import Annotated

import typer


def ablate(
    data: Annotated[Path, typer.Option("--data", help="Prepared store.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of runs and table; may be continued.")],
    variants: Annotated[
        str | None,
        typer.Option("--variants", help="Names, a,b,...; default: all sets of switches."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 1..N.")] = 3,
    gin_config_file: Annotated[
        list[Path] | None, typer.Option("--gin_config_file", help="Recipe that all share.")
    ] = None,
    gin_bindings: Annotated[
        list[str] | None, typer.Option("--gin_bindings", help="Settings on top of the recipe.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; default: one per core.")
    ] = None,
) -> None:
    """Train every variant under every seed and print mean and spread of their test metrics."""
    from hstu_xd.training.ablation import ablate as run_ablation
    from hstu_xd.training.variants import parse_variants

    table = run_ablation(
        data,
        parse_variants(variants),
        range(1, seeds + 1),
        out,
        files=gin_config_file or [],
        bindings=gin_bindings or [],
        jobs=jobs or os.cpu_count() or 1,
        announce=lambda line: typer.echo(line, err=True),
    )
    typer.echo(table, nl=False)
