"""``hstu-xd upstream-train``: generative-recommenders' own trainer, also without a GPU."""

from pathlib import Path
from typing import Annotated

import typer


def upstream_train(
    gin_config_file: Annotated[
        Path, typer.Option("--gin_config_file", help="As for upstream's main.py.")
    ],
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help='One more setting, "train_fn.num_epochs = 1".'),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes on CPU; a GPU each otherwise.")
    ] = 1,
    master_port: Annotated[
        int, typer.Option("--master_port", help="Of the process group; 0: any free one.")
    ] = 0,
) -> None:
    """Train with generative-recommenders' train_fn, on CPU where there is no GPU."""
    from hstu_xd.plugins.gr.run import upstream_train as run_training

    run_training(gin_config_file, gin_bindings or [], processes=processes, port=master_port)
