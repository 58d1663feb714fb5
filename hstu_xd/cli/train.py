"""``hstu-xd train``: one model into one run folder."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[Path, typer.Option("--data", help="Prepared store.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")],
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gin_config_file", help="Settings; repeat to layer files; default: plain HSTU."
        ),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help='One setting, "xd_encoder.ddsr = True".'),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What tables call the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that stopped, with its own settings.")
    ] = False,
) -> None:
    """Train a model on a prepared store; torchrun starts it on several processes."""
    from hstu_xd.training.run import train as run_training
    from hstu_xd.training.settings import load_settings

    given = gin_config_file or gin_bindings
    settings = load_settings(gin_config_file or [], gin_bindings or []) if given else None
    summary = run_training(data, settings, out, name=name, resume=resume)
    test = summary["test"]
    typer.echo(
        f"{out}: best epoch {summary['best_epoch']}, test "
        + ", ".join(f"{m} {100 * test[m]:.2f} %" for m in ("hr@10", "hr@100", "ndcg@100", "mrr"))
    )
