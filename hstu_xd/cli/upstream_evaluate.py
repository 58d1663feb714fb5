"""``hstu-xd upstream-evaluate``: metrics of a checkpoint that generative-recommenders wrote."""

import json
from pathlib import Path
from typing import Annotated

import typer


def upstream_evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A file of upstream's ckpts folder.")],
    gin_config_file: Annotated[
        Path, typer.Option("--gin_config_file", help="What it was trained with.")
    ],
    gin_bindings: Annotated[
        list[str] | None, typer.Option("--gin_bindings", help="Bindings of the training.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="upstream, valid or test.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Rank a split's targets with a checkpoint of upstream's trainer."""
    from hstu_xd.plugins.gr.evaluate import upstream_evaluate as run_evaluation

    metrics = run_evaluation(gin_config_file, checkpoint, gin_bindings or [], split=split)
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        typer.echo(f"{name.ljust(width)}  {100 * value:6.2f} %")
