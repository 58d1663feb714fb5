"""``hstu-xd init``: the gin files of the plug-in, into a generative-recommenders checkout."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    checkout: Annotated[
        Path, typer.Argument(metavar="DIR", help="A generative-recommenders checkout.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of the same name in DIR/gin/.")
    ] = False,
) -> None:
    """Copy the gin files for upstream's own trainer into DIR/gin/."""
    from hstu_xd.plugins.gr.checkout import copy_gin_files

    files = copy_gin_files(checkout, force=force)
    for file, written in files.items():
        typer.echo(f"{'wrote' if written else 'kept '} {checkout / file}")
    first = next((file for file in files if "xd" in file), next(iter(files)))
    typer.echo(
        f"next, in {checkout}, once the file's train_fn.dataset_name names your prepared data:\n"
        f"  python main.py --gin_config_file={first}   # with a GPU\n"
        f"  hstu-xd upstream-train --gin_config_file {first}   # on a CPU"
    )
