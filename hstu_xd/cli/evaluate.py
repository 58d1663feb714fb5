"""``hstu-xd evaluate``: metrics of a trained run on validation and test."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared store; default: the run's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank the held-out events of every user with a run's best model."""
    from hstu_xd.data.batches import SequenceData, Split
    from hstu_xd.evaluation.evaluate import evaluate as evaluate_split
    from hstu_xd.evaluation.metrics import METRICS
    from hstu_xd.training.run import load, open_data, read_run

    facts, model = read_run(run), load(run)
    store = open_data(run, data)
    length = facts["max_sequence_length"]
    values = {
        split.value: evaluate_split(model, SequenceData(store, split, length))
        for split in (Split.VALID, Split.TEST)
    }
    if as_json:
        typer.echo(json.dumps({"run": str(run), "data": str(store.path), **values}))
        return
    groups = ["", *(f"[{name}]" for name in ("switch", "stay", *store.domain_names))]
    for split, metrics in values.items():
        typer.echo(
            f"{split} (%)".ljust(24) + "".join(m.rjust(10) for m in METRICS) + "users".rjust(10)
        )
        for group in (g for g in groups if f"count{g}" in metrics):
            cells = "".join(f"{100 * metrics[m + group]:10.2f}" for m in METRICS)
            typer.echo((group or "all").ljust(24) + cells + f"{metrics['count' + group]:10,}")
