"""``hstu-xd export``: a trained run as files that torch alone can read."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Write the encoder as a torch.export program, with weights, item vectors and catalogue."""
    from hstu_xd.export.bundle import MANIFEST, write_export

    manifest = write_export(run, out, force=force)
    for name in (*manifest["hashes"], MANIFEST):
        typer.echo(f"wrote {out / name} ({(out / name).stat().st_size:,} bytes)")
