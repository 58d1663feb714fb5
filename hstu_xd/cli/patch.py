"""``hstu-xd patch``: additive source patches of an upstream checkout."""

from pathlib import Path
from typing import Annotated

import typer

from hstu_xd.errors import InputError


def patch(
    check: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Only tell whether the patches fit.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Apply the patches: all or none.")
    ] = None,
) -> None:
    """Check or apply the patches for a git checkout of an upstream codebase."""
    from hstu_xd.plugins.patch_files import APPLIED, REFUSED, apply_patches, inspect_tree

    root = check or apply
    if root is None or (check and apply):
        raise InputError("give --check PATH or --apply PATH, one of the two")
    if check:
        tree = inspect_tree(root)
        typer.echo(f"state: {tree.state}")
        if tree.state == REFUSED:
            raise InputError(f"{root}: {tree.reason}")
    else:
        tree = apply_patches(root)
        typer.echo(f"state: {APPLIED}")
    typer.echo(f"codebase: {tree.codebase} at {tree.commit[:7]}")
    for word, patches in (
        ("already there", tree.applied),
        ("would add" if check else "added", tree.missing),
    ):
        for each in patches:
            typer.echo(f"{word}: {each.name} ({', '.join(each.blobs)})")
    if apply and tree.missing:
        files = " ".join(path for each in tree.missing for path in each.blobs)
        typer.echo(f"undo: git -C {root} checkout -- {files}")
