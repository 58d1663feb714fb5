"""``hstu-xd synth``: a synthetic cross-domain log, made without a network."""

from pathlib import Path
from typing import Annotated

import typer


def synth(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 2000,
    domains: Annotated[int, typer.Option(help="Number of domains.")] = 5,
    items_per_domain: Annotated[int, typer.Option(help="Number of items in each domain.")] = 400,
    skew: Annotated[
        float, typer.Option(help="0 = balanced domains; towards 1 the first takes nearly all.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal logs.")] = 0,
    mean_length: Annotated[float, typer.Option(help="Mean number of events of a user.")] = 40.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing store.")] = False,
) -> None:
    """Write a synthetic log (a prepared store) in which domains tell about each other."""
    from hstu_xd.data.summary import print_summary
    from hstu_xd.data.synthetic import synthesize
    from hstu_xd.data.world import SynthOptions

    options = SynthOptions(
        users=users,
        domains=domains,
        items_per_domain=items_per_domain,
        skew=skew,
        seed=seed,
        mean_length=mean_length,
    )
    print_summary(out, synthesize(out, options, force=force))
