"""``hstu-xd demo``: everything once, on synthetic data, in under three minutes on two cores."""

import os
from pathlib import Path
from typing import Annotated

import typer

# Small enough for the time limit, large enough for the planted structure to show.
_RECIPE = (
    "xd_train.num_epochs = 12",
    "xd_train.local_batch_size = 64",
    "xd_train.num_warmup_steps = 50",
    "xd_train.learning_rate = 2e-3",
    "xd_train.num_negatives = 256",
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of everything the demo writes; new.")
    ] = Path("hstu-xd-demo"),
) -> None:
    """Make synthetic data, train HSTU and the cross-domain model on it, compare them."""
    from hstu_xd.data.synthetic import synthesize
    from hstu_xd.data.world import SynthOptions
    from hstu_xd.errors import InputError
    from hstu_xd.report.build import write_report
    from hstu_xd.training.ablation import ablate

    if out.exists():
        raise InputError(f"{out} exists; remove it or give another --out")
    data, runs, page = out / "data", out / "runs", out / "report"
    typer.echo("1/3 synthetic log: 2,000 users, 4 domains that tell about each other")
    synthesize(data, SynthOptions(users=2000, domains=4, items_per_domain=300))
    typer.echo("2/3 training HSTU and the cross-domain model")
    table = ablate(
        data,
        ("hstu", "all"),
        (1,),
        runs,
        bindings=_RECIPE,
        jobs=min(2, os.cpu_count() or 1),
        announce=lambda line: typer.echo(f"    {line}"),
    )
    typer.echo("3/3 report")
    index = write_report([runs], page)
    typer.echo(f"\n{table}")
    for label, path in (("data", data), ("runs", runs), ("report", index)):
        typer.echo(f"{label:8s}{path}")
