"""``hstu-xd rec-dataset``: a prepared store as the interaction file of HLLM and PerSRec."""

from pathlib import Path
from typing import Annotated

import typer


def rec_dataset(
    data: Annotated[Path, typer.Argument(metavar="STORE", help="Prepared store.")],
    out: Annotated[
        Path, typer.Option("--out", help="The CSV, ../dataset/NAME.csv for --dataset NAME.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write the interactions of a prepared store as HLLM and PerSRec read them."""
    from hstu_xd.plugins.rec.export import write_interactions

    count = write_interactions(data, out, force=force)
    typer.echo(
        f"wrote {out} ({count:,} events)\n"
        f"next, in the checkout's code folder: python -m hstu_xd.plugins.rec ... "
        f"--dataset {out.stem} --item_domain_path {data}"
    )
